"""What a sandbox may do: the least, looked at from inside; and who may read its files on the host."""

import json
import os
import stat
from pathlib import Path

from tests.host.conftest import System
from worker.bundle import MASKED, READ_ONLY

# The bits of worker.bundle.CAPABILITIES.
LEAST = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 10))
NAMES = "chown dac_override fowner fsetid kill setgid setuid net_bind_service"
LOOK = """
import ctypes, json, os, resource, socket, stat
def attempt(act):
    try:
        act()
        return "done"
    except OSError as error:
        return error.strerror
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "caps": {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")},
    "no_new_privs": libc.prctl(39, 0, 0, 0, 0),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "nproc": resource.getrlimit(resource.RLIMIT_NPROC),
    "root": attempt(lambda: write("/x", "")),
    "mount": attempt(lambda: call("mount", b"x", b"/tmp", b"tmpfs", 0, None)),
    "device": attempt(lambda: (os.mknod("/tmp/sda", stat.S_IFBLK, os.makedev(8, 0)), open("/tmp/sda"))),
    "chroot": attempt(lambda: os.chroot("/tmp")),
    "raw": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    "sysrq": attempt(lambda: write("/proc/sysrq-trigger", "b")),
    "hostname": attempt(lambda: socket.sethostname("x")),
    "forward": attempt(lambda: write("/proc/sys/net/ipv4/ip_forward", "0")),
    "held": {path: sorted(os.listdir(path)) if os.path.isdir(path) else "file"
             for path in MASKED if os.path.exists(path)},
}))
"""


def look(system: System, container_id: str, *options: str) -> dict:
    script = f"MASKED = {MASKED!r}\n{LOOK}"
    done = system.cli("exec", *options, container_id, "--", "python3", "-c", script)
    return json.loads(done.stdout)


def test_the_least_from_inside(clean_system):
    """Of what podman masks and makes read-only gVisor has nothing of the host's."""
    (container_id,) = clean_system.run("--wait", "--", "sleep", "600")
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    before = forward.read_text(), os.uname().nodename

    found = look(clean_system, container_id)

    assert found["caps"] == {"CapInh": 0, "CapPrm": LEAST, "CapEff": LEAST, "CapBnd": LEAST}, NAMES
    assert found["no_new_privs"] == 1
    assert found["nofile"] == [65536, 65536]
    assert found["nproc"] == [1024, 1024]
    refused = {name: found[name] for name in ("mount", "chroot", "raw", "hostname")}
    assert refused == dict.fromkeys(refused, "Operation not permitted")
    assert found["device"] != "done"  # the runsc of 2024 lets it be made, and has nothing behind it
    assert found["root"] == "Read-only file system"
    assert found["sysrq"] == "Input/output error"
    # Empty, or the sentry's account of its own memory.
    assert found["held"] == {"/sys/firmware": [], "/proc/sentry-meminfo": "file"}
    assert (forward.read_text(), os.uname().nodename) == before
    written = json.loads((clean_system.sandboxes / container_id / "bundle" / "config.json").read_text())
    assert written["linux"]["maskedPaths"] == list(MASKED)
    assert written["linux"]["readonlyPaths"] == list(READ_ONLY)


def test_who_is_not_root_inside_has_no_capability_at_all(clean_system):
    (container_id,) = clean_system.run("--wait", "-u", "1000:1000", "--", "sleep", "600")
    found = look(clean_system, container_id)["caps"]
    assert {name: found[name] for name in ("CapInh", "CapPrm", "CapEff")} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
    }


def test_what_others_on_the_host_may_read(clean_system):
    """No journal, config.json, log, socket or lock; and no process leaves a core with secrets in it."""
    clean_system.cli("run", "--wait", "--env", "T=secret", "--", "nosuchprogram", check=False)
    (container_id,) = clean_system.run("--wait", "--env", "T=secret", "--", "sleep", "600")
    folder = clean_system.sandboxes / container_id
    state, run = clean_system.folder / "state", clean_system.run_dir

    for path in (folder / "journal.jsonl", folder / "bundle" / "config.json", run / "runsc.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (folder, folder / "bundle", state / "logs", state / "broker", run / "exits", run / "runsc"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert [path for path in run.iterdir() if path.is_socket() and path.stat().st_mode & 0o077] == []
    locks = [*run.glob("*.lock"), state / "rootfs" / ".lock"]
    assert [path for path in locks if path.stat().st_mode & 0o077] == [], "who may read may lock"
    for path in (*state.rglob("*"), *run.rglob("*")):
        if not path.is_symlink() and "rootfs" not in path.parts:
            assert not path.stat().st_mode & 0o022 or path.is_socket(), path
    sandbox = int((folder / "bundle" / "pid").read_text())
    for pid in (clean_system.worker_pid(), sandbox, clean_system.process.pid):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert limits.split("Max core file size")[1].split()[:2] == ["0", "0"]
    assert b"SANDBATCH" not in Path(f"/proc/{sandbox}/environ").read_bytes()
