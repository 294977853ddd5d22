"""The record: who may move a sandbox, from where to where, and who hears of it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks import record as records
from tasks.connection import check, connect, public_url
from tasks.keys import EVENTS, SANDBOXES, TERMINAL_KEPT_S
from tasks.record import Record
from tasks.state import MOVES, TERMINAL, State
from tests.broker.conftest import take
from worker import journal as journals
from worker.errors import BadInput, BrokerError
from worker.settings import Settings
from worker.spec import make_spec

ID, OTHER = "sb-00000000000000a1", "sb-00000000000000a2"
SPEC = make_spec(args=["true"], labels={"team": "red"}, host="h1")


@pytest.fixture
def queued(record: Record) -> Record:
    """A record of one sandbox that waits."""
    record.enqueue("b-1", [(ID, SPEC)])
    return record


def state(record: Record, container_id: str = ID) -> str:
    found = record.get(container_id)
    assert found is not None
    return str(found["state"])


def events(record: Record, since: str = "0-0") -> list[tuple[str, str]]:
    return [(event["id"], event["state"]) for _, event in record.follow(since, 0.01)]


def moved(record: Record, *states: State) -> None:
    for one in states:
        assert record.put(ID, one, 1, {}) == 1


# -- who has it ----------------------------------------------------------------------------------


def test_what_is_enqueued_can_be_shown(queued):
    shown = queued.get(ID)
    assert (shown["id"], shown["batch"], shown["state"], shown["attempt"]) == (ID, "b-1", "queued", 1)
    assert (shown["args"], shown["labels"], shown["image"]) == (["true"], {"team": "red"}, "host")
    assert (shown["ip"], shown["exit_code"], shown["error"], shown["stages"]) == (None, None, None, [])
    assert shown["created_at"].endswith("Z")
    assert queued.spec(ID) == (SPEC.model_dump_json(), "b-1")


def test_what_nobody_enqueued_is_unknown(record):
    assert record.get(ID) is None
    assert record.spec(ID) is None
    assert not record.is_wanted(ID)
    assert record.placement(ID) is None
    assert record.put(ID, State.RUNNING, 1, {}) == -2
    assert record.get(ID) is None


def test_what_was_removed_is_taken_by_nobody(queued):
    queued.mark_removed([ID])
    assert not queued.is_wanted(ID)
    assert take(queued) == []
    assert state(queued) == "queued"


def test_a_removal_of_what_is_unknown_makes_no_record(record, client):
    """It would have no end."""
    record.mark_removed([ID])
    assert client.keys("*:sb:*") == []


def test_a_host_knows_what_it_has_taken_and_not_ended(queued):
    queued.enqueue("b-1", [(OTHER, SPEC)])
    assert take(queued) == [ID, OTHER]
    moved(queued, State.RUNNING)
    assert {(wish.container_id, wish.state) for wish in queued.wishes_on("h1")} == {
        (ID, "running"),
        (OTHER, "placed"),
    }
    assert queued.wishes_on("h2") == []
    queued.put(ID, State.EXITED, 1, {})
    assert queued.client.smembers("sandbatch:host:h1:sandboxes") == {OTHER}
    assert [wish.container_id for wish in queued.wishes_on("h1")] == [OTHER]


# -- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", list(State))
def test_only_the_moves_of_the_table_are_made(record, client, old):
    """The script has the table as an argument; a wrong one would be seen by nobody else."""
    for new in State:
        record.enqueue("b-1", [(ID, SPEC)])
        client.hset(f"sandbatch:sb:{ID}", "state", old)
        answer = record.put(ID, new, 1, {"stage": "x"})
        assert answer == (1 if new in MOVES[old] or new == old else -1), new
        assert state(record) == (new if answer == 1 else old)
        client.flushall()


def test_a_move_by_an_older_attempt_is_fenced_off(queued):
    """A worker that was given up and comes back must not speak for its successor."""
    assert queued.put(ID, State.PLACED, 3, {}) == 1
    assert queued.put(ID, State.LAUNCHING, 2, {"stage": "netns"}) == -1
    assert (state(queued), queued.get(ID)["stage"]) == ("placed", None)
    assert queued.put(ID, State.LAUNCHING, 4, {}) == 1
    assert queued.get(ID)["attempt"] == 4


def test_an_older_view_changes_nothing_and_a_newer_attempt_counts_anew(queued):
    """Two processes report; the one that read the journal first may come last."""
    moved(queued, State.PLACED)
    assert queued.put(ID, State.LAUNCHING, 1, {"stage": "network"}, seq=5) == 1
    assert queued.put(ID, State.LAUNCHING, 1, {"stage": "netns"}, seq=4) == 0
    assert queued.put(ID, State.RUNNING, 1, {"stage": "ready"}, seq=5) == 0
    assert (state(queued), queued.get(ID)["stage"]) == ("launching", "network")
    assert queued.put(ID, State.LAUNCHING, 2, {"stage": "netns"}, seq=1) == 1
    assert queued.get(ID)["stage"] == "netns"


def test_cancel_ends_only_what_no_host_has(queued):
    assert queued.cancel(ID, 1)
    assert state(queued) == "cancelled"
    assert not queued.cancel(ID, 1)
    queued.enqueue("b-1", [(OTHER, SPEC)])
    assert take(queued) == [OTHER]
    assert not queued.cancel(OTHER, 1)
    assert state(queued, OTHER) == "placed"


def test_cancel_and_take_cannot_both_succeed(record):
    """`rm` right after `run` is the usual case."""
    for number in range(30):
        container_id = f"sb-{number:016x}"
        record.enqueue("b-1", [(container_id, SPEC)])
        with ThreadPoolExecutor(2) as pool:
            cancelled = pool.submit(record.cancel, container_id, 1)
            taken = pool.submit(take, record)
            assert cancelled.result() != (taken.result() == [container_id])


@pytest.mark.parametrize("end", sorted(TERMINAL))
def test_the_record_of_an_end_goes_after_a_day_and_any_other_stays(queued, client, end):
    moved(queued, State.PLACED)
    assert client.ttl(f"sandbatch:sb:{ID}") == -1
    moved(queued, end)
    assert 0 < client.ttl(f"sandbatch:sb:{ID}") <= TERMINAL_KEPT_S
    assert queued.get(ID)["ended_at"] is not None
    assert not queued.is_wanted(ID)


def test_the_end_that_the_journal_noted_is_kept(queued):
    """It may have been an hour ago, with the broker away."""
    moved(queued, State.PLACED)
    queued.put(ID, State.EXITED, 1, {"ended_at": "2026-01-01T00:00:00.000Z"})
    assert queued.get(ID)["ended_at"] == "2026-01-01T00:00:00.000Z"


def test_an_expired_record_leaves_the_index_too(queued, client):
    queued.enqueue("b-1", [(OTHER, SPEC)])
    client.delete(f"sandbatch:sb:{ID}")  # as when its day is over
    assert [row["id"] for row in queued.get_all([ID, OTHER])] == [OTHER]
    assert [row["id"] for row in queued.get_all()] == [OTHER]
    assert client.zrange(SANDBOXES, 0, -1) == [OTHER]


def test_all_sandboxes_come_oldest_first(record):
    ids = [f"sb-{number:016x}" for number in (5, 3, 9)]
    for one in ids:
        record.enqueue("b-1", [(one, SPEC)])
        time.sleep(0.002)  # the index has the time for its order
    assert [row["id"] for row in record.get_all()] == ids


# -- reports of a journal ------------------------------------------------------------------------


@pytest.fixture
def known(queued, tmp_path) -> journals.Journal:
    """The journal of a sandbox that host h1 has taken."""
    assert take(queued) == [ID]
    return journals.create(tmp_path, ID, attempt=1, batch="b-1", spec=SPEC)


def test_a_report_says_what_the_journal_says(queued, known):
    known.mark_begun("netns")
    known.mark_done("netns", {})
    known.mark_begun("network")
    known.mark_done("network", {"ips": ["10.0.0.2", "fd00::2"]})
    assert queued.report(known, "h1") == 1
    shown = queued.get(ID)
    assert (shown["state"], shown["stage"], shown["host"]) == ("launching", "network", "h1")
    assert (shown["ip"], shown["ips"]) == ("10.0.0.2", ["10.0.0.2", "fd00::2"])
    assert [(run["name"], run["do|undo"], run["state"]) for run in shown["stages"]] == [
        ("netns", "do", "done"),
        ("network", "do", "done"),
    ]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "launching"),
        ({"wanted": "failed"}, "undoing"),
        ({"wanted": "exited"}, "stopping"),
        ({"wanted": "cancelled"}, "stopping"),
        ({"wanted": "failed", "stuck": {"stage": "network", "message": "busy"}}, "stuck"),
        ({"wanted": "exited", "stuck": None, "final": "exited"}, "exited"),
        ({"wanted": "failed", "final": "failed"}, "failed"),
        ({"wanted": "cancelled", "final": "cancelled"}, "cancelled"),
    ],
)
def test_the_state_follows_from_the_facts(queued, known, facts, expected):
    known.set_facts(**facts)
    queued.report(known, "h1")
    assert state(queued) == expected


def test_a_report_of_an_older_view_changes_nothing(queued, known):
    known.mark_begun("netns")
    old = journals.read(known.folder)
    known.mark_done("netns", {})
    known.mark_begun("ready")
    known.mark_done("ready", {})
    assert queued.report(known, "h1") == 1
    assert queued.report(old, "h1") == 0
    assert state(queued) == "running"


def test_the_same_report_twice_makes_one_event(queued, known):
    known.mark_begun("netns")
    mark = queued.last_event()
    queued.report(known, "h1")
    queued.report(known, "h1")
    assert events(queued, mark) == [(ID, "launching")]


def test_error_and_exit_code_are_shown(queued, known):
    known.set_facts(
        wanted="failed", final="failed", error={"stage": "network", "message": "no ü"}, exit_code=0
    )
    queued.report(known, "h1")
    shown = queued.get(ID)
    assert shown["error"] == {"stage": "network", "message": "no ü"}
    assert shown["exit_code"] == 0


def test_a_broker_that_lost_a_record_gets_it_back_from_the_journal(queued, known, client):
    """The journal is the truth about the host: `ls` must not deny what runs."""
    for name in ("netns", "ready"):
        known.mark_begun(name)
        known.mark_done(name, {})
    client.flushall()
    assert queued.report(known, "h1") == 1
    (shown,) = queued.get_all()
    assert (shown["id"], shown["state"], shown["batch"]) == (ID, "running", "b-1")
    assert (shown["host"], shown["labels"]) == ("h1", {"team": "red"})
    assert shown["created_at"] == known.created_at
    assert [wish.container_id for wish in queued.wishes_on("h1")] == [ID]


# -- events --------------------------------------------------------------------------------------


def test_each_move_is_told_once_and_no_other_change_is(queued):
    mark = queued.last_event()
    assert mark == "0-0"
    moved(queued, State.PLACED)
    queued.put(ID, State.PLACED, 1, {"stage": "netns"})
    queued.put(ID, State.QUEUED, 0, {})
    moved(queued, State.LAUNCHING, State.RUNNING)
    assert events(queued, mark) == [(ID, "placed"), (ID, "launching"), (ID, "running")]


def test_from_a_mark_nothing_is_missed_and_nothing_told_twice(queued):
    moved(queued, State.PLACED)
    mark = queued.last_event()
    assert events(queued, mark) == []
    moved(queued, State.LAUNCHING)
    ((mark, event),) = queued.follow(mark, 0.01)
    assert (event["id"], event["batch"], event["state"], event["host"]) == (ID, "b-1", "launching", "")
    assert events(queued, mark) == []


def test_a_follower_is_woken_by_the_event(queued, broker):
    with ThreadPoolExecutor() as pool, connect(broker) as connection:
        mark = queued.last_event()
        told = pool.submit(lambda: list(Record(connection).follow(mark, 3)))
        moved(queued, State.PLACED)
        ((_, event),) = told.result(timeout=30)
        assert event["state"] == "placed"


def test_without_an_event_a_follower_returns_in_time(queued):
    assert list(queued.follow(queued.last_event(), 0.05)) == []


def test_the_stream_of_events_is_bounded(queued, client, monkeypatch):
    """A year of sandboxes must not fill the broker's memory; whole blocks of 100 are cut off."""
    pipe = client.pipeline(transaction=False)
    for _ in range(1000):
        pipe.xadd(EVENTS, {"id": ID})
    pipe.execute()
    monkeypatch.setattr(records, "EVENTS_KEPT", 100)
    moved(queued, State.PLACED)
    assert client.xlen(EVENTS) <= 200


# -- hosts ---------------------------------------------------------------------------------------


def test_a_host_lives_while_its_heart_beats(record, client):
    record.heartbeat("h1", {"capacity": 3})
    record.heartbeat("h2", {"capacity": 4})
    hosts = record.live_hosts()
    assert list(hosts) == ["h1", "h2"]
    assert (hosts["h1"]["name"], hosts["h1"]["capacity"]) == ("h1", 3)
    assert hosts["h1"]["heartbeat_at"].endswith("Z")
    assert 0 < client.ttl("sandbatch:host:h1") <= 30
    client.delete("sandbatch:host:h1")  # as when it has not been heard of for 30 s
    assert list(record.live_hosts()) == ["h2"]


def test_a_host_that_leaves_is_gone_at_once(record):
    record.heartbeat("h1", {})
    record.leave("h1")
    record.leave("h1")
    assert record.live_hosts() == {}


def test_a_name_is_one_machines_until_it_leaves(record):
    """Two machines under one name would share a queue, each doing half of a launch."""
    assert record.take_name("h1", "me")
    assert record.take_name("h1", "me")
    assert not record.take_name("h1", "another")
    record.leave("h1")
    assert record.take_name("h1", "another")


def test_a_heartbeat_tells_whether_the_broker_has_lost_its_data(record, client):
    life = record.heartbeat("h1", {})
    assert record.heartbeat("h1", {}) == life
    client.flushall()
    assert record.heartbeat("h1", {}) != life


# -- the broker ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:hunter2@h", "redis://:***@h"),
        ("rediss://user:hunter2@h:1/2", "rediss://user:***@h:1/2"),
        ("redis://user@h", "redis://user:***@h"),
        ("redis://:hunt@er2@h", "redis://:***@h"),
        ("redis+socket://:hunter2@/run/b.sock", "redis+socket://:***@/run/b.sock"),
        ("redis://h?password=hunter2&db=1", "redis://h?password=***&db=1"),
        ("redis://h?db=1&password=hunter2", "redis://h?db=1&password=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert public_url(Settings(broker_url=url)) == shown


def test_the_embedded_broker_is_shown_as_its_socket(broker):
    assert public_url(broker) == f"redis+socket://{broker.broker_socket}"


@pytest.mark.parametrize("scheme", ["unix", "redis+socket"])
def test_a_socket_can_be_named_as_redis_and_as_kombu_name_one(broker, scheme):
    settings = broker.model_copy(update={"broker_url": f"{scheme}://{broker.broker_socket}"})
    with connect(settings) as client:
        check(client, settings)


def test_no_broker_is_an_error_that_names_it_and_what_to_do(tmp_path):
    settings = Settings(run_dir=tmp_path, broker_url="")
    with connect(settings) as client, pytest.raises(BrokerError) as caught:
        check(client, settings)
    assert f"broker redis+socket://{tmp_path}/broker.sock: " in str(caught.value)
    assert "sandbatch up" in str(caught.value)


@pytest.mark.parametrize("option", ["nonsense=1", "db=one"])
def test_an_option_of_the_url_that_is_none_is_refused(broker, option):
    """redis-py hands it on as an argument, and fails with a TypeError once it connects."""
    url = f"unix://{broker.broker_socket}?{option}"
    settings = broker.model_copy(update={"broker_url": url})
    with pytest.raises(BadInput, match="check SANDBATCH_BROKER_URL"):
        check(connect(settings), settings)
