"""Mount tables, and what a gofer has compared with what its bundle gives. The view itself needs a host."""

import os
from pathlib import Path, PurePosixPath

import pytest

from worker import mounted
from worker.errors import NotContained
from worker.mounted import Given, View, confirm, given_by, parse_mount

LINES = {
    b"20 1 254:0 / / ro,nosuid,nodev,relatime - ext4 /dev/vda rw": ("/", "/", []),
    b"23 20 0:40 /x /srv/a\\040b\\012 rw,nodev shared:1 - tmpfs none ro": (
        "/x",
        "/srv/a b\n",
        ["ro", "nosuid"],
    ),
    b"24 20 0:41 / /srv/\\303\\244\\134 ro,nosuid,nodev - tmpfs none rw": ("/", "/srv/\u00e4\\", []),
}


@pytest.mark.parametrize(("line", "expected"), LINES.items())
def test_a_line_is_read_with_its_escapes_and_the_flags_of_the_mount(line, expected):
    """Not those of the file system, which stand behind the dash."""
    found = parse_mount(line)
    assert (found.root, str(found.point), found.lacking) == expected


def test_our_own_table_can_be_read():
    assert PurePosixPath("/") in {one.point for one in mounted.mounts_of(os.getpid())}


def test_what_is_mounted_below_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a").mkdir()
    table = tmp_path / "mountinfo"
    escaped = str(tmp_path).encode() + b"/a\\040b/below"
    table.write_bytes(b"20 1 0:1 / / rw - ext4 none rw\n21 20 0:2 / %s rw - tmpfs none rw\n" % escaped)
    monkeypatch.setattr(mounted, "OWN_TABLE", table)
    assert mounted.mounted_below(tmp_path / "a b") == f"{tmp_path}/a b/below"
    assert mounted.mounted_below(Path("/")) == f"{tmp_path}/a b/below"
    assert mounted.mounted_below(tmp_path / "a") == ""


def test_a_config_gives_its_root_and_its_binds():
    bind = {"destination": "/data", "type": "bind", "source": "/srv/d", "options": ["bind", "ro"]}
    usr = {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
    proc = {"destination": "/proc", "type": "proc", "source": "proc", "options": []}
    hosts = {"destination": "/etc/hosts", "type": "bind", "source": "/state/sb/hosts", "options": ["bind"]}
    config = {"root": {"path": "/state/r"}, "mounts": [usr, proc, bind, hosts]}
    assert given_by(config, (Path("/state"), Path("/run/sandbatch"))) == [
        Given("/", "/state/r", is_own=True),
        Given("/usr", "/usr", is_recursive=True),
        Given("/data", "/srv/d"),
        Given("/etc/hosts", "/state/sb/hosts", is_own=True),
    ]


def table_of(*points: str, flags: str = "ro,nosuid,nodev") -> list[mounted.MountLine]:
    return [parse_mount(f"20 1 0:1 /src{point} {point} {flags} - ext4 none rw".encode()) for point in points]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (table_of("/"), "mount at /usr: runsc has not mounted it"),
        ([*table_of("/"), *table_of("/usr", flags="rw,nosuid,nodev")], "mount at /usr: .* without ro"),
        ([*table_of("/usr"), *table_of("/", flags="ro")], "mount at /: .* without nosuid, nodev"),
        (table_of("/", "/usr", "/etc"), "mount at /etc: the bundle has nothing there"),
        (table_of("/", "/usr", "/usr2"), "mount at /usr2: the bundle has nothing there"),
        ([*table_of("/", "/usr"), *table_of("/usr/share", flags="rw")], "mount at /usr/share: .* without ro"),
    ],
)
def test_what_a_gofer_has_is_compared_with_the_view(lines, words, monkeypatch):
    here = os.stat("/")
    expected = {"/": (here.st_dev, here.st_ino), "/usr": mounted._inode(Path("/usr"))}
    view = View(Path("/none"), expected, frozenset({"/usr"}))
    monkeypatch.setattr(mounted, "mounts_of", lambda _: lines)
    with pytest.raises(NotContained, match=words):
        confirm(os.getpid(), view)


def test_what_is_mounted_below_a_recursive_bind_may_be_there(monkeypatch):
    expected = {one: mounted._inode(Path(one)) for one in ("/", "/usr")}
    monkeypatch.setattr(mounted, "mounts_of", lambda _: table_of("/", "/usr", "/usr/share/x"))
    confirm(os.getpid(), View(Path("/none"), expected, frozenset({"/usr"})))


def test_another_folder_in_the_place_of_a_source_is_named(monkeypatch):
    """Somebody has put a symlink in its place between our look and runsc's mount."""
    expected = {"/": mounted._inode(Path("/")), "/usr": (0, 0)}
    monkeypatch.setattr(mounted, "mounts_of", lambda _: table_of("/", "/usr"))
    with pytest.raises(NotContained, match="mount at /usr: /src/usr was in its place"):
        confirm(os.getpid(), View(Path("/none"), expected, frozenset()))


def test_a_gofer_that_has_ended_is_told_in_words():
    with pytest.raises(NotContained, match="cannot be seen: No such file"):
        confirm(2**22 + 1, View(Path("/none"), {"/": (0, 0)}, frozenset()))
