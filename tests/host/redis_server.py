"""A real Redis of Debian's, with the users, certificate and settings that `sandbatch keys` has made."""

import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import redis

from tasks.connection import connect
from tests.conftest import lack
from worker.settings import Settings

START_S = 20.0
ADMIN = "an administrator's"  # of the test alone: it looks at ACL LOG
# Debian's package redis-tools has the server, too: one program, that goes by the name it is called by.
PROGRAM = "redis-check-rdb"


class RedisServer:
    """A broker with TLS; `keys` is the folder of `sandbatch keys`."""

    def __init__(self, folder: Path, hosts: str, users: str) -> None:
        self.folder, self.keys = folder, folder / "fleet"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.make_keys("--broker", f"127.0.0.1:{self.port}", "--hosts", hosts, "--users", users)
        self._start()

    def make_keys(self, *args: str) -> None:
        self.make_keys_in(self.keys, *args)

    @staticmethod
    def make_keys_in(folder: Path, *args: str) -> None:
        argv = [sys.executable, "-m", "cli", "keys", str(folder), *args]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def _start(self) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            lack("this machine lacks redis-server: apt-get install redis-tools")
        broker = self.keys / "broker"
        written = (broker / "redis.conf").read_text()
        # As an administrator would, but in a folder of the test's, for this machine alone.
        written = written.replace("/etc/sandbatch-broker", str(broker)).replace(
            "bind * -::*", "bind 127.0.0.1"
        )
        own = f"dir {self.folder}\nunixsocket {self.folder}/admin.sock\nsave \n"
        (self.folder / "redis.conf").write_text(written + own)
        with (broker / "users.acl").open("a") as file:
            file.write(f"user admin on >{ADMIN.replace(' ', '-')} ~* &* +@all\n")
        argv = ["redis-server", str(self.folder / "redis.conf")]
        with (self.folder / "redis.log").open("wb") as log:
            self.process = subprocess.Popen(argv, executable=program, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < deadline, "no answer of redis-server"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return bool(self.admin().ping())
        except redis.ConnectionError:
            return False

    def admin(self) -> "redis.Redis":
        return redis.Redis(
            unix_socket_path=str(self.folder / "admin.sock"),
            username="admin",
            password=ADMIN.replace(" ", "-"),
            decode_responses=True,
            driver_info=None,
        )

    def client(self, who: str) -> "redis.Redis":
        """Connected with the login of these settings."""
        env = {name.removeprefix("SANDBATCH_").lower(): value for name, value in self.env(who).items()}
        return connect(Settings(**env))  # type: ignore[arg-type]

    def denied(self) -> list[str]:
        """What users were denied since the last look, as `user: reason object`."""
        admin = self.admin()
        rows = admin.acl_log(100)
        admin.acl_log_reset()
        return sorted({f"{row['username']}: {row['reason']} {row['object']}" for row in rows})

    def env(self, who: str) -> dict[str, str]:
        """Settings of a `host-NAME`, a `user-NAME` or `flower`: its file, in places of the test."""
        own = self.keys / who
        found = tomllib.loads((own / "sandbatch.toml").read_text())
        for name in ("broker_ca", "signing_key", "trusted_keys"):
            if name in found:
                found[name] = str(own / Path(found[name]).name)
                assert Path(found[name]).exists()
        return {f"SANDBATCH_{name.upper()}": value for name, value in found.items()}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
