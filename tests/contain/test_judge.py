"""The battery can fail: what the hostile program does on the host itself, the judge sees."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.contain.attack import parse
from tests.contain.judge import difference, machine, snapshot

# Not tried on the host: they act on the machine, whatever folder they are given. The program refuses, too.
LEFT_OUT = {
    "the machine's end or kernel": ("reboot", "kexec-load", "init-module", "finit-module", "delete-module"),
    "its clock and its names": ("settimeofday", "clock-settime", "adjtimex", "sethostname", "setdomainname"),
    "its disks and mounts": ("remount", "swapon", "swapoff", "acct", "quotactl", "pivot-root"),
    "mounts that stay": ("fsopen-tmpfs", "fsopen-proc", "mount-sysfs", "mount-devtmpfs", "mount-cgroup"),
    "other processes": ("ptrace", "process-vm-writev", "proc-1-mem", "setns-net", "setns-pid", "setns-user"),
    "its log": ("syslog-clear", "syslog-read"),
    "what only a privilege shows, and no judge": ("iopl", "ioperm", "bpf", "perf-event-open", "fanotify"),
    "the process alone": ("raise-limits", "raise-priority", "inotify", "unshare"),
}
# What kernels and file systems may lack, by errno.
LACKS = {
    "ioctl-clone": {errno.EOPNOTSUPP, errno.EXDEV},  # ext4, tmpfs
    "file-setattr": {errno.ENOSYS, errno.EOPNOTSUPP},  # Linux 6.17
    "setxattrat": {errno.ENOSYS},  # 6.13
    "removexattrat": {errno.ENOSYS},
    "fchmodat2": {errno.ENOSYS},  # 6.6
    "uring-open-trunc": {errno.ENOSYS, errno.EPERM},  # kernel.io_uring_disabled
    "uring-open-write": {errno.ENOSYS, errno.EPERM},
    "uring-unlink": {errno.ENOSYS, errno.EPERM},
    "device-disk": {errno.EPERM, errno.ENXIO},  # a cgroup of devices; a file system without a disk
    "mount-disk": {errno.EPERM, errno.ENXIO, errno.ENOTBLK, errno.EINVAL, errno.EBUSY},
    "device-memory": {errno.EPERM, errno.ENXIO},  # a kernel without /dev/mem
    "remount-userns": {
        errno.EPERM,
        errno.ENOSPC,
        errno.EROFS,
    },  # a user namespace may not undo what it was given
}


def came_of(hostile, folder, name, *, read_only=False):
    """What the program says of an attempt on a bait of its own, all its words, and what the judge says."""
    bait = hostile.bait(folder / name)
    try:
        before = snapshot(bait.folder)
        text = hostile.natively(bait.folder, name, read_only=read_only)
        changed = difference(before, snapshot(bait.folder)) + bait.heard()
        return parse(text)[str(bait.folder)][name], text, changed
    finally:
        bait.close()
        shutil.rmtree(bait.folder)


def lacks(name, result):
    return getattr(errno, result, 0) in LACKS.get(name, ())


@pytest.fixture
def folder(hostile):
    """One that every user may enter: a program drops its rights, and then looks."""
    made = hostile.folder / "baits"
    made.mkdir()
    yield made
    shutil.rmtree(made)


def test_every_attempt_is_of_a_kind_or_left_out(hostile):
    left_out = [name for names in LEFT_OUT.values() for name in names]
    assert sorted(left_out) == sorted({*hostile.of_kind("MO")} - {"read", "read-hidden"})
    assert {*LACKS} <= {*hostile.kinds}
    assert not {"C", "R", "N", "W", "M", "O"} - {*hostile.kinds.values()}


def test_what_changes_files_natively_is_seen(hostile, folder):
    missed = {}
    for name in hostile.of_kind("C"):
        result, _, changed = came_of(hostile, folder, name)
        if not lacks(name, result) and (result != "done" or not changed):
            missed[name] = result, changed
    assert missed == {}


def test_what_no_kernel_allows_changes_nothing(hostile, folder):
    for name in hostile.of_kind("N"):
        result, _, changed = came_of(hostile, folder, name)
        assert result != "done", name
        assert [word for word in changed if "atime" not in word] == [], name


def test_a_read_only_mount_is_made_writable_by_root_and_that_is_seen(hostile, folder):
    result, _, changed = came_of(hostile, folder, "open-write", read_only=True)
    assert (result, changed) == ("EROFS", [])
    missed = {}
    for name in hostile.of_kind("W"):
        result, _, changed = came_of(hostile, folder, name, read_only=True)
        if not lacks(name, result) and (result != "done" or not changed):
            missed[name] = result, changed
    assert missed == {}


def test_what_reads_the_secret_natively_prints_it(hostile, folder):
    missed = {}
    for name in hostile.of_kind("R"):
        result, text, heard = came_of(hostile, folder, name)
        shows = hostile.token in text or name.startswith(("device-", "setuid-")) or "fifo" in str(heard)
        if not lacks(name, result) and (result != "done" or not shows):
            missed[name] = result, text
    assert missed == {}


def test_even_a_read_is_seen(hostile, folder):
    """By the time of the last access, which mounts that take no write leave alone."""
    result, _, changed = came_of(hostile, folder, "read")
    assert result == "done"
    assert len(changed) == 1
    assert "/mine: atime_ns" in changed[0]
    assert came_of(hostile, folder, "read", read_only=True)[2] == []


def test_locks_of_another_process_are_seen(hostile, folder):
    bait = hostile.bait(folder / "hold")
    with hostile.running("hold", str(bait.folder)):
        assert len(bait.locks()) >= 1
    assert bait.locks() == []
    bait.close()


def test_the_machine_is_as_it_was_where_nobody_touches_it():
    assert difference(machine(), machine()) == []
    assert os.uname().nodename in str(machine()["the machine"])


def test_a_changed_sysctl_is_seen():
    path = Path("/proc/sys/fs/lease-break-time")
    was, before = path.read_text(), machine()
    try:
        path.write_text(f"{int(was) + 1}\n")
        changed = difference(before, machine())
    finally:
        path.write_text(was)
    assert len(changed) == 1
    assert changed[0].startswith("sysctl fs/lease-break-time: value was")
