"""A host with keys: whole lives by one who signs, and nothing for one who does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import signing
from tasks.app import make_app, options
from tasks.keys import line_key, sandbox_key, sealed_key
from tasks.messages import Order
from tests.host.conftest import SUBNETS
from tests.host.machine import unchanged
from tests.host.system import SERVER, System
from worker.settings import Settings

SOON_S = 30


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for who in ("user-alice", "host-test"):
        signing.make_key(folder, who)
    return folder


def start(system: System, keys: Path) -> None:
    system.start(SANDBATCH_SIGNING_KEY=str(keys / "host-test.key"), SANDBATCH_TRUSTED_KEYS=str(keys))


@pytest.fixture(scope="module")
def signed(host_parts: None, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A host that listens to alice and to itself; its command line is alice's."""
    with unchanged():
        made = System(tmp_path_factory.mktemp("system"), next(SUBNETS))
        start(made, keys)
        made.env["SANDBATCH_SIGNING_KEY"] = str(keys / "user-alice.key")
        yield made
        made.remove()


@pytest.fixture
def alices(signed: System) -> Iterator[System]:
    yield signed
    signed.clear()


def test_whole_lives_of_what_is_signed(alices: System) -> None:
    one, again = alices.run("--wait", "--count", "2", *SERVER)
    assert alices.cli("exec", one, "--", "echo", "hello").stdout == "hello\n"
    assert "GET / HTTP" in alices.cli("logs", one).stderr
    alices.cli("stop", one)
    assert alices.wait([one], "terminal") == {one: "exited"}
    (restarted,) = alices.run("--restart", "on-failure:1", "--", "sh", "-c", "exit 3")
    assert alices.wait([restarted], "terminal") == {restarted: "exited"}
    assert alices.show(restarted)["restarts"] == 1
    (old,) = alices.run("--ttl", "1", "--", "sleep", "60")
    assert alices.wait([old], "terminal") == {old: "exited"}
    alices.cli("rm", again)
    assert "is refused" not in alices.log()


def test_who_does_not_sign_has_nothing_done(alices: System) -> None:
    (one,) = alices.run("--wait", "--", "sleep", "600")
    key = alices.env.pop("SANDBATCH_SIGNING_KEY")
    try:
        refused = alices.cli("exec", one, "--", "true", check=False)
        assert refused.returncode == 1
        assert "it is not signed; set signing_key" in refused.stderr
        order = Order(container_id=one, attempt=1).model_dump()
        with make_app(Settings(broker_url=f"redis+socket://{alices.run_dir}/broker.sock"), "client") as app:
            for task in ("undo.container", "container", "ended"):
                app.send_task(f"sandbatch.{task}", kwargs={"message": order}, **options(task, "test"))
            app.control.broadcast("shutdown")
            app.control.broadcast("pool_shrink", arguments={"n": 4})
    finally:
        alices.env["SANDBATCH_SIGNING_KEY"] = key
    words = [
        "'sandbatch.undo.container' in queue host.test is refused: it is not signed",
        "'sandbatch.ended'",
    ]
    alices.wait_until(lambda: all(one in alices.log() for one in words), SOON_S, "word of what is refused")
    alices.wait_until(lambda: "pool_shrink" in alices.log(), SOON_S, "word of the remote control")
    assert alices.show(one)["state"] == "running"
    assert alices.cli("exec", one, "--", "true").returncode == 0


def test_a_worker_that_was_killed_takes_its_signed_messages_up_again(alices: System, keys: Path) -> None:
    running = alices.run("--wait", "--", "sleep", "600")
    under_way = alices.run("--count", "6", "--", "sleep", "600")
    alices.kill_worker()
    start(alices, keys)
    assert set(alices.wait(running + under_way, "running").values()) == {"running"}


def test_a_host_that_could_not_be_listened_to_is_not_started(alices: System, keys: Path) -> None:
    alices.env["SANDBATCH_TRUSTED_KEYS"] = str(keys)
    try:
        done = alices.cli("up", check=False)
    finally:
        del alices.env["SANDBATCH_TRUSTED_KEYS"]
    assert done.returncode == 2
    assert "it is user-alice, and this host, test, signs what it sends itself" in done.stderr


def test_a_spec_is_launched_once_and_only_if_somebody_signed_it(alices: System) -> None:
    """Records are anybody's to write: a copy of one, or one that is set back, starts nothing."""
    (one,) = alices.run("--wait", "--env", "TOKEN=1", "--", "sleep", "600")
    with alices.record() as record:
        beside = str(record.client.get(sealed_key(one)))  # with the login of a host
        alices.cli("stop", one)
        assert alices.wait([one], "terminal") == {one: "exited"}
        line = str(record.client.hget(sandbox_key(one), "line"))
        record.client.hset(sandbox_key(one), mapping={"state": "queued", "seq": "0"})
        record.client.hdel(sandbox_key(one), "ended_at", "removed")
        record.client.set(sealed_key(one), beside)
        record.client.zadd(line_key(line), {one: 1.0})
        record.client.sadd("sandbatch:lines", line)
        record.ring()
        key = alices.env.pop("SANDBATCH_SIGNING_KEY")
        try:
            (unsigned,) = alices.run("--env", "TOKEN=1", "--", "sleep", "60")
        finally:
            alices.env["SANDBATCH_SIGNING_KEY"] = key
        assert alices.wait([one, unsigned], "terminal") == {one: "failed", unsigned: "failed"}
        rows = record.get_all([one, unsigned])
    words = [row["error"]["message"] for row in rows]
    assert "it was launched before, on test" in words[0]
    assert "the host refuses the spec: it is not signed; set signing_key where it was sent" in words[1]
    assert not list(alices.sandboxes.glob("*"))
