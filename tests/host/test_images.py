"""Sandboxes of an image on a real host: one pull, which holds no slot; whatever dies, nothing is left."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from tasks.submit import order_pull, submit
from tests.conftest import lack
from tests.host.conftest import SUBNETS
from tests.host.machine import difference, snapshot
from tests.host.system import System
from tests.images.make import Layout, busybox
from worker import journal as journals
from worker.settings import Settings
from worker.spec import make_spec

SOON_S = 40.0

# In the place of a program: it notes its call, and while there is a file HOLD it waits.
DOUBLE = """#!/bin/sh
echo "$@" >> "{log}"
while [ -e "{hold}" ]; do sleep 0.05; done
exec {real} "$@"
"""


class Double:
    """A program of the host in a folder that goes before the others on the PATH."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log, self.hold = folder / f"{name}.log", folder / f"{name}.hold"
        real = shutil.which(name)
        if real is None:
            lack(f"this machine lacks {name}: run sandbatch setup as root")
        path = folder / name
        path.write_text(DOUBLE.format(log=self.log, hold=self.hold, real=real))
        path.chmod(0o755)
        self.forget()

    def forget(self) -> None:
        self.hold.unlink(missing_ok=True)
        self.log.write_text("")

    def calls(self, part: str = " ") -> list[str]:
        return [call for call in self.log.read_text().splitlines() if part in call]


class Images:
    """A host whose skopeo and umoci wait where they are told to, and images that it has not seen."""

    def __init__(self, system: System, tools: Path) -> None:
        self.system = system
        self.skopeo, self.umoci = Double(tools, "skopeo"), Double(tools, "umoci")
        self._layout = Layout(system.folder / "layout")
        self._made = 0

    def make(self, tag: str = "") -> str:
        """The reference of a new image, or of one that takes the place of another."""
        self._made += 1
        layers = [busybox().file("number", str(self._made))]
        return f"oci:{self._layout.folder}:{self._layout.make(tag or f'image{self._made}', layers)}"

    @property
    def client(self) -> Client:
        return Client(Settings(run_dir=self.system.run_dir, network="bridged"))

    def launch(self, image: str | None, count: int = 1, **spec: Any) -> list[str]:
        """Enqueue sandboxes of one batch; their ids."""
        fields = {"args": ["/bin/sleep", "600"], "network": "bridged", "image": image, **spec}
        client = self.client
        with client.app() as app:
            ids = submit(app, client.record, client.settings, [make_spec(**fields)] * count)[1]
        client.record.client.close()
        return ids

    def order(self, image: str) -> list[str]:
        client = self.client
        with client.app() as app:
            orders = order_pull(app, client.record, ["test"], image)
        client.record.client.close()
        return list(orders.values())

    def in_store(self, start: str) -> list[str]:
        folder = self.system.folder / "state" / "images"
        return [path.name for path in folder.glob(f"{start}*")] if folder.is_dir() else []

    def wait_for(self, ids: list[str], field: str, value: str) -> None:
        """Wait until all have it in their records."""
        with self.system.record() as record:
            self.system.wait_until(
                lambda: [row[field] for row in record.get_all(ids)] == [value] * len(ids),
                SOON_S,
                f"{field} {value}",
            )

    def wait_until_running(self, ids: list[str]) -> None:
        self.wait_for(ids, "state", "running")


@pytest.fixture(scope="module")
def machine(host_parts: None, tmp_path_factory: Any) -> Iterator[Images]:
    before = snapshot()
    tools = tmp_path_factory.mktemp("tools")
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SANDBATCH_SLOTS": "2"}
    system = System(tmp_path_factory.mktemp("system"), next(SUBNETS), env)
    made = Images(system, tools)
    system.start()
    yield made
    system.remove()
    assert difference(before, snapshot()) == {}


@pytest.fixture
def images(machine: Images) -> Iterator[Images]:
    """After the test nothing of it is left but its images."""
    yield machine
    machine.skopeo.forget()
    machine.umoci.forget()
    system = machine.system
    system.clear()
    system.wait_until(lambda: not machine.in_store(".pulling"), 10, "the pulls' folders to go")


def test_ten_of_one_image_share_a_pull_and_hold_no_slot_meanwhile(images: Images):
    """A launch of something else goes by; then no more begin at a time than there are slots."""
    images.skopeo.hold.touch()
    ids = images.launch(images.make(), 10)
    images.wait_for(ids, "stage", "image")
    other = images.launch(None)
    images.wait_until_running(other)
    images.skopeo.hold.unlink()
    images.wait_until_running(ids)
    assert len(images.skopeo.calls(" copy ")) == len(images.umoci.calls(" unpack ")) == 1
    (stage,) = (one for one in images.system.show(ids[0])["stages"] if one["name"] == "image")
    assert (stage["do|undo"], stage["state"]) == ("do", "done")


def test_ls_and_show_say_what_a_sandbox_waits_for(images: Images):
    images.skopeo.hold.touch()
    image = images.make()
    ids = images.launch(image, 2)
    words, system = f"resolving {image}", images.system
    system.wait_until(lambda: system.cli("ls").stdout.count(words) == 2, SOON_S, "a word of the pull")
    assert words in system.cli("show", ids[0]).stdout
    # The second may have joined after the last word of the pull: the next one counts it.
    system.wait_until(lambda: system.show(ids[0])["pull"]["waiters"] == 2, SOON_S, "both that wait")
    pull = system.show(ids[0])["pull"]
    assert (pull["reference"], pull["phase"]) == (image, "resolving")
    images.skopeo.hold.unlink()
    images.wait_until_running(ids)
    assert system.show(ids[0])["pull"] is None
    assert words not in system.cli("ls").stdout


def test_a_pull_that_nobody_waits_for_any_more_is_ended(images: Images):
    """Whether it was removed, or its deadline has passed; the next sandbox of that image has its own pull."""
    images.skopeo.hold.touch()
    image = images.make()
    (first,) = images.launch(image)
    in_4_s = journals.stamp(time.time() + 4)
    (second,) = images.launch(image, deadline_at=in_4_s)
    images.system.wait_until(images.skopeo.calls, SOON_S, "a pull")
    images.system.cli("rm", first)
    assert images.in_store(".pulling")
    images.wait_for([second], "state", "failed")
    error = images.system.show(second)["error"]
    assert error == {"stage": "image", "message": f"its deadline, {in_4_s}, has passed"}
    images.system.wait_until(lambda: not images.in_store(".pulling"), SOON_S, "the end of the pull")
    images.skopeo.hold.unlink()
    images.wait_until_running(images.launch(image))


def test_a_sandbox_that_is_started_anew_keeps_its_image_though_the_tag_has_moved(images: Images):
    program = ["/bin/sh", "-c", "cat /number; sleep 1; exit 1"]
    image = images.make("moving")
    (one,) = images.launch(image, args=program, restart="on-failure:1", pull="always")
    system = images.system
    images.wait_until_running([one])
    images.make("moving")
    images.wait_for([one], "state", "exited")
    assert system.show(one)["restarts"] == 1
    assert len(set(system.cli("logs", one).stdout.split())) == 1
    (later,) = images.launch(image, args=program, pull="always")
    images.wait_for([later], "state", "exited")
    assert system.cli("logs", later).stdout.split() != system.cli("logs", one).stdout.split()[:1]


def test_an_image_that_cannot_be_had_fails_its_sandbox_in_words(images: Images):
    image = images.make()
    (absent,) = images.launch(image + "-absent")
    (never,) = images.launch(image, pull="never")
    system = images.system
    images.wait_for([absent, never], "state", "failed")
    error = system.show(absent)["error"]
    assert error["stage"] == "image"
    assert "absent" in error["message"]
    assert "never to be pulled" in system.show(never)["error"]["message"]


def test_a_worker_that_is_killed_over_a_pull_leaves_nothing_and_the_next_begins_anew(images: Images):
    """Over skopeo and over umoci, for sandboxes and for an order, after which nothing is pulled again.

    So does one that is stopped, which need not be waited for.
    """
    system = images.system
    resolving, unpacking = (images.skopeo, " inspect "), (images.umoci, " unpack ")
    for (double, verb), is_killed in ((resolving, True), (unpacking, True), (resolving, False)):
        double.hold.touch()
        image = images.make()
        ids, orders = images.launch(image, 2), images.order(image)
        system.wait_until(lambda: double.calls(verb), SOON_S, "a pull")  # noqa: B023 - it is called at once
        if is_killed:
            system.kill_worker()
        else:
            system.stop()
            assert images.in_store(".pulling") == []
        double.hold.unlink()
        system.start()
        images.wait_until_running(ids)
        with system.record() as record:
            *_, last = (rows for rows in record.follow_orders(orders, 1.0) if rows)
            assert [row["state"] for row in last] == ["done"], system.log()
            assert record.orders_on("test") == []
        images.skopeo.forget()
        images.wait_until_running(images.launch(image))
        assert images.skopeo.calls() == []


def test_a_broker_that_loses_all_during_a_pull_hears_it_again(images: Images):
    images.skopeo.hold.touch()
    image = images.make()
    ids = images.launch(image, 3)
    images.wait_for(ids, "stage", "image")
    with images.system.record() as record:
        record.client.flushall()
        images.skopeo.hold.unlink()
        images.wait_until_running(ids)
        batch = record.get(ids[0])["batch"]
        assert record.pinned(batch, image) is not None
