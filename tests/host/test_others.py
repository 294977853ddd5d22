"""Things that are not ours stay: podman's containers, netns, bridges, rules, leases beside ours."""

import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from tests.host.machine import difference, snapshot
from tests.host.system import SERVER, System

SUBNET = "10.241.0.0/24"
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")  # the host's own may be lower


class Podman:
    """podman with storage, networks and state of its own; containers run busybox's web server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "www"):
            (folder / "rootfs" / name).mkdir(parents=True)
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy2(busybox, folder / "rootfs" / "bin")
        (folder / "rootfs" / "www" / "index.html").write_text("I am podman's\n")
        bridge = {
            "type": "bridge",
            "bridge": "sbtothers",
            "isGateway": True,
            "ipMasq": True,
            "ipam": {"type": "host-local", "subnet": SUBNET, "routes": [{"dst": "0.0.0.0/0"}]},
        }
        (folder / "net.d").mkdir()
        network = {"cniVersion": "0.4.0", "name": "others", "plugins": [bridge]}
        (folder / "net.d" / "others.conflist").write_text(json.dumps(network))

    def __call__(self, *args: str) -> str:
        words = [f"--{name}={self._folder / name}" for name in ("root", "runroot", "tmpdir")]
        words += [
            "--cgroup-manager=cgroupfs",
            "--runtime=runc",
            "--events-backend=none",
            "--storage-driver=vfs",
        ]
        words += [f"--network-config-dir={self._folder / 'net.d'}"]
        done = subprocess.run(["podman", *words, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def launch(self) -> str:
        """A container; its address."""
        command = ("/bin/busybox", "httpd", "-f", "-p", "8000", "-h", "/www")
        rootfs = ("--rootfs", str(self._folder / "rootfs"))
        container_id = self("run", "-d", "--network", "others", *LIMITS, *rootfs, *command)
        return self("inspect", container_id, "--format", "{{.NetworkSettings.Networks.others.IPAddress}}")

    def remove_all(self) -> None:
        self("rm", "--all", "--force", "--time", "0")
        subprocess.run(["ip", "link", "del", "sbtothers"], check=False, capture_output=True)


@pytest.fixture
def podman(unchanged_machine: None) -> Iterator[Podman]:
    with tempfile.TemporaryDirectory(prefix="pod") as folder:  # podman refuses long paths
        made = Podman(Path(folder))
        yield made
        made.remove_all()


def page(address: str) -> bytes:
    content: bytes = urllib.request.urlopen(f"http://{address}:8000/", timeout=5).read()
    return content


def test_podmans_containers_are_untouched_by_launches_ends_kills_and_mends(podman: Podman, make_system):
    """Whatever we do to our own, theirs answer, and no object of theirs is gone or a finding."""
    system: System = make_system()
    theirs = [podman.launch() for _ in range(2)]
    system.start()
    system.run("--wait", *SERVER)
    system.cli("rm", "--all")  # the bridge and the kernel's tables are there from here on
    before = snapshot()

    more: list[str] = []
    beside = Thread(target=lambda: more.extend(podman.launch() for _ in range(4)))
    beside.start()
    ids = system.run("--count", "12", *SERVER)
    system.kill_worker()
    system.start()
    assert set(system.wait(ids, "running", 60).values()) == {"running"}
    beside.join()

    assert [page(one) for one in [*theirs, *more]] == [b"I am podman's\n"] * 6
    assert system.audit() == []
    system.cli("rm", "--all")
    system.cli("audit", "--mend")
    system.stop()
    system.start()
    assert [page(one) for one in [*theirs, *more]] == [b"I am podman's\n"] * 6
    gone = {kind: [line for line in lines if line.startswith("-")] for kind, lines in
            difference(before, snapshot()).items()}  # fmt: skip
    assert not any(gone.values()), gone


def test_netns_bridges_chains_and_leases_of_others_are_untouched(make_system):
    """By hand, of every kind that the audit looks at; beside a running sandbox, a restart and a mend."""
    system: System = make_system()
    system.start()
    (container_id,) = system.run("--wait", *SERVER)
    lease = system.folder / "cni" / "networks" / "bridged" / f"{system.subnet.removesuffix('.0/24')}.200"
    chain = "CNI-0123456789abcdef01234567"
    rule = ("-m", "comment", "--comment", 'name: "other" id: "0123"', "-j", "ACCEPT")
    for argv in (
        ("ip", "netns", "add", "other"),
        ("ip", "link", "add", "sbtother", "type", "bridge"),
        ("iptables", "-t", "nat", "-N", chain),
        ("iptables", "-t", "nat", "-A", chain, *rule),
    ):
        subprocess.run(argv, check=True)
    lease.write_text("0123456789ab\r\neth0")  # another runtime's container on the network that we use
    before = snapshot()
    try:
        system.kill_worker()
        system.start()
        assert system.audit() == []
        system.cli("audit", "--mend")
        assert system.wait([container_id], "running", 15) == {container_id: "running"}
        assert difference(before, snapshot()) == {}
        assert lease.exists()
    finally:
        lease.unlink()
        for argv in (
            ("iptables", "-t", "nat", "-F", chain),
            ("iptables", "-t", "nat", "-X", chain),
            ("ip", "link", "del", "sbtother"),
            ("ip", "netns", "del", "other"),
        ):
            subprocess.run(argv, check=True)
