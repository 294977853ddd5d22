"""What sandboxes are given of the host's files: they can neither change it nor get beyond it."""

import ctypes
import io
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contain.attack import Watch, launch, output, parse, tool
from tests.contain.conftest import make_system, runsc_of
from tests.host.machine import unchanged
from tests.layers import blobs_of, device, layout
from worker import conmon
from worker.probe_runsc import HOLE
from worker.rootfs import host_mounts
from worker.runsc import Runsc
from worker.settings import Settings

LAUNCHES = 20
# In gVisor these do something, to the sandbox alone: its own log, limits of its own.
HARMLESS = {"raise-priority"}
# Of what a writable place takes even from a user inside who is not root.
BASIC = {"open-write", "open-readonly-trunc", "creat", "truncate", "unlink", "rename", "mkdir", "mmap-shared"}


def succeeded(hostile, results, kinds="CNRWM"):
    """Which attempts of these kinds worked."""
    assert set(results) <= set(hostile.kinds)
    return {name for name in hostile.of_kind(kinds) if results.get(name, "") == "done"} - HARMLESS


def done_at(hostile, said, *places):
    """What worked at places where nothing may, in words."""
    assert all(len(said[place]) == len(hostile.kinds) for place in places)
    return [
        f"at {place}: {name} done" for place in places for name in sorted(succeeded(hostile, said[place]))
    ]


def check_writable(hostile, results, basic=BASIC):
    """The same program does change what the sandbox may change, and no more than that."""
    assert basic - succeeded(hostile, results) == set()
    assert succeeded(hostile, results, "RWM") - {"remount-userns"} == set()


@pytest.fixture
def work(clean_contained, hostile):
    """The allowed folder with the program in it; after the test there is nothing else in it."""
    tool(hostile, clean_contained.folder / "allowed/tool")
    yield clean_contained.folder / "allowed"
    clean_contained.clear()
    for folder in ("allowed", "roots"):
        for path in (clean_contained.folder / folder).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture
def host_folders(contained):
    """Folders of the test's own in those of the host that every sandbox of `--rootfs host` has."""
    name = f"sandbatch-contain-{secrets.token_hex(4)}"
    sources = [Path(one["source"]) for one in host_mounts(Settings())]
    made = [(one / "local/share" if one == Path("/usr") else one) / name for one in sources]
    for folder in made:
        folder.mkdir()
    yield made
    for folder in made:
        shutil.rmtree(folder)


def test_host_rootfs_binds_and_names(clean_contained, hostile, work, host_folders, bait, user):
    """The host's programs, the generated root, a folder and a file that are bound, the files of names."""
    system = clean_contained
    baits = [bait(folder / "bait") for folder in host_folders]
    data = bait(work / "data")
    single = work / "single"
    single.write_text("a file of its own, which everybody may write to\n")
    single.chmod(0o666)
    os.chown(single, 1000, 1000)
    given = ("-v", f"{work}/tool:/tool", "-v", f"{work}/data:/data", "-v", f"{single}:/opt/single")
    names = ("--dns", "192.0.2.1", "--add-host", "other:192.0.2.2")
    given = (*given, *names, "--tmpfs", "/scratch")
    first = launch(system, hostile, *given, argv="list")  # it makes the generated root
    generated = [path for path in (system.folder / "state/rootfs").iterdir() if path.is_dir()]
    watch = Watch(hostile, work, *generated, *host_folders, baits=(data, *baits))

    read_only = ["/data", "/opt/single", "/etc/hosts", "/etc/resolv.conf", "/etc/passwd"]
    read_only += [str(one.folder) for one in baits]
    places = " ".join(read_only)
    argv = f"makes /scratch/own then each /scratch/own then attack {places} then unshared {places}"
    one = launch(system, hostile, *user, *given, argv=f"{argv} then hold {places}")

    bundle = system.sandboxes / one / "bundle"
    said = parse(output(system, hostile, one))
    wrong = watch.words(system, first, one) + done_at(hostile, said, *read_only)
    assert not wrong, "\n".join(wrong)
    check_writable(hostile, said["/scratch/own"])
    for name in ("hosts", "resolv.conf"):
        assert "192.0.2." in next(bundle.rglob(name)).read_text()


def make_root(hostile, folder, make_bait):
    """A root file system of the program, a bait, and a bait for each attempt."""
    tool(hostile, folder)
    for name in ("proc", "sys", "dev", "tmp", "run", "etc", "data"):
        (folder / name).mkdir()
    for name in ("etc/hosts", "etc/resolv.conf"):
        (folder / name).touch()
    hostile.baits(folder / "baits")
    return make_bait(folder / "bait")


@pytest.mark.parametrize(
    ("user", "writable"),
    [("root", "no"), ("user", "no"), ("root", "memory"), ("user", "disk")],
    indirect=["user"],
)
def test_a_rootfs_of_the_users(clean_contained, hostile, work, bait, user, writable):
    """Read-only, or with a layer of the sandbox's own above it: the folder stays as it is."""
    system, root = clean_contained, clean_contained.folder / "roots/root"
    own = make_root(hostile, root, bait)
    data = bait(work / "data")
    options = ("--rootfs", str(root), "-v", f"{work}/data:/data", "--writable", writable)
    if writable == "disk" and not takes_disk(system):
        done = system.cli("run", *options, "--", "/hostile", "wait", check=False)
        assert done.returncode == 2
        assert "cannot limit what it takes of the disk" in done.stderr
        return
    watch = Watch(hostile, work, root, baits=(own, data))

    argv = (
        "makes /tmp/own then each /tmp/own then each /baits then attack /bait /data then unshared /bait /data"
    )
    one = launch(system, hostile, *user, *options, argv=f"{argv} then hold /bait /data", program="/hostile")

    said = parse(output(system, hostile, one))
    wrong = watch.words(system, one) + done_at(hostile, said, "/data")
    if writable == "no":
        wrong += done_at(hostile, said, "/bait")
    assert not wrong, "\n".join(wrong)
    check_writable(hostile, said["/tmp/own"])
    if writable == "no":
        assert succeeded(hostile, said["/baits"]) == set()
    else:
        # Only root inside may take a name out of a folder of root's.
        check_writable(hostile, said["/baits"], BASIC - {"unlink", "rename"} if user else BASIC)


def takes_disk(system):
    settings = Settings(run_dir=system.run_dir, runsc=system.env["SANDBATCH_RUNSC"])
    return Runsc.from_settings(settings, hides_sysctl=False).limits_overlay


@pytest.mark.parametrize(
    ("user", "writable"), [("root", "no"), ("user", "no"), ("root", "memory")], indirect=["user"]
)
def test_an_image(clean_contained, image_parts, hostile, work, bait, user, writable):
    """All sandboxes of an image share its folder in the store. Device nodes of its layers are not there."""
    system = clean_contained
    layers = [members(hostile, work / "layer"), [device("dev-memory", major=1, minor=1)]]
    layers[1] += [device("dev-disk", tarfile.BLKTYPE, *map(int, hostile.env["DISK"].split(":")))]
    own = work / f"layout-{secrets.token_hex(4)}"  # of a name that it knows the host pulls nothing anew
    image = f"oci:{layout(own, {'v1': blobs_of(layers)})}:v1"
    shutil.rmtree(work / "layer")
    images = system.folder / "state/images"
    others = {*images.glob("sha256-*/rootfs")}
    first = launch(system, hostile, "--image", image, argv="list", program="/hostile")
    [stored] = {*images.glob("sha256-*/rootfs")} - others
    devices = [path for path in stored.rglob("*") if path.is_block_device() or path.is_char_device()]
    assert devices == []
    assert (stored / "bait/mine").stat().st_uid == 1000
    watch = Watch(hostile, work, stored)

    places = "/bait /dev-memory /dev-disk"
    argv = f"makes /tmp/own then each /tmp/own then attack {places} then unshared {places} then hold /bait"
    options = ("--image", image, "--writable", writable)
    one = launch(system, hostile, *user, *options, argv=argv, program="/hostile")

    said = parse(output(system, hostile, one))
    wrong = watch.words(system, first, one)
    wrong += done_at(hostile, said, "/bait") if writable == "no" else []
    assert not wrong, "\n".join(wrong)
    for place in ("/dev-memory", "/dev-disk"):
        assert said[place]["read"] != "done"
    check_writable(hostile, said["/tmp/own"])


def members(hostile, folder):
    """The members of a layer with the program and a bait, owners and modes as on the host."""
    tool(hostile, folder)
    for name in ("proc", "sys", "dev", "tmp", "run", "etc"):
        (folder / name).mkdir()
    (folder / "tmp").chmod(0o1777)
    subprocess.run([hostile.program, "make", folder / "bait"], check=True, env=hostile.env)
    raw = subprocess.run(["tar", "-C", folder, "-c", "."], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return [(one, archive.extractfile(one).read() if one.isreg() else b"") for one in archive]


def test_the_kernels_own_files(clean_contained, hostile, work, user):
    """Everything in /dev, /proc and /sys is written to that can be: the host's kernel does not notice."""
    system = clean_contained
    watch = Watch(hostile, work)
    argv = "scribble /dev /proc /sys then makes /tmp/own then scribble /tmp/own"
    one = launch(system, hostile, *user, "-v", f"{work}/tool:/tool", argv=argv)
    lines = output(system, hostile, one).splitlines()
    assert watch.words(system, one) == []
    assert "/tmp/own/open-write/mine: written" in lines
    assert [line for line in lines if line.startswith("/sys/") and line.endswith(": written")] == []


def test_what_is_open(clean_contained, hostile, work, user):
    """Of PID 1 and of an exec three descriptors, and nothing behind them but the sandbox's own words."""
    system = clean_contained
    given = ("-v", f"{work}/tool:/tool")
    one = launch(system, hostile, *user, *given, argv="list then descriptors then attack /proc/self/fd/1")
    log = system.sandboxes / one / "container.log"
    found = log.stat()
    texts = [output(system, hostile, one)]
    for options in ((), ("-i",)):
        done = system.cli("exec", *options, one, "--", "/tool/hostile", "descriptors")
        texts.append(done.stdout)
    for text in texts:
        words = text.splitlines()
        assert [word.split(" ")[1] for word in words if word.startswith("fd ")] == ["0", "1", "2"]
        done = [word for word in words if word.endswith(": done")]
        assert [word for word in done if word.startswith(("truncate", "seek 1", "seek 2"))] == [], done
        assert hostile.token not in text
        # What a second open reads is what the sandbox has itself written, or nothing.
        for word in words:
            if word.startswith("fd-"):
                assert word.partition("> ")[2] == "" or word.startswith(("fd-1> ", "fd-2> ")), word
    assert "C open-write" in texts[0]  # written before: the log was not emptied
    now = log.stat()
    assert (now.st_ino, now.st_mode, now.st_uid) == (found.st_ino, found.st_mode, found.st_uid)
    assert now.st_size >= found.st_size


def test_a_source_that_is_swapped_while_it_starts(clean_contained, hostile, work):
    """The folder that was given, or a failed launch; never the one that a symlink leads to instead."""
    system = clean_contained
    (work / "real").mkdir()
    (work / "real/secret").write_text("what was given\n")
    (work / "link").symlink_to(hostile.folder)
    system.env["SANDBATCH_MOUNT_ALLOW"] = '["/"]'  # of the command line, which looks, too: let all pass
    try:
        with swapping(work / "real", work / "link") as swaps:
            command = ("--count", str(LAUNCHES), "-v", f"{work}/real:/data", "--", "cat", "/data/secret")
            ids = []
            while not ids:  # it may still look just when the link changes under it
                ids = system.cli("run", *command, check=False).stdout.split()
            states = system.wait(ids, "terminal", 150)
            assert swaps() > LAUNCHES
    finally:
        system.env["SANDBATCH_MOUNT_ALLOW"] = json.dumps([str(work)])
    assert len(ids) == LAUNCHES
    for one in ids:
        shown = system.show(one)
        text = system.cli("logs", one, check=states[one] == "exited").stdout
        assert hostile.token not in text + json.dumps(shown)
        if states[one] == "exited":
            assert text == "what was given\n"
        else:
            assert (states[one], shown["error"]["stage"] in ("bundle", "container")) == ("failed", True), (
                shown
            )


@contextmanager
def swapping(one, other):
    """Both paths exchange their names all the time, in a thread; yields how often so far."""
    libc, stop, count = ctypes.CDLL(None, use_errno=True), threading.Event(), itertools.count()
    last = [0]

    def swap():
        while not stop.is_set():
            assert libc.renameat2(-100, bytes(one), -100, bytes(other), 2) == 0, os.strerror(
                ctypes.get_errno()
            )
            last[0] = next(count)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: last[0]
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def shared(work, host_folders):
    """Folders whose mounts every namespace sees that does not keep itself apart."""
    folders = [*host_folders, work / "data"]
    (work / "data").mkdir()
    made = []
    try:
        for folder in folders:
            (folder / "below").mkdir()
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            made.append(folder)
            subprocess.run(["mount", "--make-shared", folder], check=True)
        yield folders
    finally:
        for folder in made:
            subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)


def test_mounts_of_the_host_after_the_start_are_not_seen(clean_contained, hostile, work, shared):
    system = clean_contained
    options = ("-v", f"{work}/data:/data", "-v", f"{work}/tool:/tool")
    one = launch(system, hostile, *options, argv="list")
    inside = [*map(str, shared[:-1]), "/data"]
    for folder in shared:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder / "below"], check=True)
        (folder / "below/secret").write_text(hostile.token)
    try:
        for folder in inside:
            done = system.cli("exec", one, "--", "ls", f"{folder}/below")
            assert done.stdout == "", folder
            done = system.cli("exec", one, "--", "cat", f"{folder}/below/secret", check=False)
            assert done.returncode == 1
            assert hostile.token not in done.stdout
    finally:
        for folder in shared:
            subprocess.run(["umount", "--lazy", folder / "below"], check=True)


def test_mounts_below_what_is_given_are_refused(clean_contained, hostile, work, bait):
    """Before the start nobody knows whether they were meant."""
    system, root = clean_contained, clean_contained.folder / "roots/root"
    make_root(hostile, root, bait)
    (work / "data/below").mkdir(parents=True)
    for below, options, words in (
        (work / "data/below", ("-v", f"{work}/data:/data"), "is mounted below it"),
        (root / "baits", ("--rootfs", str(root)), "is mounted below it"),
    ):
        subprocess.run(["mount", "-t", "tmpfs", "none", below], check=True)
        try:
            done = system.cli("run", *options, "--", "/hostile", "wait", check=False)
        finally:
            subprocess.run(["umount", below], check=True)
        assert done.returncode == 2, options
        assert words in done.stderr


def test_the_old_hole_is_caught(host_parts, hostile, tmp_path):
    """Debian's runsc of 2024 in the host's own mounts: refused before a program starts, or seen here."""
    script = tmp_path / "runsc"
    runsc = runsc_of("debian")
    script.write_text(f'#!/bin/sh\nexec nsenter --mount=/proc/{os.getpid()}/ns/mnt {runsc} "$@"\n')
    script.chmod(0o755)
    folder = tmp_path / "system"
    folder.mkdir()
    with unchanged():
        system = make_system(folder, script)
        try:
            work = tool(hostile, folder / "allowed/tool").parent
            caught = refusal(system, hostile, work)
        finally:
            system.remove()
    assert caught


def refusal(system, hostile, work):
    """Why the host would not run it, or what the judge says after it did."""
    try:
        system.start()
    except AssertionError as error:
        return re.search(f"{HOLE}.*without ro", str(error))
    own = hostile.bait(work / "data")
    watch = Watch(hostile, work, baits=(own,))
    options = ("-v", f"{work}/tool:/tool", "-v", f"{work}/data:/data")
    try:
        [one] = system.run(*options, "--", "/tool/hostile", "attack", "/data", "then", "wait")
        if system.wait([one], "running") != {one: "running"}:
            return system.show(one)["error"]["message"]
        log = system.sandboxes / one / "container.log"
        system.wait_until(lambda: "the end" in conmon.tail_log(log, 3), 150, "end of the attempts")
        changed = watch.words(system, one)
        assert any("/mine: size was" in word for word in changed), changed
        return changed
    finally:
        own.close()
