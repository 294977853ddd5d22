"""Signed specs: a host launches what somebody whom it trusts has signed for this sandbox, once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import claims
from tasks.keys import TAKEN_KEPT_S, sandbox_key, sealed_key, taken_key
from tasks.record import Record
from tasks.signing import Refused, Signer, make_key
from tasks.state import State
from tasks.submit import submit
from tests.broker.conftest import take
from worker import journal as journals
from worker.errors import BadInput
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import make_spec

ID, OTHER, SECRET = "sb-00000000000000a1", "sb-00000000000000a2", "hunter2"
SPEC = make_spec(args=["true"], network="mynet", env={"TOKEN": SECRET})
MOVES = make_spec(args=["true"], network="mynet", reschedule=True)


@pytest.fixture
def alice(tmp_path: Path) -> Signer:
    key, public = make_key(tmp_path, "user-alice")
    trusted = tmp_path / "trusted"
    trusted.mkdir(mode=0o755)
    public.rename(trusted / public.name)
    return Signer.read(key)


@pytest.fixture
def host(tmp_path: Path, alice: Signer) -> Any:
    """Settings of a host that listens to alice."""

    def make(name: str = "h1", **more: Any) -> Settings:
        folders = {what: tmp_path / name / what for what in ("run_dir", "state_dir")}
        for one in folders.values():
            one.mkdir(parents=True, exist_ok=True)
        trusted = tmp_path / "trusted"
        return Settings(broker_url="", host=name, trusted_keys=trusted, **folders, **more)

    return make


def place(record: Record, settings: Settings, container_id: str = ID) -> Journal:
    """What `place` does: judge, write the journal, claim."""
    known = record.spec(container_id)
    assert known is not None
    spec, signed = claims.spec_of(settings, record, container_id, known)
    folder = settings.sandboxes_dir
    made = journals.create(folder, container_id, attempt=1, batch=known[1], spec=spec, signed=signed)
    claims.claim(settings, record.client, made)
    return made


def forget(journal: Journal, settings: Settings, record: Record) -> None:
    claims.end(settings, record.client, journal)
    journal.remove()


def test_what_is_signed_is_launched_with_its_values_and_what_was_changed_is_not(record, client, alice, host):
    record.enqueue("b-1", [(ID, SPEC), (OTHER, SPEC)], None, alice)
    assert place(record, host()).asked == SPEC
    assert place(record, host()).asked == SPEC  # a twin of the message
    text = client.hget(sandbox_key(OTHER), "spec")
    client.hset(sandbox_key(OTHER), "spec", text.replace("true", "false"))
    with pytest.raises(Refused, match="it was changed since"):
        place(record, host(), OTHER)


@pytest.mark.parametrize("change", ["batch", "value", "name", "id", "token", "unsigned", "nothing beside"])
def test_each_part_of_it_is_signed(record, client, alice, host, change):
    record.enqueue("b-1", [(ID, SPEC), (OTHER, SPEC)], None, alice)
    beside = json.loads(client.get(sealed_key(ID)))
    if change == "batch":
        client.hset(sandbox_key(ID), "batch", "b-2")
    elif change == "value":
        beside["env"]["TOKEN"] = "another"
    elif change == "name":
        beside["env"] = {"LD_PRELOAD": SECRET}
        text = client.hget(sandbox_key(ID), "spec")
        client.hset(sandbox_key(ID), "spec", text.replace("TOKEN", "LD_PRELOAD"))
    elif change == "id":
        beside = json.loads(client.get(sealed_key(OTHER)))
    elif change == "token":
        beside["token"] = beside["token"].replace("user-alice", "host-alice")
    else:
        beside["token"] = None
    client.set(sealed_key(ID), json.dumps(beside))
    if change == "nothing beside":
        client.delete(sealed_key(ID))
    with pytest.raises(Refused) as caught:
        place(record, host())
    assert SECRET not in str(caught.value)
    assert not host().sandboxes_dir.exists()
    assert not client.exists(taken_key(ID))


def test_a_key_of_another_fleet_is_none(record, host, tmp_path):
    (tmp_path / "foreign").mkdir()
    mallory = Signer.read(make_key(tmp_path / "foreign", "user-alice")[0])
    record.enqueue("b-1", [(ID, SPEC)], None, mallory)
    with pytest.raises(Refused, match="is not of user-alice"):
        place(record, host())


def test_an_old_signature_is_stale(record, alice, host, monkeypatch):
    signed_at = time.time() - 7200
    with monkeypatch.context() as then:
        then.setattr(time, "time", lambda: signed_at)
        record.enqueue("b-1", [(ID, SPEC)], None, alice)
    with pytest.raises(Refused, match="signed it 7200 s ago"):
        place(record, host(spec_age_s=3600))
    assert place(record, host()).asked == SPEC


def test_one_that_has_ended_is_not_launched_again_by_its_record(record, client, alice, host):
    """Nor by another host, nor by the same after the broker has lost its data."""
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    beside, raw = client.get(sealed_key(ID)), client.hgetall(sandbox_key(ID))
    forget(place(record, host()), host(), record)
    for settings in (host(), host("h2")):
        with pytest.raises(Refused, match="it was launched before, on h1"):
            place(record, settings)
    client.flushall()
    client.hset(sandbox_key(ID), mapping=raw)
    client.set(sealed_key(ID), beside)
    claims._launched.cache_clear()  # another process
    with pytest.raises(Refused, match="it was launched before, on h1"):
        place(record, host())


def test_of_two_hosts_one_gets_it_whenever_they_look(record, alice, host):
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    known = record.spec(ID)
    made = []
    for name in ("h1", "h2"):  # both have judged it before either has claimed it
        spec, signed = claims.spec_of(host(name), record, ID, known)
        folder = host(name).sandboxes_dir
        made.append(journals.create(folder, ID, attempt=1, batch="b-1", spec=spec, signed=signed))
    claims.claim(host("h1"), record.client, made[0])
    with pytest.raises(Refused, match="launched before"):
        claims.claim(host("h2"), record.client, made[1])
    claims.claim(host("h1"), record.client, journals.read(made[0].folder))  # after a kill, from its journal


def test_a_host_that_never_began_it_leaves_it_to_another(record, alice, host):
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    claims.spec_of(host("h1"), record, ID, record.spec(ID))
    assert place(record, host("h2")).asked == SPEC


def test_one_of_a_lost_host_is_launched_elsewhere_by_the_same_signature_however_old(
    record, client, alice, host, monkeypatch
):
    record.enqueue("b-1", [(ID, MOVES)], None, alice)
    take(record, "h1")
    place(record, host("h1"))
    assert record.reschedule(ID, OTHER, "h1")
    later = time.time() + 30 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    made = place(record, host("h2"), OTHER)
    assert made.asked == MOVES
    assert client.get(taken_key(ID)) == f"h2 {OTHER}"
    assert TAKEN_KEPT_S - 60 < client.ttl(taken_key(ID)) <= TAKEN_KEPT_S
    # The lost host is back, and ends what it has: the note is not its own any more.
    old = journals.read(host("h1").sandboxes_dir / ID)
    with pytest.raises(Refused):
        claims.claim(host("h1"), client, old)
    forget(old, host("h1"), record)
    assert client.ttl(taken_key(ID)) > TAKEN_KEPT_S - 60
    # And once more, for the next.
    client.hset(sandbox_key(OTHER), mapping={"state": "running", "host": "h2"})
    third = "sb-00000000000000a3"
    assert record.reschedule(OTHER, third, "h2")
    assert place(record, host("h3"), third).asked == MOVES
    forget(journals.read(host("h3").sandboxes_dir / third), host("h3"), record)
    assert client.ttl(taken_key(ID)) < 8 * 86400


def test_nobody_but_the_sweep_makes_a_successor(record, client, alice, host):
    """Whatever fields he writes: he can copy a record, but not the note of who launches it."""
    record.enqueue("b-1", [(ID, MOVES)], None, alice)
    beside, raw = client.get(sealed_key(ID)), client.hgetall(sandbox_key(ID))
    place(record, host())
    forged = {**raw, "id": OTHER, "signed_as": ID, "replaces": ID}
    client.hset(sandbox_key(OTHER), mapping=forged)
    client.set(sealed_key(OTHER), beside)
    with pytest.raises(Refused, match="does not stand in for"):
        place(record, host("h2"), OTHER)
    # Nor does a forged record of a sandbox on a lost host get the sweep to do it.
    client.hset(sandbox_key(OTHER), mapping={**forged, "state": "running", "host": "h1", "reschedule": "1"})
    third = "sb-00000000000000a3"
    assert record.reschedule(OTHER, third, "h1")
    with pytest.raises(Refused):
        place(record, host("h2"), third)


def test_what_did_not_ask_for_it_is_not_launched_elsewhere(record, client, alice, host):
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    take(record, "h1")
    place(record, host("h1"))
    client.hset(sandbox_key(ID), "reschedule", "1")  # by hand, and its host's heartbeat away
    assert record.reschedule(ID, OTHER, "h1")
    with pytest.raises(Refused, match="not to be launched elsewhere"):
        place(record, host("h2"), OTHER)


def test_a_broker_that_has_lost_its_data_hears_signature_and_note_again(record, client, alice, host):
    """With the spec as it was signed, and not as the host has it, with its own limits."""
    record.enqueue("b-1", [(ID, MOVES)], None, alice)
    take(record, "h1")
    settings, known = host(), record.spec(ID)
    spec, signed = claims.spec_of(settings, record, ID, known)
    limited = spec.model_copy(update={"pids": 77})
    made = journals.create(settings.sandboxes_dir, ID, attempt=1, batch="b-1", spec=limited, signed=signed)
    client.flushall()
    record.report(journals.read(made.folder), "h1")
    assert record.spec(ID) == known
    assert record.reschedule(ID, OTHER, "h1")
    assert place(record, host("h2"), OTHER).asked == MOVES


def test_without_keys_nothing_is_judged_and_a_signature_is_kept_for_those_who_do(record, alice, host):
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    record.enqueue("b-1", [(OTHER, SPEC)])
    open_host = host().model_copy(update={"trusted_keys": None})
    assert place(record, open_host, OTHER).signed is None
    assert place(record, open_host).signed["as"] == ID
    assert not record.client.exists(taken_key(ID))
    with pytest.raises(Refused, match="not signed"):
        place(record, host("h2"), OTHER)


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"host": "h2"}, "it is for host h2"), ({"on": {"gpu": "true"}}, "for hosts with label gpu")],
)
def test_a_host_refuses_what_is_for_others_whichever_line_it_was_put_into(record, host, alice, asked, words):
    record.enqueue("b-1", [(ID, make_spec(args=["true"], network="mynet", **asked))], None, alice)
    with pytest.raises(BadInput, match=words):
        place(record, host(labels={"gpu": "false"}))
    assert place(record, host("h2", labels={"gpu": "true"})).signed


@pytest.mark.parametrize("batch", ["", "../x", "b" * 64, "a b", "b\n"])
def test_a_name_of_a_batch_is_one(record, client, host, alice, batch):
    record.enqueue("b-1", [(ID, SPEC)], None, alice)
    client.hset(sandbox_key(ID), "batch", batch)
    with pytest.raises(BadInput, match="no name of a batch"):
        place(record, host())


def test_a_client_with_a_key_signs_what_it_submits(sender, record, broker, client, tmp_path, alice, host):
    settings = broker.model_copy(update={"signing_key": tmp_path / "user-alice.key"})
    _, ids = submit(sender, record, settings, [SPEC, make_spec(args=["true"], network="mynet")])
    for one in ids:
        assert place(record, host(), one).signed["token"].startswith("v1:user-alice:")
    assert record.put(ids[1], State.CANCELLED, 1, {}) == 1
    assert not client.exists(sealed_key(ids[1]))


def test_a_key_that_cannot_be_used_is_told_before_anything_is_written(
    sender, record, broker, client, tmp_path
):
    settings = broker.model_copy(update={"signing_key": tmp_path / "user-bob.key"})
    with pytest.raises(BadInput, match="user-bob"):
        submit(sender, record, settings, [SPEC])
    assert list(client.scan_iter()) == []
