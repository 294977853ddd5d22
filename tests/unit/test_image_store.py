"""The host's images: found by digest and by reference, used by journals, removed when nobody uses them."""

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker import image_audit, journal
from worker.errors import BadInput, ImageError
from worker.image_entry import Image, read_entry, write_entry
from worker.image_guard import measure
from worker.image_place import held, working
from worker.image_ref import parse_image
from worker.image_refs import References
from worker.image_store import ImageStore
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import Spec

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
ID = "sb-00000000000000a1"
REF = parse_image("registry.example/app:v1")
HALF = json.dumps({"reference": "\ud800", "digest": A})  # half a pair of UTF-16: no text


@pytest.fixture
def store(settings: Settings) -> ImageStore:
    return ImageStore(settings)


Put = Callable[..., Image]


@pytest.fixture
def put(store: ImageStore) -> Put:
    """An image of so many bytes, as a pull puts it there."""

    def put(digest: str, size_bytes: int = 4096, age_s: float = 0) -> Image:
        place = store.pulling(digest.removeprefix("sha256:"))
        with working(place, lambda: None):
            (place / "rootfs/etc").mkdir(parents=True)
            (place / "rootfs/etc/data").write_bytes(bytes(100))
            size = measure(place / "rootfs")
            size.bytes = size_bytes
            write_entry(place, digest, {"config": {"Env": ["A=1"]}}, size, 0)
            store.put(place, digest, size_bytes)
        used = store.folder / f"{digest.replace(':', '-')}.used"
        os.utime(used, (time.time() - age_s,) * 2)
        image = store.find(digest)
        assert image is not None
        return image

    return put


def begin(settings: Settings, digest: str | None, container_id: str = ID) -> Journal:
    """A sandbox whose launch has begun the stage `image`."""
    spec = Spec(args=["true"])
    known = journal.create(settings.sandboxes_dir, container_id, attempt=1, batch="b", spec=spec)
    known.mark_begun("image", {"reference": str(REF), "digest": digest})
    return known


def names(store: ImageStore) -> set[str]:
    return {one for one in os.listdir(store.folder) if one not in (".lock", "refs")}


# -- what is there ---------------------------------------------------------------------------------


def test_an_empty_store_has_nothing_and_makes_nothing(store: ImageStore) -> None:
    assert (store.all(), store.find(A), store.lookup(REF), store.left_over()) == ([], None, None, [])
    assert not store.folder.exists()


def test_an_image_is_found_by_its_digest_and_what_led_to_it(store: ImageStore, put: Put) -> None:
    put(A)
    store.note(REF, A)
    store.note(parse_image("app"), A)
    image = store.find(A)
    assert image is not None
    assert image.references == ("docker.io/library/app:latest", "registry.example/app:v1")
    assert image.config == {"config": {"Env": ["A=1"]}}
    assert (image.rootfs / "etc/data").is_file()
    assert store.lookup(REF) == A
    assert store.lookup(parse_image(f"other@{A}")) == A
    assert store.lookup(parse_image("app:v2")) is None


def test_a_tag_that_moved_leads_to_the_new_image_alone(store: ImageStore, put: Put) -> None:
    put(A)
    put(B)
    store.note(REF, A)
    store.note(REF, B)
    assert store.lookup(REF) == B
    assert [one.references for one in store.all()] == [(str(REF),), ()]


def test_a_reference_to_an_image_that_is_gone_leads_nowhere(store: ImageStore) -> None:
    store.note(REF, A)
    assert store.lookup(REF) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "image/v2"}', "null", "[" * 100_000])
def test_an_entry_that_cannot_be_read_is_no_image(store: ImageStore, put: Put, text: str) -> None:
    (put(A).folder / "image.json").write_text(text)
    store.note(REF, A)
    assert (store.find(A), store.lookup(REF), store.all()) == (None, None, [])
    assert [one.name for one in store.broken()] == [A.replace(":", "-")]


@pytest.mark.parametrize("text", ["", "{", '{"digest": 1}'])
def test_a_torn_reference_is_as_if_it_had_never_been(store: ImageStore, put: Put, text: str) -> None:
    put(A)
    store.note(REF, A)
    (file,) = (store.folder / "refs").iterdir()
    file.write_text(text)
    assert store.lookup(REF) is None
    assert store.find(A) is not None


def test_nobody_but_root_comes_near(store: ImageStore, put: Put) -> None:
    image = put(A)
    assert [one.stat().st_mode & 0o777 for one in (store.folder, image.folder)] == [0o700, 0o700]


# -- use and removal -------------------------------------------------------------------------------


def test_a_use_makes_an_image_young(store: ImageStore, put: Put) -> None:
    put(A, age_s=1000)
    put(B, age_s=10)
    assert [one.digest for one in store.all()] == [B, A]
    store.use(A)
    assert [one.digest for one in store.all()] == [A, B]


def test_what_is_gone_cannot_be_used(store: ImageStore) -> None:
    with pytest.raises(ImageError, match="is not on this host") as caught:
        store.use(A)
    assert caught.value.can_pass, "it is pulled again"


@pytest.mark.parametrize("words", [A, A[:15], "a" * 8, str(REF), "docker://registry.example/app:v1"])
def test_an_image_is_removed_by_digest_or_reference(store: ImageStore, put: Put, words: str) -> None:
    put(A)
    put(B)
    store.note(REF, A)
    assert store.remove(words).digest == A
    assert names(store) == {f"{B.replace(':', '-')}{end}" for end in ("", ".used")}
    assert list((store.folder / "refs").iterdir()) == []


def test_what_is_not_there_or_not_clear_is_not_removed(store: ImageStore, put: Put) -> None:
    put("sha256:" + "a" * 63 + "0")
    put("sha256:" + "a" * 63 + "1")
    with pytest.raises(BadInput, match="names 2 images"):
        store.remove("aaaaaa")
    for words in ("app", "sha256:abc", "ffffff", "/etc", ".."):
        with pytest.raises(BadInput, match="is not on this host"):
            store.remove(words)
    assert len(store.all()) == 2


def test_an_image_in_use_stays_and_its_users_are_named(
    store: ImageStore, put: Put, settings: Settings
) -> None:
    """By journals alone, also of a launch that has only begun: it looks for the image next."""
    put(A, age_s=10_000)
    known = begin(settings, A)
    assert store.users() == {A: [ID]}
    with pytest.raises(BadInput, match=f"is in use by {ID}"):
        store.remove(A)
    assert store.prune(0) == []
    known.mark_undone("image")
    assert store.users() == {}
    assert [one.digest for one in store.prune(0)] == [A]


def test_many_users_are_counted(store: ImageStore, put: Put, settings: Settings) -> None:
    put(A)
    for number in range(7):
        begin(settings, A, f"sb-{number:016x}")
    with pytest.raises(BadInput, match="and 2 more"):
        store.remove(A)


def test_a_launch_that_waits_for_its_digest_uses_nothing(
    store: ImageStore, put: Put, settings: Settings
) -> None:
    put(A)
    begin(settings, None)
    assert store.users() == {}


@pytest.mark.parametrize("file", ["journal.jsonl", "journal.jsonl.torn-20260101T000000"])
def test_a_journal_that_cannot_be_read_keeps_every_image(
    store: ImageStore, put: Put, settings: Settings, file: str
) -> None:
    """It may name any of them."""
    put(A)
    folder = settings.sandboxes_dir / ID
    folder.mkdir(parents=True)
    (folder / file).write_text("torn")
    for act in (lambda: store.remove(A), lambda: store.prune(0)):
        with pytest.raises(ImageError, match=f"the journal of {ID} cannot be read"):
            act()
    (folder / file).unlink()
    assert store.remove(A).digest == A, "a folder without a journal has begun nothing"


def test_what_was_used_lately_is_not_pruned(store: ImageStore, put: Put) -> None:
    put(A, age_s=100)
    put(B, age_s=10)
    assert [one.digest for one in store.prune(50)] == [A]
    assert [one.digest for one in store.all()] == [B]


def test_a_removal_waits_for_a_use_that_has_begun(store: ImageStore, put: Put, settings: Settings) -> None:
    """The use writes its intent, then looks under the lock: who comes second sees the other."""
    put(A)
    handle = os.open(store.folder / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_SH)
    removal = threading.Thread(target=store.prune, args=(0,))
    removal.start()
    begin(settings, A)
    removal.join(0.1)
    assert removal.is_alive()
    os.close(handle)
    removal.join(5)
    assert store.find(A) is not None


def test_a_child_that_is_forked_meanwhile_keeps_no_lock(store: ImageStore, put: Put) -> None:
    """Celery's pool forks whenever a child has died, also while a thread of the worker has the lock."""
    place = leave(store, f".pulling-{'d' * 64}")
    with store._locked(fcntl.LOCK_EX), held(place):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        put(A)
        store.use(A)
        assert store.left_over() == [place.name]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# -- the limit of all ------------------------------------------------------------------------------


def limited(settings: Settings, most: int) -> ImageStore:
    return ImageStore(settings.model_copy(update={"images_bytes": most}))


def test_what_was_used_longest_ago_makes_room(put: Put, settings: Settings) -> None:
    put(A, 400, age_s=30)
    put(B, 400, age_s=20)
    put(C, 400, age_s=10)
    assert [one.digest for one in limited(settings, 1300).make_room(200)] == [A]
    assert [one.digest for one in limited(settings, 1300).make_room(200)] == []


def test_what_is_in_use_never_makes_room(put: Put, settings: Settings) -> None:
    put(A, 400, age_s=30)
    put(B, 400, age_s=20)
    begin(settings, A)
    assert [one.digest for one in limited(settings, 900).make_room(200)] == [B]


def test_nothing_goes_where_it_would_not_help(put: Put, settings: Settings) -> None:
    put(A, 800)
    put(B, 100)
    begin(settings, A)
    with pytest.raises(ImageError, match=r"beyond their limit of .*: the rest is in use"):
        limited(settings, 900).make_room(200)
    assert len(ImageStore(settings).all()) == 2


def test_no_limit_is_none(put: Put, settings: Settings) -> None:
    put(A, 20 << 30)
    assert limited(settings, 0).make_room(1 << 50) == []


# -- what killed ones leave ------------------------------------------------------------------------


def leave(store: ImageStore, name: str) -> Path:
    place = store.folder / name
    (place / "rootfs").mkdir(parents=True)
    (place / "rootfs/half").write_text("x")
    return place


@pytest.mark.parametrize(
    "name", [f".pulling-{'d' * 64}", f".removing-{'d' * 64}.0badcafe", ".pulling-resolve-1"]
)
def test_what_a_killed_one_left_is_found_and_removed(store: ImageStore, put: Put, name: str) -> None:
    put(A)
    leave(store, name)
    assert store.left_over() == [name]
    assert store.clean() == [name]
    assert store.find(A) is not None
    assert store.left_over() == []


def test_work_under_way_is_left_alone(store: ImageStore) -> None:
    place = leave(store, f".pulling-{'d' * 64}")
    with held(place) as is_ours:
        assert is_ours
        assert (store.left_over(), store.clean()) == ([], [])
        assert place.is_dir()


def test_a_pull_takes_nothing_over_from_a_killed_one(store: ImageStore) -> None:
    """After a power cut its blobs may be torn under their right names."""
    place = leave(store, f".pulling-{'d' * 64}")
    with working(place, lambda: None):
        assert list(place.iterdir()) == []


def test_whatever_fails_the_folder_goes(store: ImageStore) -> None:
    place = store.pulling("d" * 64)

    def work() -> None:
        with working(place, lambda: None):
            (place / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not place.exists()


def test_who_waits_for_another_pull_looks_whether_it_is_still_wanted(store: ImageStore) -> None:
    place, looks = leave(store, f".pulling-{'d' * 64}"), []

    def check() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise ImageError("image", "nobody waits for it")

    with held(place), pytest.raises(ImageError, match="nobody waits"), working(place, check):
        pass
    assert place.is_dir()


def test_strays_go_after_a_while_and_are_no_finding(store: ImageStore, put: Put, settings: Settings) -> None:
    put(A)
    store.note(REF, A)
    store.note(parse_image("new"), B)
    store.note(parse_image("old"), C)
    (store.folder / f"{C.replace(':', '-')}.used").touch()
    for file in (store.folder / "refs").iterdir():
        if "new" not in file.read_text():
            os.utime(file, (1, 1))
    assert image_audit.look(settings, []) == []
    store.clean()
    assert sorted(json.loads(one.read_text())["digest"] for one in (store.folder / "refs").iterdir()) == [
        A,
        B,
    ]
    assert names(store) == {f"{A.replace(':', '-')}{end}" for end in ("", ".used")}


def test_a_broken_entry_gives_way_to_a_pull_unless_it_is_in_use(
    store: ImageStore, put: Put, settings: Settings
) -> None:
    (put(A).folder / "image.json").unlink()
    put(A)
    (put(B).folder / "image.json").unlink()
    begin(settings, B)
    with pytest.raises(ImageError, match="broken, and in use"):
        put(B)
    assert store.left_over() == []


# -- the audit -------------------------------------------------------------------------------------


def problems(settings: Settings) -> list[tuple[str, str]]:
    journals = journal.read_all(settings.sandboxes_dir)[0]
    return [(Path(name).name[:14], problem) for name, problem, _, _ in image_audit.look(settings, journals)]


def test_the_audit_names_what_is_wrong_and_mends_what_is_ours(
    store: ImageStore, put: Put, settings: Settings
) -> None:
    put(A)
    assert problems(settings) == []
    (put(B).folder / "image.json").write_text("{")
    leave(store, f".pulling-{'d' * 64}")
    (store.folder / "notes.txt").write_text("somebody's")
    store.folder.chmod(0o755)
    assert problems(settings) == [
        ("images", "changed"),
        (".pulling-ddddd", "extra"),
        ("sha256-bbbbbbb", "unreadable"),
        ("notes.txt", "extra"),
    ]
    assert image_audit.put_right(settings) == {}
    assert problems(settings) == [("notes.txt", "extra")]
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert store.find(A) is not None


def test_the_audit_names_a_sandbox_whose_image_is_gone(put: Put, settings: Settings) -> None:
    image = put(A)
    known = begin(settings, A)
    known.mark_done("image", {"reference": str(REF), "digest": A, "rootfs": str(image.rootfs), "spec": {}})
    assert problems(settings) == []
    image.folder.rename(image.folder.with_name("elsewhere"))
    assert (A[:14], "missing") in problems(settings)
    known.set_facts(wanted="cancelled")
    assert (A[:14], "missing") not in problems(settings)


def test_a_broken_entry_in_use_is_kept_with_the_reason(put: Put, settings: Settings) -> None:
    image = put(A)
    begin(settings, A)
    (image.folder / "image.json").unlink()
    (reason,) = image_audit.put_right(settings).values()
    assert "in use" in reason


@pytest.mark.parametrize("change", ["more", "less", "content", "mode", "link"])
def test_the_deep_audit_finds_a_changed_image(
    store: ImageStore, put: Put, settings: Settings, change: str
) -> None:
    """It is never written, so that any change was somebody else's."""
    image = put(A)
    assert image_audit.check_contents(settings) == []
    file = image.rootfs / "etc/data"
    if change == "more":
        (image.rootfs / "new").touch()
    elif change == "less":
        file.unlink()
    elif change == "content":
        file.write_bytes(bytes(100))
    elif change == "mode":
        file.chmod(0o4755)
    else:
        file.unlink()
        file.symlink_to("/etc/passwd")
    ((name, problem, _, _),) = image_audit.check_contents(settings)
    assert (name, problem) == (str(image.folder), "changed")


@pytest.mark.parametrize("text", ["[" * 6000, '{"reference": 1}', "null", "", HALF])
def test_a_reference_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path, text):
    """Of two references the other one is still found."""
    known = References(tmp_path)
    known.note(parse_image("busybox:1"), "sha256:" + "a" * 64)
    (tmp_path / "torn.json").write_text(text)
    assert list(known.by_digest().values()) == [("docker.io/library/busybox:1",)]
    known.forget(tuple(name for names in known.by_digest().values() for name in names))
    os.utime(tmp_path / "torn.json", (0, 0))
    known.forget_strays(set())
    assert not (tmp_path / "torn.json").exists()


@pytest.mark.parametrize("name", ["size_bytes", "files", "dropped", "pulled_at"])
@pytest.mark.parametrize("value", ["Infinity", "1" + "0" * 400])
def test_a_description_with_numbers_that_none_can_hold_is_none(tmp_path, name, value):
    folder = tmp_path / f"sha256-{'a' * 64}"
    (folder / "rootfs").mkdir(parents=True)
    write_entry(folder, folder.name.replace("-", ":"), {}, measure(folder / "rootfs"), 0)
    about = json.loads((folder / "image.json").read_text()) | {name: 0}
    (folder / "image.json").write_text(json.dumps(about).replace(f'"{name}": 0', f'"{name}": {value}'))
    assert read_entry(folder, ()) is None
