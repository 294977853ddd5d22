"""Binds, tmpfs and writable roots in real sandboxes, and what is left of them on the host: nothing."""

import hashlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.host.conftest import SUBNETS
from tests.host.machine import copy_program, difference, snapshot
from tests.host.system import System
from worker import conmon
from worker.runsc import Runsc
from worker.settings import Settings

ENDS = "; echo the end; sleep 1000"


@pytest.fixture(scope="module")
def system(host_parts, tmp_path_factory):
    """A host that allows binds of one folder, and one folder of root file systems."""
    before = snapshot()
    made = System(tmp_path_factory.mktemp("system"), next(SUBNETS))
    for name in ("allowed", "roots"):
        (made.folder / name).mkdir()
    made.env |= {
        "SANDBATCH_MOUNT_ALLOW": json.dumps([str(made.folder / "allowed")]),
        "SANDBATCH_ROOTFS_ALLOW": json.dumps([str(made.folder / "roots")]),
        "SANDBATCH_ALLOW_FAULTS": "1",
    }
    made.start()
    yield made
    made.remove()
    assert difference(before, snapshot()) == {}


@pytest.fixture
def allowed(system):
    """The folder whose content may be bound, with something in it."""
    folder = system.folder / "allowed"
    (folder / "data/sub").mkdir(parents=True, exist_ok=True)
    (folder / "data/file").write_text("from the host\n")
    (folder / "conf").write_text("a file of its own\n")
    return folder


@pytest.fixture(scope="module")
def limits(system):
    """Whether this runsc can hold a writable root to a size."""
    settings = Settings(run_dir=system.run_dir, runsc=os.environ.get("SANDBATCH_RUNSC", ""))
    return Runsc.from_settings(settings, hides_sysctl=False).limits_overlay


def start(system: System, script: str, *options: str, program: str = "sh") -> str:
    [container_id] = system.run(*options, "--", program, "-c", f"{{\n{script}\n}} 2>&1{ENDS}")
    return container_id


def said(system: System, container_id: str) -> list[str]:
    """What the script printed."""
    states = system.wait([container_id], "running")
    assert states == {container_id: "running"}, system.show(container_id)["error"]
    log_path = system.sandboxes / container_id / "container.log"

    def lines() -> list[str]:
        return conmon.tail_log(log_path, lines=200).splitlines()

    system.wait_until(lambda: "the end" in lines()[-1:], 10, f"end of the script: {lines()}")
    return lines()[:-1]


def tree_of(folder: Path) -> str:
    """A digest of all that a folder holds: names, kinds, modes, times, links and bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        digest.update(f"{path} {found.st_mode} {found.st_mtime_ns} {found.st_ctime_ns}".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def test_a_bind_shows_what_the_host_has_and_takes_no_write(clean_system, allowed):
    """Folders and files, on mount points that the generated root has and that it is given."""
    script = """
    cat /data/file /etc/host.conf /opt/deep/conf; ls /data
    for path in /data/new /data/file /etc/host.conf /opt/deep/conf; do
      (echo x >$path) 2>/dev/null && echo written $path; rm $path 2>/dev/null && echo removed $path
    done; true
    """
    one = start(
        clean_system,
        script,
        *("-v", f"{allowed}/data:/data", "-v", f"{allowed}/conf:/etc/host.conf:ro"),
        *("-v", f"{allowed}/conf:/opt/deep/conf", "--cwd", "/data"),
    )
    assert said(clean_system, one) == [
        "from the host",
        "a file of its own",
        "a file of its own",
        "file",
        "sub",
    ]
    assert sorted(path.name for path in allowed.rglob("*")) == ["conf", "data", "file", "sub"]


def test_what_may_not_be_bound_is_refused_before_anything_is_made(clean_system, allowed):
    (allowed / "out").symlink_to("/etc")
    (allowed / "in").symlink_to("data")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(allowed / "socket"))
    refused = {
        "/etc:/data": "not below an allowed folder",
        f"{allowed}/out:/data": "not below an allowed folder",
        f"{allowed}/../allowed/data:/data": "without '..'",
        f"{allowed}/socket:/data": "socket",
        f"{allowed}/data:/data": f"{allowed}/data/sub is mounted below it",
        f"{allowed}/data/sub:/proc/x": "/proc, /sys or /dev",
        f"{allowed}/data/sub:/usr/no/such/folder": "make it there: mkdir -p",
    }
    subprocess.run(["mount", "-t", "tmpfs", "none", allowed / "data/sub"], check=True)
    before = clean_system.ls()
    try:
        for volume, words in refused.items():
            done = clean_system.cli("run", "-v", volume, "--", "true", check=False)
            assert done.returncode == 2, volume
            assert words in done.stderr, volume
    finally:
        subprocess.run(["umount", allowed / "data/sub"], check=True)
    assert clean_system.ls() == before
    one = start(clean_system, "cat /data/file", "-v", f"{allowed}/in:/data")
    assert said(clean_system, one) == ["from the host"]
    for name in ("out", "in", "socket"):
        (allowed / name).unlink()


def test_the_host_has_the_last_word(clean_system, allowed, tmp_path):
    """A client with other settings, or a link that was put in place meanwhile: failed, and all undone."""
    clean_system.env["SANDBATCH_MOUNT_ALLOW"] = '["/"]'
    try:
        [one] = clean_system.run("-v", f"{tmp_path}:/data", "--", "true")
    finally:
        clean_system.env["SANDBATCH_MOUNT_ALLOW"] = json.dumps([str(allowed)])
    assert clean_system.wait([one], "terminal") == {one: "failed"}
    shown = clean_system.show(one)
    assert shown["error"]["stage"] == "bundle"
    assert "not below an allowed folder" in shown["error"]["message"]
    assert clean_system.audit() == []


def test_a_rootfs_of_the_user_needs_its_mount_points_and_is_told_how(clean_system, allowed):
    """It is not ours to write to; runsc would make them in it."""
    root = clean_system.folder / "roots/plain"
    for name in ("sh", "sleep"):
        copy_program(name, root)
    options = ("--rootfs", str(root), "-v", f"{allowed}/conf:/opt/conf")
    done = clean_system.cli("run", *options, "--", "/bin/sh", check=False)
    assert done.returncode == 2
    command = done.stderr.strip().rpartition("make it there: ")[2]
    assert command == f"mkdir -p {root}/opt && touch {root}/opt/conf"
    os.system(command)  # noqa: S605 - what the user was told
    before = tree_of(root)
    one = start(
        clean_system, "read line </opt/conf; echo $line", *options, "--tmpfs", "/work", program="/bin/sh"
    )
    assert said(clean_system, one) == ["a file of its own"]
    assert tree_of(root) == before


def test_a_tmpfs_holds_what_it_may_and_no_more(clean_system, allowed):
    """The parent first, in whatever order they were given; /tmp has the size that was asked for."""
    script = """
    cat /work/in/file; echo x >/work/y && cat /work/y; pwd
    head -c 5000000 /dev/zero >/tmp/x; wc -c </tmp/x
    head -c 5000000 /dev/zero >/new/place/x; wc -c </new/place/x
    """
    one = start(
        clean_system,
        script,
        *("-v", f"{allowed}/data:/work/in", "--tmpfs", "/work", "--cwd", "/work"),
        *("--tmpfs", "/tmp:size=1m", "--tmpfs", "/new/place:size=64k"),
    )
    lines = [line for line in said(clean_system, one) if "No space left" not in line]
    assert lines == ["from the host", "x", "/work", str(2**20), str(2**16)]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_writable_root_is_written_by_one_and_seen_by_nobody_else(clean_system, limits, kind):
    """Two sandboxes of one rootfs write everywhere; the rootfs is as it was, to the last byte and time."""
    if kind == "disk" and not limits:
        done = clean_system.cli("run", "--writable", "disk", "--", "true", check=False)
        assert done.returncode == 2
        assert "cannot limit what it takes of the disk; take a release" in done.stderr
        return
    root = clean_system.folder / f"roots/{kind}"
    for name in ("sh", "sleep"):
        copy_program(name, root)
    (root / "etc").mkdir()
    (root / "etc/motd").write_text("hello\n")
    generated = clean_system.folder / "state/rootfs"
    before = tree_of(root)
    script = """
    [ -e /mine ] && echo of another; echo $$ >/mine; echo changed >/etc/motd; read line </etc/motd; echo $line
    echo x >/bin/new; echo x >/opt 2>/dev/null
    """
    two = [
        start(clean_system, script, "--rootfs", str(root), "--writable", kind, program="/bin/sh")
        for _ in range(2)
    ]
    hosts = start(
        clean_system, "rm -r /etc /var; mkdir /home; ls -d /etc /home 2>&1; touch /usr/x", "--writable", kind
    )
    found = tree_of(generated)
    assert [said(clean_system, one) for one in two] == [["changed"]] * 2
    words = said(clean_system, hosts)
    assert "/home" in words
    assert "Read-only file system" in words[-1]  # the host's programs are no part of its root
    assert tree_of(root) == before
    assert tree_of(generated) == found
    if kind == "disk":
        folder = clean_system.sandboxes / two[0] / "bundle/overlay"
        assert os.listdir(folder) == ["bytes"]  # the file itself has no name: it goes with its sandbox


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_writable_root_is_held_to_its_size(clean_system, limits, kind):
    if not limits:
        done = clean_system.cli("run", "--writable", f"{kind}:4m", "--", "true", check=False)
        assert done.returncode == 2
        assert "cannot limit" in done.stderr
        return
    free = os.statvfs(clean_system.folder)
    one = start(clean_system, "head -c 50000000 /dev/zero >/x; wc -c </x; rm /x", "--writable", f"{kind}:4m")
    words = said(clean_system, one)
    assert "No space left" in words[0]
    assert 3 * 2**20 < int(words[1]) <= 4 * 2**20
    assert free.f_bavail * free.f_frsize - _free(clean_system.folder) < 50_000_000


def test_more_of_the_disk_than_it_has_is_promised_to_nobody(clean_system, limits):
    if not limits:
        return  # such a runsc is given no disk at all: see above
    [one] = clean_system.run("--writable", "disk:900t", "--", "true")
    assert clean_system.wait([one], "terminal") == {one: "failed"}
    assert "MiB are promised" in clean_system.show(one)["error"]["message"]
    assert clean_system.audit() == []


def test_an_overlay_folder_of_nobody_is_found_and_mended(clean_system):
    """As a sandbox would leave it whose journal was lost, with the file that a killed runsc leaves."""
    folder = clean_system.sandboxes / "sb-00000000000000ff/bundle/overlay"
    folder.mkdir(parents=True)
    (folder / "runsc-filestore-1").write_bytes(b"x" * 100)
    assert f"extra overlay {folder}" in clean_system.audit()
    clean_system.cli("audit", "--mend")
    assert clean_system.audit() == []
    assert not folder.parent.parent.exists()


def test_killed_in_between_it_leaves_no_folder_and_unused_roots_go(clean_system, allowed, limits):
    """The next worker undoes, launches anew, and removes the generated roots that no sandbox has."""
    options = ("--writable", "disk:1m" if limits else "memory", "-v", f"{allowed}/data:/kept")
    kept = start(clean_system, "true", *options)
    said(clean_system, kept)
    gone = start(clean_system, "true", "-v", f"{allowed}/data:/gone")
    said(clean_system, gone)
    clean_system.cli("rm", gone)
    clean_system.stop()
    clean_system.start(SANDBATCH_FAULTS="conmon.create.after:kill")
    [one] = clean_system.run(*options, "--", "sleep", "1000")
    clean_system.wait_for_end()
    clean_system.start()
    assert clean_system.wait([one], "running")[one] in ("running", "failed")
    assert clean_system.audit() == []
    clean_system.cli("rm", one)
    assert not (clean_system.sandboxes / one / "bundle").exists()
    rootfs = clean_system.folder / "state/rootfs"
    made = [path for path in rootfs.iterdir() if path.is_dir()]
    assert any((path / "kept").is_dir() for path in made)
    assert not any((path / "gone").exists() for path in made)
    assert clean_system.show(kept)["state"] == "running"


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
