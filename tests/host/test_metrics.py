"""/metrics of a real worker: what it launched, what failed and where, over kills and without its broker."""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.host.machine import difference, snapshot
from tests.host.system import SERVER, System
from tests.unit.test_monitoring import promtool, queries, rules

__all__ = ["promtool"]  # a fixture
ROOT = Path(__file__).parent.parent.parent
NAME = re.compile(r"\bsandbatch_\w+")


def answers(system: System) -> bool:
    """The record may still have the heartbeat of the worker before."""
    try:
        return bool(Scraped(system))
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def journal_of(folder: Path) -> str:
    file = folder / "journal.jsonl"
    return file.read_text() if file.is_file() else ""


def holder(folder: Path) -> int:
    """The process that works on a sandbox: it has its folder open, for the lock."""
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has closed it since
            if os.readlink(fd) == str(folder):
                return int(fd.parts[2])
    raise AssertionError(f"nobody works on {folder}")


class Scraped(dict[str, float]):
    """Values by `name`, or `name VALUE VALUE` with those of its labels but `host`, by their names."""

    def __init__(self, system: System) -> None:
        port = system.env["SANDBATCH_METRICS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            self.text = answer.read().decode()
        super().__init__()
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                assert sample.labels.pop("host") == "test"
                labels = (sample.labels[name] for name in sorted(sample.labels))
                self[" ".join([sample.name, *labels])] = sample.value


@pytest.fixture(scope="module")
def measured(host_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A worker with /metrics, and a network whose plugin fails."""
    before = snapshot()
    folder = tmp_path_factory.mktemp("measured")
    system = System(folder, "10.149.0.0/24", {"SANDBATCH_METRICS_PORT": str(free_port())})
    system.faulty_plugin("ADD exit1")
    system.network("faulty", chain=("faulty",))
    system.start()
    yield system
    system.remove()
    assert difference(before, snapshot()) == {}


def test_an_operator_sees_which_stage_fails_and_what_a_kill_lost(measured: System, promtool: str):
    """And the next worker says what is there at once: it reads the journals."""
    (good,) = measured.run("--wait", *SERVER)
    (bad,) = measured.run("--network", "faulty", *SERVER)
    assert measured.wait([bad], "terminal") == {bad: "failed"}
    measured.audit()

    def told(name: str) -> bool:
        return bool(Scraped(measured)[name])

    measured.wait_until(lambda: told("sandbatch_ended_total stage failed"), 10, "the end in the metrics")
    found = Scraped(measured)
    for stage in ("place", "netns", "network", "bundle", "container", "ready"):
        assert found[f"sandbatch_stages_total done {stage} do"] == (2 if stage in ("place", "netns") else 1)
    assert found["sandbatch_stages_total failed network do"] == 1
    assert found["sandbatch_stages_total done network undo"] == 1
    assert found["sandbatch_launch_seconds_count"] == 1
    runs = {run["name"]: run for run in measured.show(good)["stages"]}
    shown = found["sandbatch_stage_seconds_sum done container do"]
    assert shown == pytest.approx(runs["container"]["duration_s"]), "the journal's own time"
    assert found["sandbatch_sandboxes running"] == 1
    assert found["sandbatch_broker_up"] == 1
    assert found["sandbatch_audit_leaks"] == 0

    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=found.text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    asked = {
        name for query in [*queries(), *(rule["expr"] for rule in rules())] for name in NAME.findall(query)
    }
    told_of = set(NAME.findall(found.text))
    assert asked <= told_of, asked - told_of
    families = {line.split()[2] for line in found.text.splitlines() if line.startswith("# TYPE ")}
    described = set(NAME.findall((ROOT / "docs" / "metrics.md").read_text()))
    assert families <= described, families - described

    measured.kill_worker()
    measured.start()
    measured.wait_until(lambda: answers(measured), 20, "answer of the new worker")
    found = Scraped(measured)
    assert found["sandbatch_sandboxes running"] == 1
    assert found["sandbatch_stages_total failed network do"] == 0, "counts are of this worker"
    assert found["sandbatch_audit_leaks"] == 0


def test_a_stage_whose_process_is_killed_is_counted_as_lost(make_system):
    """By the others that are left: no count lives in a process of the pool."""
    system: System = make_system(SANDBATCH_METRICS_PORT=str(free_port()))
    system.start(SANDBATCH_FAULTS="stage.bundle.do.before:hang", SANDBATCH_ALLOW_FAULTS="1")
    (lost,) = system.run(*SERVER)
    folder = system.sandboxes / lost
    system.wait_until(lambda: '"bundle"' in journal_of(folder), 20, "its bundle to be begun")
    os.kill(holder(folder), signal.SIGKILL)
    assert system.wait([lost], "terminal") == {lost: "failed"}
    system.wait_until(lambda: Scraped(system)["sandbatch_ended_total stage failed"], 10, "its end")
    found = Scraped(system)
    assert found["sandbatch_stages_total lost bundle do"] == 1
    assert found["sandbatch_stages_total done netns do"] == 1
    assert found["sandbatch_stages_total done netns undo"] == 1


def test_a_broker_that_hangs_holds_up_neither_the_answer_nor_a_sandbox(measured: System):
    """What the host knows by itself is told; of the queue nothing is."""
    with measured.record() as record:
        broker = int(record.client.info("server")["process_id"])
    assert Scraped(measured)["sandbatch_queue_length"] == 0
    os.kill(broker, signal.SIGSTOP)
    try:
        time.sleep(1.1)  # the last answer is kept for a second
        began = time.monotonic()
        found = Scraped(measured)
        assert time.monotonic() - began < 9, "a scrape has 10 s"
    finally:
        os.kill(broker, signal.SIGCONT)
    assert found["sandbatch_broker_up"] == 0
    assert "sandbatch_queue_length" not in found
    assert found["sandbatch_capacity"] > 0


def test_a_port_that_is_taken_keeps_a_worker_from_starting(make_system):
    """It has begun nothing then, and its last words say what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        system: System = make_system(SANDBATCH_METRICS_PORT=port)
        with pytest.raises(AssertionError, match="sandbatch up ended") as ended:
            system.start()
    words = f"sandbatch: /metrics on 127.0.0.1:{port}: Address already in use; set SANDBATCH_METRICS_PORT"
    assert words in str(ended.value)
    assert not Path(system.sandboxes).exists()
