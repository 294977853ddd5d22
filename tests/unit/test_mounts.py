"""Which host folders may be bound and where, and what the generated root has for that."""

import os
from pathlib import Path

import pytest

from worker import journal, rootfs, stages
from worker.bundle import make_config, own_mounts
from worker.errors import BadInput
from worker.mounts import check_source, lay_out
from worker.settings import Settings
from worker.spec import make_spec, new_container_id
from worker.tree import Tree


@pytest.fixture
def settings(tmp_path):
    for name in ("allowed/data/sub", "roots/debian/etc", "roots/debian/opt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "allowed/file").touch()
    (tmp_path / "roots/debian/etc/motd").touch()
    (tmp_path / "roots/debian/lib").symlink_to("opt")
    return Settings(
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        rootfs_allow=(tmp_path / "roots",),
        mount_allow=(tmp_path / "allowed",),
    )


@pytest.fixture
def laid_out(settings, tmp_path):
    """The layout of binds (target -> what of the allowed folder) and tmpfs."""

    def make(binds=None, *, tmpfs=(), root="host", cwd="/"):
        mounts = [
            {"type": "bind", "source": str(tmp_path / "allowed" / source), "target": target}
            for target, source in (binds or {}).items()
        ]
        mounts += [{"type": "tmpfs", "target": target, "size_bytes": 8192} for target in tmpfs]
        root = root if root == "host" else str(tmp_path / "roots" / root)
        spec = make_spec(args=["true"], mounts=mounts, rootfs=root, cwd=cwd)
        return lay_out(spec, own_mounts(spec, settings), settings)

    return make


def test_nothing_may_be_bound_unless_the_operator_says_so(settings, tmp_path):
    none = settings.model_copy(update={"mount_allow": ()})
    with pytest.raises(BadInput, match=r"allowed: none.*SANDBATCH_MOUNT_ALLOW"):
        check_source(str(tmp_path / "allowed/data"), none)


def test_a_folder_whose_name_begins_alike_is_not_below_it(settings, tmp_path):
    (tmp_path / "allowed2").mkdir()
    with pytest.raises(BadInput, match="not below"):
        check_source(str(tmp_path / "allowed2"), settings)


def test_a_link_is_followed_and_what_it_leads_to_is_bound(settings, tmp_path):
    """So that nobody can turn it elsewhere between our look and runsc's."""
    (tmp_path / "allowed/link").symlink_to("data")
    assert check_source(str(tmp_path / "allowed/link/sub"), settings) == tmp_path / "allowed/data/sub"
    (tmp_path / "allowed/out").symlink_to("..")
    with pytest.raises(BadInput, match="not below"):
        check_source(str(tmp_path / "allowed/out"), settings)
    (tmp_path / "allowed/loop").symlink_to("loop")
    with pytest.raises(BadInput, match="no such folder"):
        check_source(str(tmp_path / "allowed/loop"), settings)


def test_an_allowed_folder_may_itself_be_a_link(settings, tmp_path):
    (tmp_path / "srv").symlink_to("allowed")
    linked = settings.model_copy(update={"mount_allow": (tmp_path / "srv",)})
    assert check_source(str(tmp_path / "srv/data"), linked) == tmp_path / "allowed/data"


def test_pipes_are_refused_without_waiting_for_a_writer(settings, tmp_path):
    os.mkfifo(tmp_path / "allowed/pipe")
    with pytest.raises(BadInput, match="pipe"):
        check_source(str(tmp_path / "allowed/pipe"), settings)


@pytest.mark.parametrize("source", ["/proc/self", "/sys/kernel", "/dev/fd", "/proc/version"])
def test_the_kernels_own_files_are_refused_even_where_all_is_allowed(settings, source):
    everything = settings.model_copy(update={"mount_allow": (Path("/"),)})
    with pytest.raises(BadInput, match="kernel's"):
        check_source(source, everything)


@pytest.mark.parametrize("source", ["state", "state/sandboxes", "run", "."])
def test_our_own_files_are_refused_and_what_holds_them(settings, tmp_path, source):
    """Journals have what others gave their sandboxes in the environment."""
    (tmp_path / "state/sandboxes").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    everything = settings.model_copy(update={"mount_allow": (tmp_path,)})
    with pytest.raises(BadInput, match="sandbatch's own"):
        check_source(str(tmp_path / source), everything)


def test_binds_are_read_only_and_not_recursive(laid_out, tmp_path):
    [bind] = [one for one in laid_out({"/data": "data"}).mounts if one["destination"] == "/data"]
    assert bind == {
        "destination": "/data",
        "type": "bind",
        "source": str(tmp_path / "allowed/data"),
        "options": ["bind", "ro", "nosuid", "nodev"],
    }


def test_parents_come_before_children(laid_out):
    layout = laid_out({"/a/sub": "data", "/a": "data"}, tmpfs=["/a/sub/b", "/dev/shm", "/tmp"])
    places = [one["destination"] for one in layout.mounts]
    assert places == sorted(places, key=lambda place: place.count("/"))
    assert len(places) == len(set(places))  # a tmpfs of the spec is instead of ours
    shm = next(one for one in layout.mounts if one["destination"] == "/dev/shm")
    assert "size=8192" in shm["options"]


@pytest.mark.parametrize(
    "target", ["/proc", "/sys/fs", "/dev", "/dev/null", "/", "/../etc", "//proc", "/./dev"]
)
def test_a_target_that_would_break_the_sandbox_is_refused(laid_out, target):
    with pytest.raises(BadInput, match="mounts"):
        laid_out(tmpfs=[target])


def test_two_spellings_of_one_target_are_one_too_many(laid_out):
    with pytest.raises(BadInput, match="same target"):
        laid_out(tmpfs=["/a/b", "/a//b/"])


def test_the_generated_root_is_given_the_mount_points_that_it_lacks(laid_out, settings):
    layout = laid_out({"/data": "data", "/opt/x/conf": "file", "/root": "data", "/etc/passwd": "file"})
    assert layout.points == {"data": "dir", "opt/x/conf": "file"}
    root = rootfs.host_rootfs(settings, layout.points)
    assert (root / "data").is_dir()
    assert (root / "opt/x/conf").read_bytes() == b""
    assert root != rootfs.host_rootfs(settings)


def test_what_the_planned_root_holds_is_what_the_made_one_holds(settings):
    """The plan is asked before the folder is made, and by a dry run that makes none."""
    made, planned = Tree(folder=rootfs.host_rootfs(settings)), rootfs.host_tree()
    found = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*")}
    assert found == set(planned.planned) - {"."}
    for name in found:
        assert made.look(Path("/", name)) == planned.look(Path("/", name)), name


def test_a_point_below_another_bind_must_lie_in_its_source(laid_out, tmp_path):
    assert laid_out({"/data": "data", "/data/sub": "data"}).points == {"data": "dir"}
    with pytest.raises(BadInput, match=f"mkdir -p {tmp_path}/allowed/data/new"):
        laid_out({"/data": "data", "/data/new": "data"})


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        ("/mnt", "data", "mkdir -p {}/mnt"),
        ("/etc/new", "file", "mkdir -p {0}/etc && touch {0}/etc/new"),
        ("/etc/motd", "data", "is a file and the source a folder"),
        ("/opt", "file", "is a folder and the source a file"),
        ("/etc/motd/x", "file", "/etc/motd is a file"),
        ("/lib/x", "data", "/lib is a symlink"),
    ],
)
def test_a_folder_of_the_user_is_not_given_any(laid_out, tmp_path, target, source, words):
    before = sorted((tmp_path / "roots").rglob("*"))
    with pytest.raises(BadInput) as refused:
        laid_out({target: source}, root="debian")
    assert words.format(tmp_path / "roots/debian") in str(refused.value)
    assert sorted((tmp_path / "roots").rglob("*")) == before


def test_a_tmpfs_needs_no_mount_point_unless_one_works_in_it(laid_out):
    """gVisor makes it in memory; the working directory runsc would make in the rootfs."""
    assert laid_out(tmpfs=["/scratch"]).points == {}
    assert laid_out(tmpfs=["/scratch"], root="debian").points == {}
    assert laid_out(tmpfs=["/scratch"], cwd="/scratch/").points == {"scratch": "dir"}
    with pytest.raises(BadInput, match="make it there"):
        laid_out(tmpfs=["/scratch"], root="debian", cwd="/scratch")


def test_a_working_directory_may_lie_in_a_bind(laid_out):
    laid_out({"/data": "data"}, cwd="/data/sub")
    with pytest.raises(BadInput, match="cwd"):
        laid_out({"/data": "data"}, cwd="/data/nothing")
    with pytest.raises(BadInput, match="cwd"):
        laid_out({"/data": "file"}, cwd="/data")


def test_a_config_that_is_only_looked_at_makes_nothing(settings, tmp_path):
    spec = make_spec(
        args=["true"],
        mounts=[{"type": "bind", "source": str(tmp_path / "allowed/data"), "target": "/data"}],
    )
    looked = make_config(spec, "sb-0", Path("/netns"), settings, build=False)
    assert not (tmp_path / "state").exists()
    assert make_config(spec, "sb-0", Path("/netns"), settings) == looked
    assert Path(looked["root"]["path"], "data").is_dir()


def test_a_root_that_a_journal_has_is_not_pruned(settings):
    """From the intent on: the folder is looked for, and used, after that."""
    kept, gone = (rootfs.host_rootfs(settings, {name: "dir"}) for name in ("kept", "gone"))
    spec = make_spec(args=["true"])
    known = journal.create(settings.sandboxes_dir, new_container_id(), attempt=1, batch="b", spec=spec)
    known.mark_begun("bundle", {"rootfs": str(kept)})
    assert stages.prune_rootfs(settings) == [gone]
    known.mark_undone("bundle")
    assert stages.prune_rootfs(settings) == [kept]


def test_nothing_is_pruned_while_a_journal_cannot_be_read(settings):
    """Its sandbox may run on a root of which nobody else knows."""
    rootfs.host_rootfs(settings, {"somebodys": "dir"})
    folder = settings.sandboxes_dir / new_container_id()
    folder.mkdir(parents=True)
    (folder / journal.FILE).touch()
    assert stages.prune_rootfs(settings) == []
