"""A tar that a sandbox has made may be anything: nothing is written outside, and nothing in part."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from cli.unpack import Source, unpack
from worker.errors import SandbatchError


def member(name: str, content: bytes | None = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes | None]:
    made = tarfile.TarInfo(name)
    made.size = len(content or b"")
    for field, value in fields.items():
        setattr(made, field, value)
    return made, content


def folder(name: str) -> tuple[tarfile.TarInfo, None]:
    return member(name, None, type=tarfile.DIRTYPE)[0], None


def link(name: str, aim: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, None]:
    return member(name, None, type=kind, linkname=aim)[0], None


def stream(*members: tuple[tarfile.TarInfo, bytes | None], cut: int | None = None) -> Source:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    data = raw.getvalue()[:cut]
    return Source(data[start : start + 1000] for start in range(0, len(data), 1000))


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_a_folder_comes_with_its_files_links_and_modes(tmp_path):
    parts = (folder("./out"), member("./out/a", b"A" * 5000, mode=0o755), folder("./out/sub"))
    links = (link("./out/sub/up", "../a"), link("./out/same", "./out/a", tarfile.LNKTYPE))
    assert unpack(stream(*parts, *links), "out", tmp_path / "mine") == []
    assert tree(tmp_path) == {"mine/a": "A" * 5000, "mine/same": "A" * 5000, "mine/sub/up": "../a"}
    assert (tmp_path / "mine" / "a").stat().st_mode & 0o777 == 0o755


def test_a_file_takes_the_place_of_a_file(tmp_path):
    (tmp_path / "mine").write_text("old")
    unpack(stream(member("./a", b"new")), "a", tmp_path / "mine")
    assert tree(tmp_path) == {"mine": "new"}


@pytest.mark.parametrize(
    "bad",
    [
        (member("../evil"),),
        (member("/etc/evil"),),
        (member("./out/../../evil"),),
        (member("./other"),),
        (member("./out", b"file"), member("./out/x")),
        (),
    ],
)
def test_names_that_lead_out_are_refused_and_nothing_is_written(tmp_path, bad):
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(SandbatchError):
        unpack(stream(*bad), "out", inside / "mine")
    assert tree(tmp_path) == {}
    assert os.listdir(inside) == []


def test_links_that_lead_out_and_devices_are_left_out(tmp_path):
    """Folders of a system have them: the rest is worth having."""
    parts = (
        folder("./out"),
        link("./out/abs", "/etc/passwd"),
        link("./out/up", "../../x"),
        link("./out/hard", "/etc/passwd", tarfile.LNKTYPE),
        member("./out/dev", None, type=tarfile.CHRTYPE),
        member("./out/a", b"A"),
    )
    left = unpack(stream(*parts), "out", tmp_path / "mine")
    assert len(left) == 4
    assert tree(tmp_path) == {"mine/a": "A"}


def test_no_file_is_written_through_a_link(tmp_path):
    """A link first, then a file below it: the classic way out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    inside = tmp_path / "inside"
    inside.mkdir()
    parts = (folder("./out"), link("./out/d", "."), link("./out/d/e", ".."), member("./out/d/e/evil", b"E"))
    left = unpack(stream(*parts), "out", inside / "mine")
    assert left
    assert tree(inside) == {"mine/d/e/evil": "E"}
    assert not (inside / "mine" / "d").is_symlink()


def test_a_stream_that_breaks_off_writes_nothing(tmp_path):
    with pytest.raises(SandbatchError, match="no whole tar"):
        unpack(stream(folder("./out"), member("./out/a", b"A" * 5000), cut=2000), "out", tmp_path / "mine")
    assert os.listdir(tmp_path) == []


def test_a_folder_never_takes_the_place_of_what_is_there(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SandbatchError, match="there already"):
        unpack(stream(folder("./out")), "out", tmp_path / "mine")
