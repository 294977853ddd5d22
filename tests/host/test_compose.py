"""docker-compose.yml for real: Docker's own compose on podman, images from a base that is made here.

The host of the containers is a box: what they share with their host, /run, /var/lib, network and
processes, is the box's, so this machine's own sandboxes do not see them.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.conftest import lack
from tests.host.machine import difference, snapshot
from tests.hosts.box import Box, begin_box, finish_box
from worker import limits, setup

REPO = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parents[1] / "compose"  # `make test-host` puts them there
SECRETS = {"SANDBATCH_BROKER_PASSWORD": "a1b2c3", "FLOWER_BASIC_AUTH": "admin:d4e5f6"}
BASE, IMAGE, BROKER = (f"localhost/sandbatch-{name}" for name in ("base", "test", "broker"))
CGROUP_PARENT = f"sandbatch-compose-{os.getpid()}"
SOCKET = "/run/podman.sock"
# /run is a shared mount, as systemd makes it; what compose makes in /etc and /opt is the box's.
BOOT = """
mount -t tmpfs tmpfs /run
mount --make-rshared /run
mkdir -m 755 /run/netns /run/lock
cd "$BOX_FOLDER"
mkdir -p var-lib etc etc-work opt opt-work
mount --bind var-lib /var/lib
for one in etc opt; do mount -t overlay -o lowerdir=/$one,upperdir=$one,workdir=$one-work overlay /$one; done
"""
BROKER_FILE = f"""FROM {BASE}
RUN apt-get update && apt-get install -y --no-install-recommends valkey-server valkey-tools
RUN printf '#!/bin/sh\\nexec "$@"\\n' > /usr/local/bin/docker-entrypoint.sh && \\
    chmod 755 /usr/local/bin/docker-entrypoint.sh
"""
CONFIG = f"""[network]
network_backend = "netavark"
[engine]
lock_type = "file"
helper_binaries_dir = ["{PROGRAMS}"]
init_path = "{PROGRAMS}/catatonit"
"""
# This machine's way to the package index, which may be by a proxy of its own.
HOSTS_OWN = {
    Path("/etc/pip.conf"): "etc/pip.conf",
    Path("/etc/ssl/certs/ca-certificates.crt"): "usr/local/share/ca-certificates/host.crt",
}

pytestmark = pytest.mark.timeout(400)  # with the images


class Stack:
    """podman with folders of its own, and in a box the services of docker-compose.yml."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "box").mkdir()
        (folder / "tmp").mkdir()
        (folder / "containers.conf").write_text(CONFIG)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SANDBATCH_")},
            **SECRETS,
            "SANDBATCH_HOST": "boxed",
            "SANDBATCH_BROKER_IMAGE": BROKER,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder / "tmp"),
            "DISABLE_HC_SYSTEMD": "true",  # health is asked for by `start`: there is no systemd in a box
            "DOCKER_HOST": f"unix://{SOCKET}",
        }
        self.podman = [
            "podman",
            *(f"--{name}={folder / name}" for name in ("root", "runroot", "tmpdir")),
            f"--network-config-dir={folder / 'networks'}",
            *("--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=none"),
            "--storage-driver=overlay",
        ]
        hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1] for name in
                ("nofile", "nproc")}  # fmt: skip
        worker = {
            "image": IMAGE,
            "environment": {"SANDBATCH_CGROUP_PARENT": CGROUP_PARENT, "SANDBATCH_SLOTS": "2"},
            # A machine's own limits may be lower than what is asked for, and only more privilege raises them.
            "ulimits": {
                "nofile": min(65536, hard["nofile"]) if hard["nofile"] > 0 else 65536,
                "nproc": hard["nproc"],
            },
        }
        override = {"services": {"worker": worker, "flower": {"image": IMAGE}}}
        (folder / "override.yml").write_text(yaml.safe_dump(override))
        self.box: Box | None = None

    def make_images(self) -> None:
        """The project's own Dockerfile, on a Debian from this machine's mirror; and a broker beside it."""
        root = self.folder / "debian"
        (root / "usr/local/share/ca-certificates").mkdir(parents=True)
        self._make("debootstrap", "--variant=minbase", setup.SUITE, str(root), setup._mirror())
        for path, place in HOSTS_OWN.items():
            if path.is_file():
                shutil.copy2(path, root / place)
        archive = self.folder / "debian.tar"
        self._make("tar", "-C", str(root), "-cf", str(archive), ".")
        self._make(*self.podman, "import", str(archive), BASE)
        archive.unlink()
        shutil.rmtree(root)
        (self.folder / "empty").mkdir()
        (self.folder / "Broker").write_text(BROKER_FILE)
        build = (*self.podman, "build", "--isolation=chroot", "--network=host")
        self._make(*build, f"--build-arg=BASE={BASE}", f"--tag={IMAGE}", str(REPO))
        self._make(*build, f"--tag={BROKER}", f"--file={self.folder / 'Broker'}", str(self.folder / "empty"))

    def _make(self, *argv: str) -> None:
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv[:3]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    # -- in the box ----------------------------------------------------------------------------------

    def boot(self) -> None:
        log = self.folder / "box.log"
        self.box = finish_box("boxed", begin_box("boxed", BOOT, log, BOX_FOLDER=str(self.folder / "box")))
        argv = (*self.podman, "system", "service", "--time=0", f"unix://{SOCKET}")
        self.box.spawn(*argv, log=self.folder / "podman.log", env=self.environment)
        wait_until(self.box.path(SOCKET).exists, 20, "podman's socket")

    def run(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        assert self.box is not None
        return self.box.run(*argv, env=self.environment, check=check, timeout_s=150)

    def compose(self, *args: str) -> str:
        files = ("-f", str(REPO / "docker-compose.yml"), "-f", str(self.folder / "override.yml"))
        return self.run(
            str(PROGRAMS / "docker-compose"), "--project-directory", str(REPO), *files, *args
        ).stdout

    def start(self) -> None:
        """One command, and the health check beside it that systemd's timer would run."""
        assert self.box is not None
        health = " ".join((*self.podman, "healthcheck", "run", "sandbatch-broker-1"))
        script = f"for i in $(seq 60); do {health} && exit; sleep 0.5; done; exit 1"
        beside = self.box.spawn("sh", "-c", script, log=self.folder / "health.log", env=self.environment)
        self.compose("up", "--detach", "--no-build")
        assert beside.wait(60) == 0
        wait_until(lambda: '"live"' in self.sandbatch("hosts", "--json"), 60, "the worker's heartbeat")

    def sandbatch(self, *args: str) -> str:
        return self.compose("exec", "-T", "worker", "sandbatch", *args)

    def flower(self, *headers: str) -> str:
        """The HTTP status of Flower's page."""
        code = ("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}")
        return self.run(*code, *headers, "http://127.0.0.1:5555/").stdout

    def left(self) -> list[str]:
        """What the host has of sandboxes."""
        assert self.box is not None
        places = [
            ("/run/netns", "sb-*"),
            ("/var/lib/sandbatch/sandboxes", "*"),
            ("/run/sandbatch/runsc", "sb-*"),
        ]
        places += [("/var/lib/cni/results", "*"), ("/var/lib/cni/networks", "*/10.*")]
        found = [str(path) for folder, what in places for path in self.box.path(folder).glob(what)]
        found += [line for line in self.run("iptables-save").stdout.splitlines() if "sb-" in line]
        links = json.loads(self.run("ip", "-j", "link").stdout)
        found += [one["ifname"] for one in links if one.get("master") == "sandbatch0"]
        found += [str(path) for path in limits.list_cgroups([CGROUP_PARENT])]
        return found + [
            line for line in self.run("ps", "axo", "args").stdout.splitlines() if line.startswith("runsc")
        ]

    def remove_box(self) -> None:
        """Its power goes, and what it had on its disk."""
        if self.box is not None:
            # Of a test that failed: the next one begins without its containers and their volume.
            self.run(*self.podman, "rm", "--all", "--force", "--time=0", check=False)
            self.run(*self.podman, "volume", "rm", "--all", "--force", check=False)
            self.box.kill()
            self.box = None
        shutil.rmtree(self.folder / "box")
        (self.folder / "box").mkdir()

    def remove(self) -> None:
        self.remove_box()
        for folder in limits.list_cgroups([CGROUP_PARENT]):
            folder.rmdir()
        for tree in limits.trees():
            with suppress(FileNotFoundError):
                (tree.mount / CGROUP_PARENT).rmdir()
        # podman knows how to remove what its storage has mounted.
        subprocess.run([*self.podman, "rmi", "--all", "--force"], env=self.environment, capture_output=True)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def images(host_parts: None) -> Iterator[Stack]:
    """The images, made once."""
    needed = [name for name in ("podman", "runc", "debootstrap", "curl", "ps") if shutil.which(name) is None]
    needed += [name for name in ("docker-compose", "netavark", "aardvark-dns", "catatonit")
               if not (PROGRAMS / name).is_file()]  # fmt: skip
    if needed:
        lack(f"this machine lacks {', '.join(needed)}: run make test-host as root")
    before = snapshot()
    with tempfile.TemporaryDirectory(
        prefix="pod", ignore_cleanup_errors=True
    ) as folder:  # podman: short paths
        stack = Stack(Path(folder))
        try:
            stack.make_images()
            yield stack
        finally:
            stack.remove()
    assert difference(before, snapshot()) == {}


@pytest.fixture
def stack(images: Stack) -> Iterator[Stack]:
    """The services are up, on a host that was just switched on."""
    images.boot()
    try:
        images.start()
        yield images
    finally:
        images.remove_box()


def test_one_command_gives_a_worker_that_launches_and_leaves_nothing(stack: Stack) -> None:
    """A real sandbox on a real network; `down` with living sandboxes; the record outlives all containers."""
    assert (stack.flower(), stack.flower("--user", "admin:wrong")) == ("401", "401")
    assert stack.flower("--user", SECRETS["FLOWER_BASIC_AUTH"]) == "200"
    server = ("--cwd", "/usr", "--ready", "http:8000/", "--", "python3", "-m", "http.server", "8000")
    stack.sandbatch("run", "--wait", "--count", "2", *server)
    rows = json.loads(stack.sandbatch("ls", "--json"))
    assert [row["state"] for row in rows] == ["running", "running"]
    assert "python3" in stack.run("curl", "-sS", f"http://{rows[0]['ip']}:8000/bin/").stdout
    assert stack.left() != []  # or the look at the end would prove nothing
    assert json.loads(stack.sandbatch("audit", "--json")) == []

    stack.compose("down")
    assert stack.left() == []

    stack.start()
    rows = json.loads(stack.sandbatch("ls", "--json"))
    assert [row["state"] for row in rows] == ["exited", "exited"]
    assert json.loads(stack.sandbatch("audit", "--json")) == []
    stack.compose("down", "--volumes")
    assert json.loads(stack.run(*stack.podman, "ps", "--all", "--format=json").stdout or "[]") == []


def test_what_a_killed_container_left_the_next_one_undoes(stack: Stack) -> None:
    """Power, or `docker kill`: its sandboxes died with it, and what they held is on the host."""
    stack.sandbatch("run", "--wait", "--", "sleep", "600")
    stack.compose("kill", "worker")
    assert stack.left() != []
    stack.start()
    wait_until(lambda: stack.left() == [], 30, "the undo")
    [row] = json.loads(stack.sandbatch("ls", "--json"))
    assert row["state"] == "failed"
    assert json.loads(stack.sandbatch("audit", "--json")) == []
    stack.compose("down", "--volumes")
