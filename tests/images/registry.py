"""A registry of the test's own: Debian's docker-registry on a port of the loopback, with its log."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

START_S = 15.0
REQUEST = re.compile(r'"(?P<method>[A-Z]+) (?P<path>/\S*) HTTP/[0-9.]+" (?P<status>[0-9]{3}) ')
USER, PASSWORD = "reader", "secret"
HTPASSWD = f"{USER}:$2b$04$PeR0dfDQJi9u6ubOiscyLO3w1RATuborMiomz4Vo4A7krrb8Asyh2\n"  # bcrypt of PASSWORD
CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
AUTH = "auth: {{htpasswd: {{realm: tests, path: {path}}}}}\n"


class Request(NamedTuple):
    method: str
    path: str
    status: int


class Registry:
    """One process with its log; several may have the same `storage`. `stop` and `start` keep the port."""

    def __init__(self, folder: Path, storage: Path, *, with_login: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.storage = storage
        self._log, self._config = folder / "access.log", folder / "config.yml"
        self._errors = folder / "errors.log"
        self._seen = 0
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        text = CONFIG.format(storage=storage, port=self.port)
        if with_login:
            (folder / "htpasswd").write_text(HTPASSWD)
            text += AUTH.format(path=folder / "htpasswd")
        self._config.write_text(text)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, and return once it answers."""
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            argv = [str(program()), "serve", str(self._config)]
            self._process = subprocess.Popen(argv, stdout=log, stderr=errors, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, f"the registry ended: {self._errors.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "the registry does not answer"
            time.sleep(0.02)  # it tells nobody that it listens
        self.forget()

    def stop(self) -> None:
        """End it at once, in the middle of whatever it serves."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """From here on count anew."""
        self._seen = self._log.stat().st_size

    def requests(self) -> list[Request]:
        """What it was asked for since `forget`, by its own log; its line comes once a request has ended."""
        with self._log.open("rb") as log:
            log.seek(self._seen)
            text = log.read().decode(errors="replace")
        return [Request(m["method"], m["path"], int(m["status"])) for m in REQUEST.finditer(text)]

    def gets(self, part: str) -> list[str]:
        """The paths with `part` in them of the GETs that it has answered with content."""
        return [
            path
            for method, path, status in self.requests()
            if (method, status) == ("GET", 200) and part in path
        ]

    def push(self, layout: Path, tag: str, name: str) -> str:
        """Give an image of an OCI layout a name here, such as `team/app:1`; the reference."""
        reference = f"{self.address}/{name}"
        copy(f"oci:{layout}:{tag}", f"docker://{reference}", "--dest-tls-verify=false")
        return reference

    def digest(self, name: str, tag: str) -> str:
        """What the tag leads to now."""
        kinds = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
        asked = urllib.request.Request(
            f"http://{self.address}/v2/{name}/manifests/{tag}", headers={"Accept": kinds}, method="HEAD"
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            return str(answer.headers["Docker-Content-Digest"])

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # it wants a login
        except OSError:
            return False


def program() -> Path | None:
    """docker-registry: of this machine, or what `make test-host` has put beside our Python."""
    found = shutil.which("docker-registry") or shutil.which(
        "docker-registry", path=Path(sys.executable).parent
    )
    return Path(found) if found else None


def copy(source: str, target: str, *flags: str) -> None:
    argv = ["skopeo", "copy", "--quiet", *flags, source, target]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def registries_conf(file: Path, *addresses: str, mirror: str = "") -> Path:
    """A registries.conf for registries without TLS; `mirror` is asked for docker.io, where nobody is."""
    text = "".join(f'[[registry]]\nlocation = "{one}"\ninsecure = true\n' for one in addresses)
    if mirror:
        text += (
            '[[registry]]\nprefix = "docker.io"\nlocation = "nobody.invalid"\n'
            f'[[registry.mirror]]\nlocation = "{mirror}"\ninsecure = true\n'
        )
    file.write_text(text)
    return file


@contextlib.contextmanager
def serving(registry: Registry) -> Iterator[Registry]:
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()
