"""The users of the broker that `sandbatch keys` writes: all that sandbatch does is allowed, and no more."""

import json
import subprocess
import sys

import pytest
import redis

from tasks.metrics import Broker
from tests.host.redis_server import RedisServer
from tests.host.system import SERVER, System
from tests.host.test_flower import LOGIN, free_port, status
from worker.settings import Settings


def test_a_whole_life_needs_no_more_than_the_users_may(server: RedisServer, clean_keyed: System, tmp_path):
    """TLS, logins and keys as they are written; whatever were denied would be in ACL LOG."""
    system = clean_keyed
    port, log = free_port(), system.folder / "flower.log"
    argv = [sys.executable, "-m", "cli", "flower", "--port", str(port)]
    env = {**system.environment, **server.env("flower"), "FLOWER_BASIC_AUTH": LOGIN}
    env.pop("SANDBATCH_SIGNING_KEY")
    with log.open("wb") as out:
        flower = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        (one,) = system.run("--env", "WORD=secret", "--label", "a=b", "--wait", *SERVER)
        assert system.show(one)["state"] == "running"
        url = f"http://127.0.0.1:{port}"
        system.wait_until(
            lambda: status(f"{url}/api/workers?refresh=1", LOGIN) == 200, 30, "answer of Flower"
        )
        assert status(f"{url}/api/queues/length", LOGIN) == 200
        assert system.cli("exec", "--env", "A=1", one, "--", "sh", "-c", "echo $WORD").stdout == "secret\n"
        (tmp_path / "file").write_text("text")
        system.cli("cp", str(tmp_path / "file"), f"{one}:/tmp/file")
        system.cli("logs", one)
        for words in ("hosts", "drain test --why tests", "resume test", "images", "batches", "ls --all"):
            system.cli(*words.split())
        specs = [{"args": ["sleep", "600"]}] * 3
        (tmp_path / "batch.json").write_text("".join(json.dumps(spec) + "\n" for spec in specs))
        batch = system.cli("batch", "--max-in-flight", "2", str(tmp_path / "batch.json")).stdout.split()[0]
        system.wait_until(
            lambda: sum(row["state"] == "running" for row in system.ls().values()) == 3, 30, "two of a batch"
        )
        system.cli("cancel", batch)
        system.cli("stop", "--time", "1", one)
        system.cli("rm", one)
        done = system.cli("image", "prune", "--older-than", "7d", check=False)
        assert "permission" not in done.stderr
        system.cli("pull", "oci:/nowhere", "--all-hosts", check=False)
        system.wait_until(lambda: status(f"{url}/api/tasks", LOGIN) == 200, 30, "tasks in Flower")
    finally:
        flower.terminate()
        flower.wait(20)
    assert server.denied() == []
    words = system.log() + log.read_text()
    assert "NOPERM" not in words
    assert "permission" not in words


def test_a_worker_with_metrics_may_ask_what_it_tells(server: RedisServer):
    """How long the lines are, and its own queues: with its login, and with what /metrics asks."""
    admin = server.admin()
    admin.sadd("sandbatch:lines", "of-a-test")
    admin.zadd("sandbatch:line:of-a-test", {"sb-1": 1})
    settings = {
        name.removeprefix("SANDBATCH_").lower(): value for name, value in server.env("host-test").items()
    }
    answer = Broker(Settings(**{**settings, "host": "test"})).ask()
    admin.delete("sandbatch:line:of-a-test")
    admin.srem("sandbatch:lines", "of-a-test")
    assert answer == (1, 0)
    assert server.denied() == []


FORBIDDEN = {
    "cli": (
        *("KEYS *", "SCAN 0", "MONITOR", "CONFIG GET *", "ACL LIST", "FLUSHALL", "INFO"),
        *("CLIENT LIST", "SHUTDOWN", "DUMP sandbatch:sealed:x", "COPY sandbatch:sealed:x sandbatch:sb:x"),
        *("GET sandbatch:sealed:x", "SET sandbatch:sealed:x a GET", "GET sandbatch:taken:x"),
        *("SET sandbatch:taken:x a", "DEL sandbatch:taken:x", "LRANGE sandbatch:mq:host.test 0 -1"),
        *(
            "LPOP sandbatch:mq:launch",
            "XRANGE sandbatch:host:test:calls - +",
            "HGETALL sandbatch:mq:unacked.test",
        ),
        *("XREAD STREAMS sandbatch:host:test:calls 0", "HSET sandbatch:mq:unacked.test a b", "GET elsewhere"),
        *(
            "RPUSH sandbatch:foreign:test a",
            "PUBLISH sandbatch:mq:/0.celery.pidbox a",
            "SET sandbatch:epoch a",
            "HSET sandbatch:batch:b:images a b",
        ),
    ),
    "flower": (
        *("KEYS *", "GET sandbatch:sb:x", "HGETALL sandbatch:sb:x", "GET sandbatch:sealed:x"),
        *("LPUSH sandbatch:mq:launch a", "LPUSH sandbatch:mq:host.test a", "BRPOP sandbatch:mq:launch 1"),
        *("LRANGE sandbatch:mq:launch 0 -1", "XADD sandbatch:host:test:calls * a b", "SET sandbatch:sb:x a"),
    ),
    "worker": ("KEYS *", "CONFIG GET *", "MONITOR", "ACL LIST", "FLUSHALL", "SHUTDOWN", "GET elsewhere"),
}


@pytest.mark.parametrize("user", sorted(FORBIDDEN))
def test_what_no_part_of_sandbatch_needs_is_denied(server: RedisServer, user: str):
    """As a command, and within a script."""
    folder = {"cli": "user-alice", "worker": "host-test", "flower": "flower"}[user]
    client = server.client(folder)
    for line in FORBIDDEN[user]:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*line.split())
        call = ", ".join(f"'{word}'" for word in line.split())
        with pytest.raises(redis.ResponseError, match=r"ACL failure|can't (run|access)|not allowed from"):
            client.eval(f"return redis.call({call})", 0)
    server.denied()


def test_a_broker_that_is_not_the_fleets_gets_no_password(server: RedisServer, clean_keyed: System, tmp_path):
    """Its certificate is looked at before anything is said."""
    RedisServer.make_keys_in(tmp_path / "fleet", "--broker", "127.0.0.1", "--users", "mallory")
    system = clean_keyed

    system.env["SANDBATCH_BROKER_CA"] = str(tmp_path / "fleet" / "ca.crt")
    try:
        done = system.cli("ls", check=False)
    finally:
        system.env |= server.env("user-alice")

    assert done.returncode == 1
    assert "certificate" in done.stderr.lower()


def test_doctor_knows_the_keys_of_a_host(server: RedisServer, clean_keyed: System):
    clean_keyed.env |= server.env("host-test")
    try:
        rows = {row["name"]: row for row in json.loads(clean_keyed.cli("doctor", "--json").stdout)}
    finally:
        clean_keyed.env = dict(server.env("user-alice"))
    assert rows["keys"]["version"] == "host-test"
    assert rows["broker CA"]["ok"]
