"""What a sandbox is given stays read-only on the host's side, and nothing of that is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker import procs

# What root of the host can do in a gofer's mounts, where there is no mount(8): remount a bind, which the
# kernel refuses, as the gofer's namespace has its flags locked; or put another mount over it.
BY_HAND = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid, target, source = sys.argv[1:]
tree = libc.syscall(428, -100, source.encode(), 1)  # open_tree, OPEN_TREE_CLONE
assert tree >= 0, os.strerror(ctypes.get_errno())
assert libc.setns(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY), 0x20000) == 0, os.strerror(ctypes.get_errno())
inside = f"/root{target}".encode()
remounted = libc.mount(None, inside, None, 32 | 4096, None)  # MS_REMOUNT | MS_BIND, without MS_RDONLY
print(os.strerror(ctypes.get_errno()) if remounted else "remounted")
assert libc.syscall(429, tree, b"", -100, inside, 4) == 0, os.strerror(ctypes.get_errno())  # move_mount
"""


@pytest.fixture
def given(contained):
    """A folder that may be bound, with a file in it."""
    folder = contained.folder / "allowed/given"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("of the host\n")
    return folder


def gofer_of(system, container_id):
    found = procs.processes_of(system.run_dir / "runsc", container_id)
    [pid] = [one.pid for one in found if one.role == "gofer"]
    return pid


def empty(system, container_id, path):
    done = system.cli("exec", container_id, "--", "sh", "-c", f": > {path}", check=False)
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr


def test_a_mount_that_is_made_writable_by_hand_is_a_finding(clean_contained, given):
    system = clean_contained
    [one] = system.run("--wait", "-v", f"{given}:/data", "--", "sleep", "1000")
    assert system.audit() == []
    gofer = gofer_of(system, one)
    argv = [sys.executable, "-c", BY_HAND, str(gofer), "/data", str(given)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout == "Operation not permitted\n"
    assert system.audit() == [f"writable mount /data of gofer {gofer}"]
    done = system.cli("audit", "--mend", check=False)
    assert done.returncode == 1
    assert "sandbatch rm" in done.stdout
    empty(system, one, "/data/file")
    assert (given / "file").read_text() == "of the host\n"
    system.cli("rm", one)
    assert system.audit() == []


def test_a_worker_warns_once_where_only_its_own_mounts_hold(contained):
    log = (contained.folder / "up.log").read_text()
    is_debians = Path(contained.env["SANDBATCH_RUNSC"]).parent.name == "debian"
    starts = log.count("host test is up;")
    assert starts
    assert log.count("only this worker's read-only mounts") == (starts if is_debians else 0)


def test_it_holds_when_the_worker_is_killed_and_started_again(clean_contained, given):
    system = clean_contained
    [one] = system.run("--wait", "-v", f"{given}:/data", "--", "sleep", "1000")
    system.kill_worker()
    system.start()
    empty(system, one, "/data/file")
    assert (given / "file").read_text() == "of the host\n"
    assert system.audit() == []


def test_no_process_keeps_the_view_but_what_serves_the_sandbox(clean_contained, given):
    """conmon lives in the host's own mounts: else each mount of the host would be copied to every sandbox."""
    system = clean_contained
    before = Path("/proc/self/mountinfo").read_text().count("\n")
    [one] = system.run("--wait", "-v", f"{given}:/data", "--", "sleep", "1000")
    own = os.stat("/proc/self/ns/mnt").st_ino
    roles = {}
    for proc in procs.processes_of(system.run_dir / "runsc", one):
        if os.stat(f"/proc/{proc.pid}/ns/mnt").st_ino != own:
            roles[proc.role] = len(Path(f"/proc/{proc.pid}/mountinfo").read_text().splitlines())
    assert set(roles) == {"gofer", "sandbox"}
    assert max(roles.values()) < 12, "the host's mounts are not among theirs"
    assert Path("/proc/self/mountinfo").read_text().count("\n") == before + 1  # its netns


def test_sandbatchs_own_files_are_no_root_of_a_sandbox(clean_contained):
    """The folder above has journals with what others were given, their logs and sockets."""
    system = clean_contained
    system.stop()
    allowed = system.env["SANDBATCH_ROOTFS_ALLOW"]
    system.env["SANDBATCH_ROOTFS_ALLOW"] = '["/"]'
    try:
        system.start()
        for root in (system.folder, system.folder / "state/rootfs", Path("/"), Path("/sys/kernel")):
            done = system.cli("run", "--rootfs", str(root), "--", "true", check=False)
            assert done.returncode == 2, root
            assert "own files are in" in done.stderr or "is the kernel's" in done.stderr
    finally:
        system.stop()
        system.env["SANDBATCH_ROOTFS_ALLOW"] = allowed
        system.start()
