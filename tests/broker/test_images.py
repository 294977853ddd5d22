"""`images`, `image rm`, `image prune` and `pull`: a real broker, real stores, the host's end of calls."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.calls import CallService
from tasks.state import State
from tests.broker.test_cli import LINE
from worker import journal
from worker.image_calls import answer
from worker.image_entry import ROOTFS, write_entry
from worker.image_guard import Size
from worker.image_ref import parse_image
from worker.image_store import ImageStore
from worker.settings import Settings
from worker.spec import KINDS, make_spec

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
USER = "sb-00000000000000a1"
BUSYBOX = "docker.io/library/busybox:1"


class Handlers:
    """What a host does with calls of this kind alone."""

    def __init__(self, settings: Settings) -> None:
        self._store = ImageStore(settings)

    async def run(self, ready: asyncio.Event) -> None:
        ready.set()
        await asyncio.Event().wait()

    async def handle(self, call: Any, talk: Any) -> dict[str, Any]:
        return await asyncio.to_thread(answer, self._store, call)


@pytest.fixture
def host(broker, client, heartbeat, tmp_path) -> Iterator[Callable[..., ImageStore]]:
    """Start a host that knows images; its store."""
    made: list[CallService] = []

    def start(name: str = "h1") -> ImageStore:
        settings = broker.model_copy(update={"host": name, "state_dir": tmp_path / name})
        heartbeat(name, kinds=KINDS)
        made.append(CallService(settings, lambda: Handlers(settings)))
        made[-1].start()
        return ImageStore(settings)

    yield start
    for service in made:
        service.stop()


def put(store: ImageStore, digest: str, *references: str, size: int = 2**20, age_s: float = 0.0) -> None:
    """An image in a host's store, without a pull."""
    place = store.pulling(digest[-64:])
    (place / ROOTFS).mkdir(parents=True)
    write_entry(place, digest, {}, Size(size, 3), 0)
    store.put(place, digest, size)
    used = store.folder / f"{digest.replace(':', '-')}.used"
    os.utime(used, (time.time() - age_s,) * 2)
    for reference in references:
        store.note(parse_image(reference), digest)


def uses(store: ImageStore, digest: str) -> None:
    """A sandbox of that host that has begun with an image."""
    spec = make_spec(args=["true"])
    one = journal.create(store.settings.sandboxes_dir, USER, attempt=1, batch="b-1", spec=spec)
    one.mark_begun("image", {"reference": BUSYBOX, "digest": digest})


# -- what there is ---------------------------------------------------------------------------------


def test_images_of_all_hosts_are_listed_the_last_used_first(cli, host):
    h1, h2 = host("h1"), host("h2")
    put(h1, A, "busybox:1", "busybox", size=3 * 2**19, age_s=7200)
    put(h1, B, age_s=60)
    put(h2, A, "busybox:1")
    uses(h1, A)
    done = cli("images")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [
        ["HOST", "REFERENCE", "DIGEST", "SIZE", "USES", "LAST", "USED"],
        ["h1", "<none>", "b" * 12, "1.0m", "0", "1m", "ago"],
        ["h1", BUSYBOX, "a" * 12, "1.5m", "1", "2h", "ago"],
        ["h1", "docker.io/library/busybox:latest", "a" * 12, "1.5m", "1", "2h", "ago"],
        ["h2", BUSYBOX, "a" * 12, "1.0m", "0", "0s", "ago"],
    ]
    assert cli("images", "-q").stdout == f"{B}\n{A}\n"
    assert cli("image", "ls", "--host", "h2", "-q").stdout == f"{A}\n"
    (row,) = (one for one in cli.json("images") if one["host"] == "h1" and one["digest"] == A)
    assert (row["uses"], row["users"], row["size_bytes"], row["files"]) == (1, [USER], 3 * 2**19, 3)
    assert row["references"] == [BUSYBOX, "docker.io/library/busybox:latest"]
    assert row["pulled_at"].endswith("Z")
    assert row["used_at"].endswith("Z")


def test_a_host_that_does_not_answer_is_named_and_the_rest_is_shown(cli, host, heartbeat, monkeypatch):
    monkeypatch.setattr("tasks.caller.STALE_S", 1.0)
    put(host("h1"), A)
    heartbeat("h2", kinds=KINDS)  # it lives, and its thread for calls does not
    heartbeat("h3", version="0.2.0", kinds=KINDS[:2])
    done = cli("images", "-q")
    assert (done.returncode, done.stdout) == (1, f"{A}\n")
    assert "host h2: it does not answer; see sandbatch hosts" in done.stderr
    assert "host h3: has release 0.2.0, which knows no images; upgrade it" in done.stderr


def test_who_uses_what_may_be_unknown(cli, host):
    """A journal that cannot be read may be of any image: they are listed, and none is removed."""
    store = host()
    put(store, A)
    folder = store.settings.sandboxes_dir / USER
    folder.mkdir(parents=True)
    (folder / journal.FILE).write_text("{")
    done = cli("images")
    assert (done.returncode, done.stdout.split()[-3:]) == (0, ["?", "0s", "ago"])
    assert "cannot be known" in done.stderr
    assert cli("image", "prune").returncode == 1
    assert store.find(A) is not None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["images", "--host", "h9"], "host h9: no such host"),
        (["images", "--host", "old"], "host old: has release 0.2.0, which knows no images; upgrade it"),
        (["pull", "busybox", "--host", "old"], "which knows no images"),
        (["images", "--host", "gone"], "host gone: is stopped since"),
        (["image", "rm", "Busy Box"], "image Busy Box: "),
        (["image", "prune", "--older-than", "long"], "a time is needed"),
        (["image", "prune", "--older-than", "-1"], "a time is needed"),
        (["pull", "busybox", "--host", "h9"], "known: gone, here, old"),
        (["pull", "busybox"], "several hosts are up: here, old"),
        (["pull", "busybox", "--host", "here", "--all-hosts"], "give one of them"),
        (["pull", "busybox", "--host", "here", "--pull", "never"], "always or missing"),
        (["pull", "containers-storage:busybox", "--host", "here"], "is not supported"),
        (["pull", "", "--host", "here"], "printable name"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_done(cli, heartbeat, record, client, args, words):
    heartbeat(kinds=KINDS)
    heartbeat("old", kinds=KINDS[:2])
    heartbeat("gone", kinds=KINDS)
    record.leave("gone")
    done = cli(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert LINE.match(done.stderr)
    assert record.orders_on("here") == []


def test_without_a_host_nothing_can_be_asked(cli):
    for args in (["images"], ["image", "rm", "busybox"], ["image", "prune"], ["pull", "busybox"]):
        done = cli(*args)
        assert (done.returncode, done.stdout) == (1, "")
        assert "no host is up" in done.stderr


# -- less of it ------------------------------------------------------------------------------------


def test_an_image_goes_by_its_reference_or_digits_from_all_hosts_that_have_it(cli, host):
    h1, h2 = host("h1"), host("h2")
    put(h1, A, "busybox:1")
    put(h2, B, "busybox:1")  # the tag has moved
    put(h2, C)
    done = cli("image", "rm", "busybox:1")
    assert (done.returncode, done.stdout) == (0, f"h1 {A}\nh2 {B}\n")
    assert "2 images removed, 2.0m freed" in done.stderr
    assert cli("image", "rm", "cccccc").stdout == f"h2 {C}\n"
    assert (h1.all(), h2.all()) == ([], [])


def test_an_image_by_its_path_is_meant_from_here(cli, host, tmp_path, monkeypatch):
    store = host()
    put(store, A, f"oci:{tmp_path}/layout:v1")
    monkeypatch.chdir(tmp_path)
    assert cli("image", "rm", "oci:./layout:v1").stdout == f"h1 {A}\n"


def test_an_image_in_use_stays_and_its_users_are_named(cli, host):
    store = host()
    put(store, A, "busybox:1")
    put(store, B)
    uses(store, A)
    done = cli("image", "rm", "busybox:1", "b" * 8)
    assert (done.returncode, done.stdout) == (1, f"h1 {B}\n")
    words = f"host h1: image busybox:1: is in use by {USER}; end these sandboxes first"
    assert f"sandbatch: {words}\n" in done.stderr
    assert store.find(A) is not None


def test_two_names_of_one_image_remove_it_once(cli, host):
    put(host(), A, "busybox:1", "busybox:2")
    done = cli("image", "rm", "busybox:1", "busybox:2", "a" * 6)
    assert (done.returncode, done.stdout) == (0, f"h1 {A}\n")


def test_what_no_host_has_is_said_and_is_no_success(cli, host):
    put(host(), A)
    for name in ("busybox", "0" * 64, f"sha256:{'0' * 64}"):
        done = cli("image", "rm", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"image {name}: is not on any host" in done.stderr


def test_digits_of_two_images_are_refused_before_one_goes(cli, host):
    store = host()
    other = f"sha256:{'a' * 10}{'b' * 54}"
    put(store, A)
    put(store, other)
    done = cli("image", "rm", "aaaaaa")
    assert (done.returncode, done.stdout) == (2, "")
    assert "several digests begin so" in done.stderr
    assert len(store.all()) == 2


def test_prune_takes_what_nobody_uses_nor_has_for_so_long(cli, host):
    store = host()
    put(store, A, age_s=10 * 86400)
    put(store, B, age_s=10 * 86400)
    put(store, C, age_s=6 * 86400)
    uses(store, A)
    (row,) = cli.json("image", "prune", "--older-than", "7d")
    assert (row["host"], row["digest"]) == ("h1", B)
    assert cli("image", "prune", "--host", "h1").stdout == f"h1 {C}\n"
    done = cli("image", "prune")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "there is nothing to remove\n")
    assert [one.digest for one in store.all()] == [A]


# -- more of it ------------------------------------------------------------------------------------


@pytest.fixture
def pulling(cli) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`sandbatch pull` as a process of its own."""
    made: list[subprocess.Popen[str]] = []

    def start(*args: str, stderr: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        argv, env = [sys.executable, "-m", "cli", "pull", *args], {**cli.environment, "COLUMNS": "120"}
        made.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env))
        return made[-1]

    yield start
    for one in made:
        one.kill()
        one.communicate()


def orders(record, *hosts: str) -> dict[str, dict[str, Any]]:
    """The order of each host, once all have one."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = {name: record.orders_on(name) for name in hosts}
        if all(found.values()):
            return {name: rows[0] for name, rows in found.items()}
        time.sleep(0.02)
    raise AssertionError(f"no order for each of {hosts}")


def test_pull_shows_how_it_goes_on_and_prints_a_digest_for_each_host(pulling, record, heartbeat):
    for name in ("h1", "h2", "drained"):
        heartbeat(name, kinds=KINDS)
    record.drain("drained", True)
    process = pulling("busybox:1", "--all-hosts")
    found = orders(record, "h1", "h2")
    assert {(one["reference"], one["policy"]) for one in found.values()} == {(BUSYBOX, "always")}
    first = found["h1"]["id"]
    record.tell_order(first, state="pulling", phase="pulling", done_bytes=2**20, total_bytes=2**21, tries=1)
    assert process.stderr is not None
    said = ""
    while "h1: pulling" not in said:
        said += process.stderr.readline()
    assert f"h1: pulling {BUSYBOX}, 1.0m of 2.0m" in said
    assert "drained, so left out: drained" in said
    record.tell_order(first, state="done", digest=A, phase="")
    record.tell_order(found["h2"]["id"], state="failed", error="image busybox:1: denied; log in", phase="")
    out, rest = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, f"h1 {A}\n")
    assert "sandbatch: host h2: image busybox:1: denied; log in" in rest
    assert record.orders_on("drained") == []


def test_hosts_that_are_all_drained_warm_nothing(cli, record, heartbeat):
    heartbeat(kinds=KINDS)
    record.drain("here", True)
    done = cli("pull", "busybox", "--all-hosts")
    assert (done.returncode, done.stdout) == (1, "")
    assert "all hosts that are up are drained" in done.stderr
    assert record.orders_on("here") == []


def test_on_a_terminal_a_line_is_redrawn_with_the_rate(pulling, record, heartbeat):
    heartbeat(kinds=KINDS)
    ours, theirs = pty.openpty()
    process = pulling("busybox:1", stderr=theirs)
    os.close(theirs)
    order = orders(record, "here")["here"]["id"]
    said, done = "", 0
    while not re.search(rf"here: pulling {BUSYBOX}, [0-9.]+m of 1\.0g, [0-9.]+m/s", said):
        done += 10 * 2**20  # until it has seen enough for a rate
        record.tell_order(
            order, state="pulling", phase="pulling", done_bytes=done, total_bytes=2**30, tries=1
        )
        said += os.read(ours, 65536).decode(errors="replace")
        time.sleep(0.1)
    record.tell_order(order, state="done", digest=A, phase="")
    while f"here: done, {'a' * 12}" not in said:
        said += os.read(ours, 65536).decode(errors="replace")
    assert process.stdout is not None
    assert process.stdout.read() == f"here {A}\n"
    os.close(ours)


def test_the_only_host_need_not_be_named(pulling, record, heartbeat):
    heartbeat(kinds=KINDS)
    process = pulling("oci:./layout:v1", "--pull", "missing", "--json")
    order = orders(record, "here")["here"]
    assert (order["reference"], order["policy"]) == (f"oci:{Path.cwd()}/layout:v1", "missing")
    record.tell_order(order["id"], state="done", digest=A, phase="")
    out, _ = process.communicate(timeout=20)
    (row,) = json.loads(out)
    assert (process.returncode, row["host"], row["digest"], row["state"]) == (0, "here", A, "done")


def test_ctrl_c_leaves_the_pull_going(pulling, record, heartbeat):
    heartbeat(kinds=KINDS)
    process = pulling("busybox:1")
    order = orders(record, "here")["here"]
    assert process.stderr is not None
    process.stderr.readline()  # it is shown, so it is waited for
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "the pull goes on; sandbatch images shows when the image is there\n"
    assert record.order(order["id"])["state"] == "waiting"


def test_a_host_that_stops_meanwhile_is_named_and_waited_for(pulling, record, heartbeat):
    heartbeat(kinds=KINDS)
    process = pulling("busybox:1")
    order = orders(record, "here")["here"]
    record.leave("here")
    assert process.stderr is not None
    said = ""
    while "is stopped" not in said:
        said += process.stderr.readline()
    assert "it pulls when it is back" in said
    record.tell_order(order["id"], state="done", digest=A, phase="")
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"here {A}\n")


# -- a sandbox that waits for one ------------------------------------------------------------------


def test_ls_and_show_say_how_far_the_pull_is_that_a_sandbox_waits_for(cli, record, heartbeat, monkeypatch):
    heartbeat(kinds=KINDS)
    record.enqueue("b-1", [(USER, make_spec(args=["true"]))])
    record.put(USER, State.PLACED, 1, {"host": "here"}, only_from=State.QUEUED)
    record.put(USER, State.LAUNCHING, 1, {"stage": "image"})
    raw = json.loads(record.client.hget(f"sandbatch:sb:{USER}", "spec"))
    record.client.hset(f"sandbatch:sb:{USER}", "spec", json.dumps({**raw, "image": BUSYBOX}))
    row = {"reference": BUSYBOX, "digest": A, "phase": "pulling", "done_bytes": 12 * 2**20}
    row |= {"total_bytes": 45 * 2**20, "tries": 2, "words": "timed out", "batches": ["b-1"], "since": "1"}
    other = {**row, "reference": "docker.io/library/other:1", "since": "0"}
    key = "sandbatch:host:here:pulls"
    record.client.hset(key, mapping={"1": json.dumps(row), "2": json.dumps(other)})
    words = f"pulling {BUSYBOX}, 12.0m of 45.0m (try 2: timed out)"
    assert words in cli("ls").stdout
    assert words in cli("show", USER).stdout
    assert cli.json("show", USER)["pull"]["done_bytes"] == 12 * 2**20
    record.client.delete(key)
    assert "pulling" not in cli("ls").stdout
    assert cli.json("show", USER)["pull"] is None
