"""/metrics of one host: what is counted, what the journals say, and what the broker does when it is asked."""

import http.client
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tasks import drains, exporter, metrics
from tasks.exporter import _Server
from tasks.submit import submit
from worker import journal as journals
from worker import last_audit, outcomes
from worker.errors import HostNotReady
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import make_spec

SPEC = make_spec(args=["true"], memory_bytes=100 * 2**20)


@pytest.fixture
def host(tmp_path, broker: Settings) -> Settings:
    """A host of its own on the session's broker."""
    (tmp_path / "state" / "sandboxes").mkdir(parents=True)
    url = f"unix://{broker.broker_socket}"
    return Settings(broker_url=url, host="h1", state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture(autouse=True)
def empty(client: Any) -> None:
    """Nothing of the test before is in the broker."""


def registry_of(settings: Settings) -> tuple[CollectorRegistry, metrics.Counts]:
    counts: list[metrics.Counts] = []
    return metrics.make_registry(settings, counts.append), counts[0]


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    """As `name{label=value,…}`, without `host`, which all have."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("host") == "h1"
            inner = ",".join(f"{name}={labels[name]}" for name in sorted(labels))
            found[sample.name + (f"{{{inner}}}" if inner else "")] = sample.value
    return found


def begin(settings: Settings, number: int) -> Journal:
    name = f"sb-{number:016x}"
    return journals.create(settings.sandboxes_dir, name, attempt=1, batch="b-1", spec=SPEC)


def test_the_journals_say_what_a_host_has(host, monkeypatch):
    """By state; who waits for an answer holds no slot; what is stuck, by the stage of its undo."""
    monkeypatch.setattr(metrics, "ANSWER_KEPT_S", -1)
    registry, _ = registry_of(host)
    begin(host, 1).mark_begun("netns")
    waits, stuck = begin(host, 2), begin(host, 3)
    waits.mark_begun("ready")
    stuck.set_facts(wanted="failed", stuck={"stage": "network", "message": "busy"})
    broken = begin(host, 4)
    (broken.folder / journals.FILE).write_text("no journal")

    found = scrape(registry)
    assert found["sandbatch_sandboxes{state=launching}"] == 2
    assert found["sandbatch_sandboxes{state=stuck}"] == 1
    assert found["sandbatch_sandboxes{state=running}"] == 0
    assert found["sandbatch_slots_used"] == 1
    assert found["sandbatch_stuck_undos{stage=network}"] == 1
    assert found["sandbatch_stuck_undos{stage=netns}"] == 0
    assert found["sandbatch_unreadable_journals"] == 1
    assert found["sandbatch_memory_asked_bytes"] == 3 * SPEC.memory_bytes
    assert (found["sandbatch_capacity"], found["sandbatch_slots"]) == (host.capacity, host.slots)

    waits.mark_done("ready", {})
    stuck.mark_begun("network")  # so that there is something to undo
    stuck.mark_undo_begun("network")
    stuck.mark_undone("network")
    stuck.set_facts(stuck=None, final="failed")
    journals.set_aside(broken.folder)
    found = scrape(registry)
    assert found["sandbatch_sandboxes{state=running}"] == 1
    assert found["sandbatch_stuck_undos{stage=network}"] == 0
    assert found["sandbatch_unreadable_journals"] == 1, "a journal that was set aside is not forgotten"
    stuck.remove()
    assert scrape(registry)["sandbatch_sandboxes{state=failed}"] == 0


def test_a_journal_is_read_again_only_if_it_was_written(host, monkeypatch):
    """A host may have a thousand quiet sandboxes, and is asked every 15 seconds."""
    monkeypatch.setattr(metrics, "ANSWER_KEPT_S", -1)
    registry, _ = registry_of(host)
    quiet, busy = begin(host, 1), begin(host, 2)
    scrape(registry)
    read: list[str] = []
    whole = journals.read
    monkeypatch.setattr(journals, "read", lambda folder: read.append(folder.name) or whole(folder))
    busy.mark_begun("netns")
    scrape(registry)
    assert read == [busy.container_id]
    assert quiet.container_id not in read


def test_counts_begin_with_0_and_have_no_ids(host):
    """Prometheus sees no increase in what begins with 1. The number of lines does not grow with sandboxes."""
    registry, counts = registry_of(host)
    before = scrape(registry)
    assert before["sandbatch_stages_total{result=failed,stage=network,verb=do}"] == 0
    assert before["sandbatch_ended_total{reason=oom,state=failed}"] == 0
    counts.stage("network", "do", "failed", 0.2)
    counts.stage("network", "do", "done", 40.0)
    counts.launched(1.5)
    counts.ended("failed", "stage")
    after = scrape(registry)
    assert after["sandbatch_stages_total{result=failed,stage=network,verb=do}"] == 1
    assert after["sandbatch_stage_seconds_sum{result=done,stage=network,verb=do}"] == 40
    assert after["sandbatch_stage_seconds_bucket{le=30.0,result=done,stage=network,verb=do}"] == 0
    assert after["sandbatch_launch_seconds_count"] == 1
    assert after["sandbatch_ended_total{reason=stage,state=failed}"] == 1
    assert len(before) < 400
    assert not [name for name in after if "created" in name]


def test_what_the_last_audit_found_stays_until_the_next(host, monkeypatch):
    """The audit is a command of its own; the worker tells what it has left."""
    monkeypatch.setattr(metrics, "ANSWER_KEPT_S", -1)
    registry, _ = registry_of(host)
    assert not [name for name in scrape(registry) if "audit" in name], "no audit is not a clean one"
    last_audit.note(host, ["lease", "lease", "netns"])
    found = scrape(registry)
    assert found["sandbatch_audit_leaks"] == 3
    assert found["sandbatch_audit_leaks_by_kind{kind=lease}"] == 2
    assert abs(found["sandbatch_audit_timestamp_seconds"] - time.time()) < 60
    last_audit.note(host, [])
    assert scrape(registry)["sandbatch_audit_leaks"] == 0
    (host.state_dir / last_audit.FILE).write_text('{"at": 1, "kinds": []}')
    assert "sandbatch_audit_leaks" not in scrape(registry)


def test_an_audit_of_a_machine_that_never_had_a_worker_notes_nothing(tmp_path):
    last_audit.note(Settings(state_dir=tmp_path / "none"), ["netns"])
    assert not (tmp_path / "none").exists()


def test_why_a_host_takes_nothing_new(host, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER_KEPT_S", -1)
    registry, _ = registry_of(host)
    assert not any(value for name, value in scrape(registry).items() if "not_taking" in name)
    drains._write(host.state_dir / drains.FILE, {"drained": True, "at": 1.0, "why": "disk"})
    assert scrape(registry)["sandbatch_not_taking{reason=drained}"] == 1


def test_the_queue_is_the_fleets_and_messages_are_the_hosts(host, broker, sender, record, client):
    """What waits in the lines, and what lies in the lists that kombu keeps for each priority."""
    submit(sender, record, broker, [make_spec(args=["true"], networks=[{"name": "mynet"}])] * 5)
    client.lpush("sandbatch:mq:host.h1", "undo")
    client.lpush("sandbatch:mq:host.h1\x06\x162", "container")
    client.lpush("sandbatch:mq:host.h2", "of another")
    registry, _ = registry_of(host)
    found = scrape(registry)
    assert found["sandbatch_broker_up"] == 1
    assert found["sandbatch_queue_length"] == 5
    assert found["sandbatch_host_messages"] == 2


def test_kombu_names_the_lists_of_a_host_as_we_do(host, sender, client):
    """Its own channel is asked, as the names are no promise."""
    from tasks.app import host_queue, make_app

    with make_app(host, "h1") as app, app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        names = [channel._q_for_pri(host_queue("h1"), priority) for priority in range(10)]
    assert [f"sandbatch:mq:{name}" for name in names] == metrics.Broker(host)._queues


def test_without_a_broker_the_hosts_own_numbers_stay(host, tmp_path):
    """What cannot be known is not told; 0 would be a lie."""
    away = host.model_copy(update={"broker_url": f"unix://{tmp_path}/nobody.sock"})
    begin(away, 1)
    found = scrape(registry_of(away)[0])
    assert found["sandbatch_broker_up"] == 0
    assert found["sandbatch_sandboxes{state=launching}"] == 1
    assert not {"sandbatch_queue_length", "sandbatch_host_messages"} & set(found)


# -- over HTTP -------------------------------------------------------------------------------------


@contextmanager
def serving(settings: Settings, monkeypatch) -> Iterator[tuple[str, int]]:
    """`serve`, on a free port; stopped after the test."""
    made: list[_Server] = []

    class Kept(_Server):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(exporter, "_Server", Kept)
    monkeypatch.setattr(exporter, "LOOK_S", 0.02)
    monkeypatch.setattr(outcomes, "listen", lambda counts: None)
    exporter.serve(settings.model_copy(update={"metrics_port": free_port(settings.metrics_address)}))
    try:
        yield made[0].server_address[:2]
    finally:
        made[0].shutdown()
        made[0].server_close()


def free_port(address: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as free:
        return int(free.getsockname()[1])


def get(where: tuple[str, int], path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    with closing(http.client.HTTPConnection(*where, timeout=10)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_only_metrics_are_served(host, monkeypatch):
    with serving(host, monkeypatch) as where:
        status, text = get(where)
        assert status == 200
        assert 'sandbatch_info{host="h1"' in text
        assert get(where, "/")[0] == 404
        assert get(where, "/metrics/../etc/passwd")[0] == 404
        assert get(where, method="POST")[0] == 501


def test_those_who_only_connect_do_not_fill_the_worker_with_threads(host, monkeypatch):
    """It is in the process that keeps the host's promise."""
    with serving(host, monkeypatch) as where:
        idle = [socket.create_connection(where, timeout=10) for _ in range(exporter.MOST_AT_ONCE)]
        with socket.create_connection(where, timeout=10) as one_more:
            one_more.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            try:
                answer = one_more.recv(100)
            except ConnectionResetError:  # what it had sent was not read
                answer = b""
            assert answer == b""
        for one in idle:
            one.close()


def test_a_port_that_is_taken_is_refused_in_words(host):
    """At start: an operator who has asked for numbers must not go without them unawares."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostNotReady) as refused:
            exporter.serve(host.model_copy(update={"metrics_port": port}))
    assert str(refused.value).startswith(f"/metrics on 127.0.0.1:{port}: Address already in use; set ")


def test_an_address_for_others_is_logged(host, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with serving(host, monkeypatch):
        assert "firewall" not in caplog.text
    with serving(host.model_copy(update={"metrics_address": "0.0.0.0"}), monkeypatch):
        assert "whoever reaches 0.0.0.0:" in caplog.text


def test_ipv6_works_as_well(host, monkeypatch):
    with serving(host.model_copy(update={"metrics_address": "::1"}), monkeypatch) as where:
        assert get(where)[0] == 200
