"""The generated root of `host`, and which folders of users are taken."""

import os
import stat
import sys
from pathlib import Path

import pytest

from worker import rootfs
from worker.errors import BadInput
from worker.settings import Settings
from worker.tree import Tree


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "allowed").mkdir()
    return Settings(
        state_dir=tmp_path / "state", run_dir=tmp_path / "run", rootfs_allow=(tmp_path / "allowed",)
    )


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A host whose python is not below /usr."""
    prefix = tmp_path / "python"
    (prefix / "bin").mkdir(parents=True)
    monkeypatch.setattr(rootfs, "usr_has_python", lambda: False)
    monkeypatch.setattr(sys, "base_prefix", str(prefix))
    return prefix


def test_host_rootfs_has_the_tutorials_page(settings):
    assert (rootfs.host_rootfs(settings) / "var/www/html/index.html").read_text() == "Hello World!\n"


def test_host_rootfs_holds_no_secrets(settings):
    """Nothing of /root, /home, /var; of /etc only what everybody may read, and no key."""
    root = rootfs.host_rootfs(settings)
    assert os.listdir(root / "root") == []
    assert not (root / "home").exists()
    names = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert not {"etc/shadow", "etc/gshadow", "etc/ssl/private", "etc/ssh", "etc/sudoers"} & names
    for path in (root / "etc").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_host_rootfs_has_the_files_that_programs_need(settings):
    root = rootfs.host_rootfs(settings)
    for name in ("passwd", "group", "hosts", "nsswitch.conf", "resolv.conf"):
        assert (root / "etc" / name).read_text(), name
    for name in rootfs.PROGRAM_DIRS:
        assert Path("/", name).is_symlink() == (root / name).is_symlink(), name


def test_every_bind_has_its_mount_point_in_the_rootfs(settings, elsewhere):
    """Else runsc would make it there, in a folder that sandboxes share."""
    root = rootfs.host_rootfs(settings)
    for mount in rootfs.host_mounts(settings):
        assert (root / mount["destination"].lstrip("/")).is_dir(), mount


def test_host_rootfs_is_made_once(settings):
    first = rootfs.host_rootfs(settings)
    inode = first.stat().st_ino
    assert rootfs.host_rootfs(settings) == first
    assert first.stat().st_ino == inode
    assert stat.S_IMODE(first.stat().st_mode) == 0o755


def test_a_change_of_the_host_makes_a_new_generation(settings, elsewhere):
    before = rootfs.host_rootfs(settings)
    (elsewhere.parent / "python2/bin").mkdir(parents=True)
    sys.base_prefix = str(elsewhere.parent / "python2")
    after = rootfs.host_rootfs(settings)
    assert before != after
    assert before.is_dir()


def test_python_elsewhere_is_bound_at_the_same_path_and_comes_last_on_the_path(settings, elsewhere):
    assert str(elsewhere) in {mount["source"] for mount in rootfs.host_mounts(settings)}
    assert rootfs.host_path(settings) == f"{rootfs.DEFAULT_PATH}:{elsewhere}/bin"


def test_prune_keeps_todays_and_used_generations(settings, elsewhere):
    used = rootfs.host_rootfs(settings)
    folder = used.parent
    (folder / "host-0000000000000000").mkdir()
    (folder / ".building-left").mkdir()  # of a killed builder
    sys.base_prefix = "/nowhere/else"
    today = rootfs.host_rootfs(settings)
    gone = rootfs.prune_host_rootfs(settings, lambda: {used})
    assert {path.name for path in gone} == {"host-0000000000000000", ".building-left"}
    assert {path for path in folder.iterdir() if path.is_dir()} == {used, today}


def test_a_killed_builder_leaves_no_half_generation(settings, monkeypatch):
    def breaks(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(rootfs, "_write", breaks)
    with pytest.raises(KeyboardInterrupt):
        rootfs.host_rootfs(settings)
    assert [path for path in (settings.state_dir / "rootfs").iterdir() if path.is_dir()] == []


def test_a_folder_below_an_allowed_one_is_taken(settings, tmp_path):
    (tmp_path / "allowed/debian").mkdir()
    assert rootfs.resolve_rootfs(str(tmp_path / "allowed/debian"), settings) == tmp_path / "allowed/debian"


def test_a_symlink_that_leads_out_is_refused(settings, tmp_path):
    (tmp_path / "allowed/out").symlink_to("/etc")
    with pytest.raises(BadInput, match="not below an allowed folder"):
        rootfs.resolve_rootfs(str(tmp_path / "allowed/out"), settings)


@pytest.mark.parametrize(("name", "why"), [("missing", "no such folder"), ("file", "no folder")])
def test_a_rootfs_that_is_no_folder_is_refused(settings, tmp_path, name, why):
    (tmp_path / "allowed/file").touch()
    with pytest.raises(BadInput, match=why):
        rootfs.resolve_rootfs(str(tmp_path / "allowed" / name), settings)


def test_symlinks_of_a_rootfs_are_followed_inside_it(tmp_path):
    """An absolute link in somebody's rootfs means a folder of that rootfs, never of the host."""
    (tmp_path / "work").symlink_to("/etc/ssl")
    with pytest.raises(BadInput, match="cwd"):
        rootfs.check_cwd(Tree(folder=tmp_path), "/work")
    (tmp_path / "etc/ssl").mkdir(parents=True)
    rootfs.check_cwd(Tree(folder=tmp_path), "/work")
    (tmp_path / "loop").symlink_to("/loop")
    with pytest.raises(BadInput, match="cwd"):
        rootfs.check_cwd(Tree(folder=tmp_path), "/loop")
