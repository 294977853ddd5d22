"""The values of an environment: where they lie, who gets them, and when they go."""

import json

import pytest

from tasks.elder import hand_out
from tasks.keys import DEADLINES, SANDBOXES, host_key, sandbox_key, sealed_key
from tasks.record import Record
from tasks.rows import read
from tasks.sealed import MOST_BYTES, beside, seal, unseal
from tasks.state import State
from tasks.submit import submit
from tasks.sweeper import sweep_fleet
from tests.broker.conftest import take
from tests.broker.elder import WORDS, Elder
from tests.broker.test_elder import placed_on
from worker import journal as journals
from worker.errors import BadInput
from worker.spec import make_spec

ID, OTHER, SECRET = "sb-00000000000000a1", "sb-00000000000000a2", "hunter2-in-the-environment"
SPEC = make_spec(args=["true"], network="mynet", env={"TOKEN": SECRET, "EMPTY": ""}, reschedule=True)


@pytest.fixture
def queued(record: Record) -> Record:
    record.enqueue("b-1", [(ID, SPEC)])
    return record


def keys_with(client, word: str) -> list[str]:
    """The keys in whose dump the word is: small values are kept as they were written."""
    client.config_set("rdbcompression", "no")
    return sorted(key for key in client.scan_iter() if word.encode() in raw_dump(client, key))


def raw_dump(client, key: str) -> bytes:
    return bytes(client.execute_command("DUMP", key, NEVER_DECODE=True))


def test_values_lie_beside_the_record_and_nowhere_else(queued, client):
    assert keys_with(client, SECRET) == [sealed_key(ID)]
    text, batch = queued.spec(ID)
    assert (json.loads(text)["env"], json.loads(text)["kind"]) == ({"TOKEN": None, "EMPTY": None}, "spec/v4")
    assert queued.get(ID)["spec"]["env"] == {"TOKEN": None, "EMPTY": None}
    assert queued.whole_spec(ID, text) == SPEC
    assert batch == "b-1"


def test_a_spec_without_an_environment_has_nothing_beside_it(record, client):
    spec = make_spec(args=["true"], network="mynet")
    record.enqueue("b-1", [(ID, spec)])
    assert not client.exists(sealed_key(ID))
    assert record.whole_spec(ID, record.spec(ID)[0]) == spec


@pytest.mark.parametrize("end", [State.CANCELLED, State.FAILED, State.EXITED])
def test_they_go_when_the_sandbox_has_ended(queued, client, end):
    if end == State.CANCELLED:
        assert queued.cancel(ID, 1)
    else:
        assert take(queued) == [ID]
        assert queued.put(ID, State.LAUNCHING, 1, {"host": "h1"}) == 1
        assert client.exists(sealed_key(ID))
        assert queued.put(ID, end, 1, {}) == 1
    assert not client.exists(sealed_key(ID))


@pytest.mark.parametrize("look", [lambda record: record.get_all(), read], ids=["get_all", "ls"])
def test_what_a_script_of_the_release_before_has_left_goes_with_the_record(queued, client, look):
    """It ends what is queued, and knows nothing of what lies beside it."""
    assert Elder(client, queued).put(ID, "cancelled") == 1
    client.delete(sandbox_key(ID))  # its time is over
    assert look(queued) == []
    assert not client.exists(sealed_key(ID), SANDBOXES)


def test_a_host_of_the_release_before_never_gets_one(sender, record, broker, client):
    """It would launch it without the values, or fail."""
    Elder(client, record).beat()
    plain = make_spec(args=["true"], network="mynet", env={"A": SECRET})
    _, ids = submit(sender, record, broker, [plain, make_spec(args=["true"], network="mynet")])
    client.delete(*client.keys("sandbatch:mq:*"))
    hand_out(sender, record)
    assert placed_on(client, "old") == ids[1:]
    assert take(record, "new") == ids[:1]


def test_one_that_is_launched_elsewhere_takes_them_along(queued, client):
    take(queued)
    assert queued.reschedule(ID, OTHER, "h1")
    assert queued.whole_spec(OTHER, queued.spec(OTHER)[0]) == SPEC
    assert take(queued, "h2") == [OTHER]
    assert queued.put(ID, State.CANCELLED, 1, {}) == 1
    assert client.exists(sealed_key(OTHER))


def test_a_host_tells_them_again_to_a_broker_that_has_lost_them(queued, client, tmp_path):
    take(queued)
    journal = journals.create(tmp_path, ID, attempt=1, batch="b-1", spec=SPEC)
    client.flushall()
    queued.report(journal, "h1")
    assert keys_with(client, SECRET) == [sealed_key(ID)]
    assert queued.whole_spec(ID, queued.spec(ID)[0]) == SPEC


def test_of_a_client_of_the_release_before_they_are_not_shown_either(record, client):
    spec = json.dumps({**json.loads(WORDS["spec"]), "env": {"TOKEN": SECRET}})
    Elder(client, record).enqueue(ID, spec)
    record.offer({ID: spec})
    assert SECRET not in json.dumps(record.get(ID)) + json.dumps(read(record))
    assert record.whole_spec(ID, record.spec(ID)[0]).env == {"TOKEN": SECRET}
    assert take(record, kinds=["spec/v1"], rooms={"sandbatch": -1, "mynet": -1}) == [ID]


def test_one_that_is_offered_again_keeps_its_line(queued):
    before = queued.client.hget(sandbox_key(ID), "line")
    queued.offer({ID: queued.spec(ID)[0]})
    assert queued.client.hget(sandbox_key(ID), "line") == before
    assert before.split("|")[1] == "spec/v4"


def test_a_spec_that_is_too_large_is_refused_before_anything_is_written(record, client):
    spec = make_spec(args=["true"], env={"A": "x" * MOST_BYTES})
    with pytest.raises(BadInput, match="the most"):
        record.enqueue("b-1", [(OTHER, SPEC), (ID, spec)])
    assert list(client.scan_iter()) == []


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({}, None),
        ({}, "{}"),
        ({}, "[1]"),
        ({}, json.dumps({"kind": "sealed/v1", "env": {"TOKEN": SECRET}})),
        ({}, json.dumps({"kind": "sealed/v1", "env": {"TOKEN": SECRET, "EMPTY": 5}})),
        ({}, json.dumps({"kind": "sealed/v1", "env": {"TOKEN": SECRET + "\0", "EMPTY": ""}})),
        ({}, json.dumps({"kind": "sealed/v2", "env": {"TOKEN": SECRET, "EMPTY": ""}})),
        ({"env": 5}, ...),
        ({"env": [SECRET]}, ...),
        ({"env": {"A=B": None}}, json.dumps({"kind": "sealed/v1", "env": {"A=B": SECRET}})),
        ({"kind": "spec/v1", "env": {"A": 5}}, ...),
        ({"kind": "spec/v9"}, ...),
        ({"unknown": SECRET}, ...),
        ({"args": []}, ...),
        ({"args": [SECRET + "\0"]}, ...),
        ({"rootfs": "/a/../etc"}, ...),
        ({"mounts": [{"source": "/etc", "target": "/proc"}]}, ...),
        ({"pids": 1e400}, ...),
        ({"cpus": float("nan")}, ...),
        ({"ttl_s": float("nan")}, ...),
        ({"memory_bytes": 10**5000}, ...),
        ({"args": ["x" * 3 * MOST_BYTES]}, ...),
    ],
    ids=range(22),
)
def test_whatever_somebody_has_written_is_refused_with_words_and_without_a_value(change, given):
    text, own = seal(SPEC), beside(SPEC, None)
    limit = 10**5000 in change.values()
    fields = {**json.loads(text), **({"memory_bytes": "@"} if limit else change)}
    text = json.dumps(fields).replace('"@"', "9" * 5000)
    with pytest.raises(BadInput) as caught:
        unseal(text, own if given is ... else given)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{", '{"args":' + "[" * 100_000, "\ud800"])
def test_what_is_no_spec_at_all_is_refused_with_words(text):
    with pytest.raises(BadInput):
        unseal(text, None)


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{", "[" * 100_000, '{"networks":[5]}', '{"labels":[1]}', '{"env":["A"]}', '{"args":5}'],
)
def test_nobody_who_lists_or_sweeps_stumbles_over_what_is_no_spec(queued, sender, client, text):
    """Else one record, written by hand, would keep everybody from ending anything."""
    client.hset(sandbox_key(ID), "spec", text)
    client.hdel(sandbox_key(ID), "command")
    client.zadd(DEADLINES, {ID: 1.0})
    assert queued.get(ID)["spec"] == {}
    assert [row["labels"] for row in read(queued, with_labels=True)] == [{}]
    queued.offer({ID: text})
    client.sadd(host_key("h1") + ":sandboxes", ID)
    queued.count_memory("h1", 7)
    assert client.hgetall(host_key("h1") + ":memory") == {ID: "7"}
    sweep_fleet(sender, queued)
    assert queued.get(ID)["state"] == "failed"
