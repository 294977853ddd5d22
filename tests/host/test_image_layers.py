"""Layers are hostile: what umoci makes of them stays inside the image, and the image within its limits."""

import os
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.layers import Member, blobs_of, device, file, folder, hardlink, layout, symlink, tar
from worker.errors import ImageError
from worker.image_pull import pull, resolve
from worker.image_ref import parse_image
from worker.image_store import Image, ImageStore
from worker.settings import Settings

Bring = Callable[..., Image]
SECRET = "nobody's business"
CAPABILITY = "SCHILY.xattr.security.capability"
NET_RAW = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)  # cap_net_raw=ep, revision 2


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the host that layers try to reach."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_text(SECRET)
    return place


@pytest.fixture
def settings(tmp_path: Path, image_parts: None) -> Settings:
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def bring(tmp_path: Path, settings: Settings) -> Bring:
    """Pull an image of these layers; whatever comes of it, nothing but whole images is in the store."""

    def bring(layers: Sequence[Sequence[Member] | bytes], config: Any = None, **changes: Any) -> Image:
        current = settings.model_copy(update=changes)
        ref = parse_image(f"oci:{layout(tmp_path / uuid4().hex, {'v1': blobs_of(layers, config)})}:v1")
        stop = threading.Event()
        try:
            digest = resolve(current, ref, 10, stop)
            return pull(current, ref, digest, timeout_s=60, progress=lambda _: None, stop=stop)
        finally:
            names = {one for one in os.listdir(current.images_dir) if not one.startswith("sha256-")}
            assert names <= {".lock", "refs"}

    return bring


def names_in(root: Path) -> set[str]:
    return {str(one.relative_to(root)) for one in root.rglob("*")}


def untouched(outside: Path) -> bool:
    return os.listdir(outside) == ["secret"] and (outside / "secret").read_text() == SECRET


@pytest.mark.parametrize("up", ["../" * 30, "/" + "../" * 30, "a/../../" + "../" * 30])
def test_a_name_with_dots_stays_inside(bring: Bring, outside: Path, up: str) -> None:
    """The oldest trick there is."""
    image = bring([[file(f"{up}{outside}/secret", b"stolen"), file(f"{up}etc/cron.d/evil", b"x")]])
    assert untouched(outside)
    assert not Path("/etc/cron.d/evil").exists()
    assert (image.rootfs / "etc/cron.d/evil").exists()


def test_an_absolute_name_stays_inside(bring: Bring, outside: Path) -> None:
    image = bring([[file(f"{outside}/secret", b"stolen")]])
    assert untouched(outside)
    assert (image.rootfs / str(outside).lstrip("/") / "secret").read_bytes() == b"stolen"


def test_nothing_is_written_through_a_link_to_a_folder_outside(bring: Bring, outside: Path) -> None:
    """In one layer, and in the next, where the link is there already."""
    bring(
        [
            [symlink("a", str(outside)), file("a/secret", b"stolen"), file("a/new", b"x")],
            [file("a/more", b"x"), symlink("b", "../" * 30 + str(outside).lstrip("/"))],
            [
                file("b/secret", b"stolen"),
                folder("b/dir"),
                symlink("b/link", "x"),
                hardlink("b/hard", "a/new"),
            ],
        ]
    )
    assert untouched(outside)


def test_nothing_is_written_through_a_link_to_a_file_outside(bring: Bring, outside: Path) -> None:
    image = bring(
        [
            [symlink("a", f"{outside}/secret"), file("a", b"stolen")],
            [symlink("b", f"{outside}/secret")],
            [file("b", b"stolen", mode=0o4777)],
        ]
    )
    assert untouched(outside)
    assert (image.rootfs / "a").read_bytes() == b"stolen"
    assert stat.S_IMODE((outside / "secret").stat().st_mode) & 0o4111 == 0


def test_a_hard_link_to_a_file_outside_is_none(bring: Bring, outside: Path) -> None:
    """Else the image's own file would be the host's, to read and to write."""
    link, inside = symlink("up", str(outside)), f"{'../' * 30}{outside}/secret"
    with suppress(ImageError):
        bring([[link, hardlink("b", "up/secret")]])
    with pytest.raises(ImageError, match="no such file"):
        bring([[hardlink("a", inside)]])
    assert untouched(outside)
    assert (outside / "secret").stat().st_nlink == 1


@pytest.mark.parametrize("name", [".", "./", "/", "a/..", "./."])
def test_the_root_itself_cannot_be_made_a_link(bring: Bring, outside: Path, name: str) -> None:
    """CVE-2021-29136 of umoci: an entry for the root that is a link, and all others go through it."""
    with suppress(ImageError):
        bring([[folder("a"), symlink(name, str(outside)), file("secret", b"stolen"), file("new")]])
    assert untouched(outside)


def test_device_nodes_pipes_and_sockets_stay_out(bring: Bring) -> None:
    """A node of the host's disk would be the host's disk, for whoever reaches it."""
    image = bring(
        [
            [
                device("dev/sda", tarfile.BLKTYPE, 8, 0),
                device("dev/null"),
                device("a/b/mem", tarfile.CHRTYPE, 1, 1),
                device("pipe", tarfile.FIFOTYPE),
                file("a/b/kept", b"x"),
            ]
        ]
    )
    found = [os.lstat(image.rootfs / one) for one in names_in(image.rootfs)]
    assert {stat.S_IFMT(one.st_mode) for one in found} == {stat.S_IFDIR, stat.S_IFREG}
    assert image.dropped == 4
    assert (image.rootfs / "a/b/kept").read_bytes() == b"x"


def test_setuid_and_capabilities_are_kept_out_of_reach(bring: Bring, settings: Settings) -> None:
    """The sandbox has them as the image says; on the host nobody but root comes near."""
    capable = file("bin/capable", b"x", 0o755, pax_headers={CAPABILITY: NET_RAW.decode("latin-1")})
    image = bring(
        [[file("bin/su", b"x", 0o4755, uid=0), file("bin/sg", b"x", 0o2755, gid=7, uid=33), capable]]
    )
    su, sg = (image.rootfs / "bin/su").stat(), (image.rootfs / "bin/sg").stat()
    assert stat.S_IMODE(su.st_mode) == 0o4755
    assert (stat.S_IMODE(sg.st_mode), sg.st_uid, sg.st_gid) == (0o2755, 33, 7)
    for place in (settings.images_dir, image.folder):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert place.stat().st_uid == 0


def test_whiteouts_hide_what_lies_below_and_nothing_else(bring: Bring, outside: Path) -> None:
    image = bring(
        [
            [file("a/gone"), file("a/kept"), file("b/old"), file("b/sub/old"), file("c/x")],
            [file("a/.wh.gone"), file("b/.wh..wh..opq"), file("b/new"), file(".wh.c")],
        ]
    )
    assert {one for one in names_in(image.rootfs) if one[:2] in ("a/", "b/", "c", "c/")} == {
        "a/kept",
        "b/new",
    }


@pytest.mark.parametrize(
    "name", [".wh...", ".wh..", ".wh.", "a/.wh...", "../" * 9 + ".wh.etc", "up/.wh.secret", "up/.wh..wh..opq"]
)
def test_a_whiteout_removes_nothing_outside(
    bring: Bring, outside: Path, settings: Settings, name: str
) -> None:
    """`..` is a name, too; and the folder of a whiteout may be a link."""
    (settings.images_dir / "refs").mkdir(parents=True)
    beside = settings.images_dir / "sha256-beside"
    beside.mkdir()
    with suppress(ImageError):
        bring([[file("a/x"), symlink("up", str(outside))], [file(name)]])
    assert untouched(outside)
    assert beside.is_dir()
    assert Path("/etc/passwd").exists()


def test_mount_points_are_made_in_the_image_not_on_the_host(bring: Bring, outside: Path) -> None:
    """Links in their way lead inside the sandbox's root, as they will for the sandbox."""
    away = str(outside)
    image = bring(
        [
            [
                folder("etc"),
                symlink("etc/hosts", f"{away}/hosts"),
                symlink("etc/resolv.conf", "../" * 20 + f"{away[1:]}/resolv.conf"),
                symlink("dev", "/../../devices"),
                symlink("run", "run"),
                file("proc", b"in the way"),
                symlink("work", f"{away}/secret"),
            ]
        ],
        {
            "WorkingDir": "/work/dir",
            "Volumes": {"/v/data": {}, "/work": {}, "relative": {}, "/" + "n" * 300: {}},
        },
    )
    assert untouched(outside)
    inside = image.rootfs / away[1:]
    assert (inside / "hosts").is_file()
    assert (inside / "resolv.conf").is_file()
    assert (inside / "secret/dir").is_dir()
    assert (image.rootfs / "v/data").is_dir()
    assert (image.rootfs / "devices/shm").is_dir()
    assert (image.rootfs / "proc").is_file()
    assert os.readlink(image.rootfs / "run") == "run"


def test_a_plain_image_gets_its_mount_points(bring: Bring) -> None:
    image = bring([[file("bin/sh", b"x", 0o755)]], {"WorkingDir": "/app/src"})
    assert {"etc/hosts", "etc/resolv.conf", "proc", "sys", "dev/shm", "app/src"} <= names_in(image.rootfs)
    assert stat.S_IMODE((image.rootfs / "tmp").stat().st_mode) == 0o1777
    assert image.files == len(names_in(image.rootfs))


def test_too_many_files_end_the_unpacking(bring: Bring) -> None:
    """100 000 empty files are small as a layer; each takes an inode of the host."""
    began = time.monotonic()
    with pytest.raises(ImageError, match="more than 5000 files"):
        bring([[file(f"d{number % 100}/{number}") for number in range(12_000)]], image_max_files=5000)
    assert time.monotonic() - began < 20


def test_a_bomb_of_zeros_is_ended(bring: Bring) -> None:
    """Some 100 KB that become 100 MB, in many files, so that no limit of one file catches them."""
    layer = [file(f"zeros{number}", bytes(1 << 20)) for number in range(100)]
    with pytest.raises(ImageError, match="larger than an image may be"):
        bring([layer], image_max_bytes=20 << 20)


def test_one_huge_file_is_ended_before_it_is_there(bring: Bring) -> None:
    with pytest.raises(ImageError, match="larger than"):
        bring([[file("zeros", bytes(100 << 20))]], image_max_bytes=20 << 20)


def test_odd_names_are_only_names(bring: Bring) -> None:
    names = ["new\nline", "-rf", "$(id)", "a b", "é", "x" * 255, "dup"]
    image = bring(
        [[file(name, b"1") for name in names] + [file("dup", b"2"), folder("twice"), file("twice", b"3")]]
    )
    assert set(names) <= names_in(image.rootfs)
    assert (image.rootfs / "dup").read_bytes() == b"2"


def test_a_tree_deeper_than_a_path_is_long_leaves_nothing(bring: Bring, settings: Settings) -> None:
    """Python's own rmtree ends with a RecursionError here."""
    with suppress(ImageError):
        bring([[folder("d/" * 1500), file("d/" * 1400 + "x")]])
    store = ImageStore(settings)
    for image in store.all():
        store.remove(image.digest)
    assert [name for name in os.listdir(settings.images_dir) if name not in (".lock", "refs")] == []


def test_a_layer_that_ends_too_soon_is_refused(bring: Bring) -> None:
    with pytest.raises(ImageError):
        bring([tar([file("a", b"x" * 4000)])[:1500]])
