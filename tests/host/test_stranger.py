"""A stranger with the broker's login of clients and no key of the fleet: nothing runs, no env is read.

As in the issue: "cannot run a task of his own on a host, cannot read another user's env".
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tasks import workflow
from tasks.app import make_app, options
from tasks.keys import PREFIX, sandbox_key, sealed_key
from tasks.messages import Order
from tests.host.redis_server import RedisServer
from tests.host.system import System
from worker.settings import Settings

SECRET, CALLS_SECRET = "the-password-of-alice", "said-to-exec-alone"
SOON_S = 30.0
TASKS = sorted(workflow.app.tasks)
READERS = ("GET", "HGETALL", "HVALS", "SMEMBERS", "LRANGE {} 0 -1", "ZRANGE {} 0 -1", "XRANGE {} - +")


class Stranger:
    """What he has: the settings of a user, without its key, or with one of a fleet of his own."""

    def __init__(self, system: System, env: dict[str, str]) -> None:
        self.system, self.env = system, env
        found = {name.removeprefix("SANDBATCH_").lower(): value for name, value in env.items()}
        self.settings = Settings(**found)  # type: ignore[arg-type]

    def cli(self, *args: str) -> "subprocess.CompletedProcess[str]":
        env = {**self.system.environment, **self.env}
        if "SANDBATCH_SIGNING_KEY" not in self.env:
            del env["SANDBATCH_SIGNING_KEY"]
        argv = [sys.executable, "-m", "cli", *args]
        return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60, check=False)


@pytest.fixture(params=["no key", "a key of another fleet"])
def stranger(
    request: pytest.FixtureRequest, server: RedisServer, clean_keyed: System, tmp_path: Path
) -> Iterator[Stranger]:
    env = server.env("user-alice")
    del env["SANDBATCH_SIGNING_KEY"]
    if request.param != "no key":  # which has the name of somebody whom the host trusts
        server.make_keys_in(tmp_path / "own", "--broker", "127.0.0.1", "--users", "alice")
        env["SANDBATCH_SIGNING_KEY"] = str(tmp_path / "own" / "user-alice" / "user-alice.key")
    yield Stranger(clean_keyed, env)
    server.denied()


@pytest.fixture
def victim(clean_keyed: System) -> str:
    """A sandbox of alice's that runs, with a secret in its environment."""
    (made,) = clean_keyed.run("--env", f"PASSWORD={SECRET}", "--wait", "--", "sleep", "600")
    return made


def journals(system: System) -> set[str]:
    return {path.name for path in system.sandboxes.glob("sb-*")}


def test_no_sandbox_of_his_is_launched(stranger: Stranger, tmp_path: Path):
    """By the command line, or by a record made by hand."""
    system, before = stranger.system, journals(stranger.system)
    done = stranger.cli("run", "--", "sleep", "600")
    assert done.returncode == 0, done.stderr  # he may write what he likes
    (made,) = done.stdout.split()

    assert system.wait([made], "terminal", SOON_S) == {made: "failed"}
    error = system.show(made)["error"]
    assert error["stage"] == "place"
    assert "sign" in error["message"] or "key" in error["message"]
    assert journals(system) == before


def test_no_task_of_his_runs(stranger: Stranger, server: RedisServer, victim: str):
    """Of any name, in any queue, about a sandbox that the host has."""
    system, before = stranger.system, journals(stranger.system)
    order = Order(container_id=victim, attempt=1).model_dump()
    queues = {host: options("unwind", host) for host in (None, "test")}
    with make_app(stranger.settings, "client") as app:
        for task in [*TASKS, "no.such.task"]:
            more = {"final": "exited", "forget": True} if task == "sandbatch.unwind" else {}
            for where in queues.values():
                app.send_task(task, kwargs={"message": order, **more}, **where)
    lists = [f"{PREFIX}mq:{where['queue']}" for where in queues.values()]
    system.wait_until(lambda: not any(map(server.admin().llen, lists)), SOON_S, "empty queues")

    assert system.show(victim)["state"] == "running"
    assert system.cli("exec", victim, "--", "echo", "alive").stdout == "alive\n"
    assert journals(system) == before
    words = "it is not signed" if "SANDBATCH_SIGNING_KEY" not in stranger.env else "is not of user-alice"
    system.wait_until(lambda: words in system.log(), SOON_S, "word of what is refused")


def test_no_call_and_no_pull_of_his(stranger: Stranger, victim: str):
    for words in (("exec", victim, "--", "true"), ("logs", victim)):
        done = stranger.cli(*words)
        assert done.returncode == 1, words
        assert "sign" in done.stderr
    pulled = stranger.cli("pull", "registry.example/own:1", "--host", "test")
    assert pulled.returncode == 1
    assert "sign" in pulled.stderr + pulled.stdout


def test_no_key_that_he_may_read_has_a_value_of_env(stranger: Stranger, server: RedisServer, victim: str):
    """All keys that there are, by each command that reads, and within scripts; exec's values, too."""
    system = stranger.system
    with contextlib.ExitStack() as stack:
        argv = [
            sys.executable,
            "-m",
            "cli",
            "exec",
            "--env",
            f"A={CALLS_SECRET}",
            victim,
            "--",
            "sleep",
            "30",
        ]
        running = stack.enter_context(subprocess.Popen(argv, env=system.environment))
        stack.callback(running.terminate)
        system.cli("drain", "test")
        stack.callback(system.cli, "resume", "test")
        (waits,) = system.run("--env", f"PASSWORD={SECRET}", "--", "sleep", "600")

        client, admin = server.client("user-alice"), server.admin()
        keys = list(admin.scan_iter())
        assert sealed_key(waits) in keys
        assert SECRET in str(admin.get(sealed_key(waits)))
        said = read_all(client, [*keys, f"{PREFIX}host:test:calls"])

    assert len(said) > len(keys) / 2, "most can be read"
    assert victim in "".join(said)
    for secret in (SECRET, CALLS_SECRET):
        assert secret not in "".join(said)
        assert secret not in system.cli("show", victim, "--json").stdout + system.cli("ls", "--json").stdout
        assert secret not in system.log()


def read_all(client: "redis.Redis", keys: list[str]) -> list[str]:
    """What each of these keys says to who may ask."""
    said = []
    for key in keys:
        for reader in READERS:
            words = (reader if "{}" in reader else reader + " {}").replace("{}", key).split()
            with contextlib.suppress(redis.ResponseError):
                said.append(str(client.execute_command(*words)))
            with contextlib.suppress(redis.ResponseError):
                call = ", ".join(f"'{word}'" for word in words)
                said.append(str(client.eval(f"return redis.call({call})", 0)))
    return said


# -- with what others have signed: without any key, as these are signatures that the host knows -------------


def test_a_signed_spec_is_launched_once(server: RedisServer, clean_keyed: System):
    """Neither the same record again, nor its words under another id, nor other words under its signature."""
    system, client, admin = clean_keyed, server.client("user-alice"), server.admin()
    (one,) = system.run("--env", f"PASSWORD={SECRET}", "--", "true")
    system.wait([one], "terminal", SOON_S)
    system.cli("drain", "test")
    (edited,) = system.run("--env", f"PASSWORD={SECRET}", "--", "sleep", "600")
    (copied,) = system.run("--env", f"PASSWORD={SECRET}", "--", "sleep", "600")
    sealed = admin.get(sealed_key(copied))
    assert sealed
    before = journals(system)

    spec = json.loads(str(client.hget(sandbox_key(edited), "spec")))
    spec["args"] = ["sh", "-c", "echo $PASSWORD"]
    client.hset(sandbox_key(edited), "spec", json.dumps(spec))
    copy = "sb-" + "c" * 16
    raw: Any = client.hgetall(sandbox_key(copied))
    forget = {"id": copy, "state": "queued"}
    client.hset(sandbox_key(copy), mapping={**raw, **forget})
    client.set(sealed_key(copy), str(sealed))
    client.zadd(f"{PREFIX}line:{raw['line']}", {copy: time.time()})
    client.zadd(f"{PREFIX}sandboxes", {copy: time.time()})
    again: Any = client.hgetall(sandbox_key(one))
    client.hset(sandbox_key(one), "state", "queued")
    client.persist(sandbox_key(one))
    client.set(sealed_key(one), str(sealed))
    client.zadd(f"{PREFIX}line:{again['line']}", {one: time.time()})
    client.sadd(f"{PREFIX}lines", raw["line"], again["line"])
    client.delete(sandbox_key(copied), sealed_key(copied))
    system.cli("resume", "test")

    for refused in (edited, copy, one):
        assert system.wait([refused], "terminal", SOON_S) == {refused: "failed"}, refused
        assert system.show(refused)["error"]["stage"] == "place"
    assert journals(system) <= before
