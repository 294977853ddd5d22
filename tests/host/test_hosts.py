"""What a host says of itself, and what it does when it is drained, or was taken for lost."""

import contextlib
import json
from collections.abc import Iterator

import pytest

from tasks.connection import connect
from tasks.record import Record
from tests.host.system import System
from worker.settings import Settings
from worker.spec import new_container_id


@pytest.fixture
def record(clean_system: System) -> Iterator[Record]:
    with contextlib.closing(connect(Settings(run_dir=clean_system.run_dir))) as client:
        yield Record(client)


def test_a_host_says_what_it_has(clean_system: System):
    (facts,) = json.loads(clean_system.cli("hosts", "--json").stdout)
    assert (facts["name"], facts["state"], facts["pulls"], facts["drained"]) == ("test", "live", True, None)
    assert facts["runsc"]
    assert facts["cpus"] >= 1
    assert facts["load"] >= 0
    assert facts["memory"] > facts["memory_asked"] == 0
    assert 0 < facts["network_room"]["bridged"] <= 253, "a /24 has so many addresses"


def test_a_drain_outlives_the_worker_and_what_the_broker_knew_of_it(clean_system: System):
    """What waits meanwhile says why, and is launched once the host is resumed."""
    clean_system.cli("drain", "test", "--why", "new disk")
    (waiting,) = clean_system.run("--host", "test", "--", "sleep", "300")

    clean_system.stop()
    clean_system.start()
    with contextlib.closing(connect(Settings(run_dir=clean_system.run_dir))) as client:
        known = Record(client)
        client.hdel("sandbatch:drains", "test")
        known.ring()  # the host looks at once, before its heartbeat
        clean_system.wait_until(lambda: known.drain_of("test"), 10, "the host's own note in the record")

    shown = clean_system.show(waiting)
    assert (shown["state"], shown["why"]) == ("queued", "host test is drained: new disk")
    clean_system.cli("resume", "test")
    assert clean_system.wait([waiting], "running") == {waiting: "running"}


def test_a_host_that_returns_undoes_what_was_launched_anew_meanwhile(clean_system: System, record: Record):
    """Nothing runs twice for longer than it must; the audit of the fixture sees that nothing is left."""
    (old,) = clean_system.run("--reschedule", "--wait", "--", "sleep", "300")
    new = new_container_id()

    while not record.reschedule(old, new, "test"):  # the host's heart may have beaten between the two
        record.client.delete("sandbatch:host:test")

    assert clean_system.wait([new], "running") == {new: "running"}
    clean_system.wait_until(lambda: clean_system.show(old)["state"] == "cancelled", 20, "end of the old one")
    rows = clean_system.ls()
    assert (rows[old]["reason"], rows[old]["replaced_by"]) == ("rescheduled", new)
    assert rows[new]["replaces"] == old
