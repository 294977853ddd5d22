"""A real broker for the tests of what is kept in it: one a session, empty before each test."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from cli.main import main
from tasks.app import make_app
from tasks.broker import embedded_broker
from tasks.connection import connect
from tasks.record import Record
from worker.journal import boot_id
from worker.settings import Settings

HOST = "here"


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Valkey on a socket of its own, and the settings that name it."""
    folder = tmp_path_factory.mktemp("broker")
    settings = Settings(
        broker_url="",
        host=HOST,
        run_dir=folder / "run",
        state_dir=folder / "state",
        cni_conf_dir=folder / "net.d",
        network="mynet",
        rootfs_allow=(folder / "allowed",),
    )
    for path in (settings.cni_conf_dir, settings.own_cni_conf_dir, folder / "allowed" / "root"):
        path.mkdir(parents=True)
    with embedded_broker(settings):
        yield settings


@pytest.fixture
def client(broker: Settings) -> Iterator["redis.Redis"]:
    """A connection to the broker, which knows nothing yet."""
    with connect(broker) as client:
        client.flushall()
        yield client


@pytest.fixture
def record(client: "redis.Redis") -> Record:
    return Record(client)


@pytest.fixture
def sender(client: "redis.Redis", broker: Settings) -> Iterator[Any]:
    """The Celery app of a command line."""
    with make_app(broker, "client") as app:
        yield app


@dataclass
class CommandLine:
    """`sandbatch`: what it printed and how it ended.

    A call runs within the test's process, as half a second for each would be too much; `process`
    and `python` are what a user runs.
    """

    settings: Settings
    monkeypatch: pytest.MonkeyPatch
    capsys: "pytest.CaptureFixture[str]"

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SANDBATCH_")}
        return {
            **ours,
            "SANDBATCH_RUN_DIR": str(self.settings.run_dir),
            "SANDBATCH_STATE_DIR": str(self.settings.state_dir),
            "SANDBATCH_CNI_CONF_DIR": str(self.settings.cni_conf_dir),
            "SANDBATCH_NETWORK": self.settings.network,
            "SANDBATCH_HOST": self.settings.host,
            "SANDBATCH_ROOTFS_ALLOW": json.dumps([str(path) for path in self.settings.rootfs_allow]),
        }

    def python(self, *args: str | bytes, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            env={**self.environment, **env},
            timeout=60,
            check=False,
        )

    def process(self, *args: str | bytes, **env: str) -> "subprocess.CompletedProcess[str]":
        done = self.python("-m", "cli", *args, **env)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def __call__(self, *args: str | bytes, **env: str) -> "subprocess.CompletedProcess[str]":
        words = [os.fsdecode(one) for one in args]
        with self.monkeypatch.context() as patch:
            for name in os.environ:
                patch.delenv(name)
            for name, value in {**self.environment, **env}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["sandbatch", *words])
            with pytest.raises(SystemExit) as ended:
                main()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), *self.capsys.readouterr())

    def json(self, *args: str) -> Any:
        done = self(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def cli(
    broker: Settings,
    client: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
    capsys: "pytest.CaptureFixture[str]",
) -> CommandLine:
    return CommandLine(broker, monkeypatch, capsys)


@pytest.fixture
def heartbeat(record: Record) -> Any:
    """Say that a host lives; by default it is this machine."""

    def beat(name: str = HOST, **facts: Any) -> None:
        known: dict[str, Any] = {
            "version": "0.2.0",
            "pulls": True,
            "capacity": 10,
            "sandboxes": 0,
            "slots": 4,
        }
        known |= {"networks": ["mynet"], "rootfs_allow": [], "boot_id": boot_id(), **facts}
        record.heartbeat(name, known)

    return beat


def take(record: Record, host: str = "h1", **have: Any) -> list[str]:
    """What a host with this room takes: ids, in order. Networks of the specs: `mynet` and `sandbatch`."""
    room = {"capacity": 100, "slots": 100, "rooms": {"mynet": -1, "sandbatch": -1}}
    return [container_id for container_id, _ in record.take(host, {**room, **have})]
