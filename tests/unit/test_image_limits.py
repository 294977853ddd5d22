"""What one image may take, and the mount points it gets: by walks that never follow a link."""

import os
import socket
from pathlib import Path

import pytest

from worker import image_guard
from worker.errors import ImageError
from worker.image_guard import Guard, Size, measure
from worker.image_manifest import own_digest, parsed, read_config, total_size
from worker.image_points import make_point, make_points
from worker.settings import Settings

CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "rootfs"
    place.mkdir()
    return place


def test_a_tree_is_measured_as_it_lies_on_the_disk(root: Path) -> None:
    (root / "a").write_bytes(bytes(10_000))
    (root / "dir").mkdir()
    os.link(root / "a", root / "dir/again")
    (root / "out").symlink_to("/usr")
    size = measure(root)
    assert size.files == 4
    blocks = sum((root / one).lstat().st_blocks for one in ("a", "dir", "out"))
    assert size.bytes == 512 * blocks, "a hard link counts once, a link's target never"


def test_pipes_and_sockets_are_dropped(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(root / "socket"))
    (root / "file").touch()
    assert measure(root, drop=True).dropped == 2
    assert os.listdir(root) == ["file"]


def test_a_walk_ends_where_it_is_enough(root: Path) -> None:
    for number in range(20):
        (root / f"d{number}/sub").mkdir(parents=True)
    assert measure(root, enough=lambda size: size.files > 20).files < 30


def test_looks_at_a_tree_take_a_small_part_of_the_time(
    root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk over 100 000 files takes a while; umoci has the disk, too."""
    now, looks = [100.0], []

    def slow(*_: object, **__: object) -> Size:
        looks.append(now[0])
        now[0] += 1.0
        return Size()

    settings.images_dir.mkdir(parents=True)
    monkeypatch.setattr(image_guard, "measure", slow)
    monkeypatch.setattr(image_guard.time, "monotonic", lambda: now[0])
    guard = Guard(settings, "image a")
    for _ in range(100):
        guard.check_tree(root)
        now[0] += 0.2
    assert len(looks) <= 3


@pytest.mark.parametrize(
    ("size", "why"),
    [(Size(bytes=2 << 20), "larger than an image may be"), (Size(files=11), "more than 10 files")],
)
def test_too_much_is_refused(settings: Settings, size: Size, why: str) -> None:
    limits = {"image_max_bytes": 1 << 20, "image_max_files": 10}
    guard = Guard(settings.model_copy(update=limits), "image a")
    with pytest.raises(ImageError, match=why):
        guard.judge(size)
    guard.judge(Size(bytes=1 << 20, files=10))


@pytest.mark.parametrize("links", [["a -> a"], ["a -> b", "b -> a"], ["a -> /a/x"]])
def test_links_that_lead_round_make_no_mount_point(root: Path, links: list[str]) -> None:
    for one in links:
        name, _, target = one.partition(" -> ")
        (root / name).symlink_to(target)
    assert not make_point(root, "/a/point", is_file=False)
    assert sorted(os.listdir(root)) == [one[0] for one in links]


def test_what_is_in_the_way_stays(root: Path) -> None:
    (root / "file").write_text("x")
    (root / "dir").mkdir()
    assert not make_point(root, "/file/sub", is_file=False)
    assert not make_point(root, "/dir", is_file=True)
    assert not make_point(root, "/" + "n" * 300, is_file=False)
    assert make_point(root, "/dir/../../x", is_file=True)
    assert sorted(os.listdir(root)) == ["dir", "file", "x"]


@pytest.mark.parametrize(
    "config", [{}, {"config": None}, {"config": {"WorkingDir": 7, "Volumes": [1]}}, {"config": []}]
)
def test_a_configuration_may_be_anything(root: Path, config: dict[str, object]) -> None:
    assert make_points(root, config) == []
    assert (root / "etc/hosts").read_bytes() == b""


# -- manifests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_object_is_no_manifest(raw: bytes) -> None:
    assert parsed(raw) == {}


@pytest.mark.parametrize(
    ("layers", "total"),
    [([], 0), ([{"size": 3}, {"size": 4}], 7), ([{"size": -1}], None), ([{}], None), (None, 0)],
)
def test_sizes_are_added_where_all_are_named(layers: object, total: int | None) -> None:
    assert total_size("image a", {"config": CONFIG, "layers": layers}) == total


@pytest.mark.parametrize("index", [{"manifests": None}, {"manifests": [1, {}, {"platform": 1}]}])
def test_an_index_without_an_image_for_us_says_so(index: dict[str, object]) -> None:
    with pytest.raises(ImageError, match="has none for linux/"):
        own_digest("image a", index)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"manifests": []}', '{"manifests": [{"digest": "../../etc/passwd"}]}']
)
def test_a_layout_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ImageError, match="configuration cannot be read"):
        read_config("image a", tmp_path)
