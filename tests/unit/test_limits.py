"""Limits: what config.json says of them, which trees there are, and what is refused."""

from pathlib import Path

import pytest

from worker import audit, limits
from worker.bundle import make_config
from worker.errors import BadInput, SandbatchError
from worker.launch import with_host_limits
from worker.limits import Tree, find_trees
from worker.settings import Settings
from worker.spec import Spec, make_spec
from worker.stages import bundle_data

ONE = "sb-00000000000000a1"
CGROUP = f"/sandbatch/{ONE}"
# Of real machines: hybrid with joined controllers; systemd's unified; docker with a v1 tree of its own.
HYBRID = """\
25 20 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:32 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:33 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
"""
UNIFIED = "35 25 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
NESTED = "900 899 0:33 /docker/0af5 /sys/fs/cg\\040roup/memory rw master:16 - cgroup cgroup rw,memory\n"


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make these trees those of the machine: name -> controllers; `v2` is the unified one."""

    def make(**wanted: str) -> dict[str, Path]:
        found = [
            Tree(tmp_path / name, frozenset(text.split(",")), name == "v2") for name, text in wanted.items()
        ]
        for tree in found:
            tree.mount.mkdir()
        monkeypatch.setattr(limits, "trees", lambda: tuple(found))
        return {tree.mount.name: tree.mount for tree in found}

    return make


def test_trees_are_found_by_their_type_wherever_they_are_mounted():
    assert [(str(tree.mount), tree.is_v2) for tree in find_trees(HYBRID)] == [
        ("/sys/fs/cgroup/unified", True),
        ("/sys/fs/cgroup/systemd", False),
        ("/sys/fs/cgroup/cpu,cpuacct", False),
        ("/sys/fs/cgroup/memory", False),
    ]
    assert {"cpu", "cpuacct"} <= list(find_trees(HYBRID))[2].controllers
    assert [(str(tree.mount), tree.is_v2) for tree in find_trees(UNIFIED)] == [("/sys/fs/cgroup", True)]
    assert [str(tree.mount) for tree in find_trees(NESTED)] == ["/sys/fs/cg roup/memory"]
    assert list(find_trees("")) == []


def test_the_controllers_of_v2_count_only_where_there_is_no_v1(trees):
    """runsc takes a hybrid machine for v1, and never looks into its unified tree."""
    trees(memory="rw,memory", v2="io")
    assert "memory" in limits.controllers()
    assert "io" not in limits.controllers()


def config(tmp_path: Path, **fields) -> dict:
    settings = Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    return make_config(make_spec(args=["true"], **fields), ONE, Path("/var/run/netns") / ONE, settings)


def test_config_has_the_limits(tmp_path, trees):
    mounts = trees(memory="rw,memory", cpu="rw,cpu", pids="rw,pids")
    (mounts["memory"] / "memory.memsw.limit_in_bytes").touch()
    made = config(tmp_path, memory_bytes=64 * 2**20, cpus=0.5, pids=20)
    assert made["linux"]["cgroupsPath"] == f"/sandbatch/{ONE}"
    assert made["linux"]["resources"] == {
        "memory": {"limit": 64 * 2**20, "swap": 64 * 2**20},
        "cpu": {"quota": 50_000, "period": 100_000},
        "pids": {"limit": limits.most_host_tasks(20)},
    }
    assert {"type": "RLIMIT_NPROC", "soft": 20, "hard": 20} in made["process"]["rlimits"]


def test_without_swap_accounting_there_is_no_limit_of_swap(tmp_path, trees):
    """runsc would fail to write it."""
    trees(memory="rw,memory", cpu="rw,cpu")
    made = config(tmp_path, memory_bytes=64 * 2**20)
    assert made["linux"]["resources"] == {"memory": {"limit": 64 * 2**20}}


def test_who_asks_for_nothing_has_no_cgroup(tmp_path, trees):
    trees(memory="rw,memory", cpu="rw,cpu", pids="rw,pids")
    for fields in ({}, {"pids": 1024}):
        assert not {"cgroupsPath", "resources"} & set(config(tmp_path, **fields)["linux"])
    assert "cgroupsPath" in config(tmp_path, pids=1000)["linux"]


def test_a_limit_of_processes_works_without_cgroups(tmp_path, trees):
    """RLIMIT_NPROC needs none; of memory it would be a lie, and is refused."""
    trees()
    made = config(tmp_path, pids=20)
    assert "cgroupsPath" not in made["linux"]
    assert {"type": "RLIMIT_NPROC", "soft": 20, "hard": 20} in made["process"]["rlimits"]
    limits.check_here(make_spec(args=["true"], pids=20))
    with pytest.raises(BadInput, match="cpus: this host lacks the cgroup controllers"):
        limits.check_here(make_spec(args=["true"], cpus=1.0))


def test_v2_needs_more_than_what_is_limited(trees):
    """runsc fails without: `mandatory cgroup controller "pids" is missing` (both runscs)."""
    spec = make_spec(args=["true"], memory_bytes=2**30)
    trees(v2="cpu,memory,pids")
    with pytest.raises(BadInput, match="memory: this host lacks the cgroup controllers cpuset, io;"):
        limits.check_here(spec)


@pytest.mark.parametrize("has_swap", [True, False])
def test_v2_has_one_tree_with_all_of_them(tmp_path, trees, has_swap):
    mount = trees(v2="cpu,cpuset,memory,pids,io")["v2"]
    (mount / "system.slice").mkdir()
    for name in ("memory.max", *(["memory.swap.max"] if has_swap else [])):
        (mount / "system.slice" / name).touch()
    limits.check_here(make_spec(args=["true"], memory_bytes=2**30))
    memory = config(tmp_path, memory_bytes=2**30)["linux"]["resources"]["memory"]
    assert memory == {"limit": 2**30, **({"swap": 2**30} if has_swap else {})}
    limits.prepare(CGROUP)
    limits.prepare(CGROUP)
    assert (mount / limits.DEFAULT_PARENT).is_dir()


def test_in_v1_runsc_makes_the_folder_for_all_of_ours(trees):
    mounts = trees(memory="rw,memory", v2="")
    limits.prepare(CGROUP)
    assert [list(mount.iterdir()) for mount in mounts.values()] == [[], []]


def test_the_defaults_of_a_host_fill_what_is_not_said(trees):
    trees(memory="rw,memory", cpu="rw,cpu")
    asked = make_spec(args=["true"], memory_bytes=2**30)
    spec = with_host_limits(asked, Settings(default_memory="512m", default_cpus=2.0))
    assert (spec.memory_bytes, spec.cpus, spec.pids) == (2**30, 2.0, 1024)
    assert Spec(**spec.model_dump()) == spec  # a journal can be read again
    assert with_host_limits(asked, Settings(default_pids=0)) == asked
    with pytest.raises(BadInput, match="give it 24m or more"):
        with_host_limits(make_spec(args=["true"], memory_bytes=2**20), Settings())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memory_bytes": 8 * 2**20}, "memory: .*do not start in 8m; give it 24m or more"),
        ({"memory_bytes": limits.LEAST_MEMORY - 1}, "do not start in 24.0m; give it 24m or more"),
    ],
)
def test_too_little_is_refused_with_the_least_that_works(fields, words):
    with pytest.raises(BadInput, match=words):
        limits.check(make_spec(args=["true"], **fields))


def test_the_least_is_enough():
    limits.check(make_spec(args=["true"], memory_bytes=limits.LEAST_MEMORY, cpus=limits.LEAST_CPUS, pids=1))


@pytest.mark.parametrize(
    ("size", "words"),
    [(2**30, "1g"), (3 * 2**29, "1536m"), (64 * 2**20, "64m"), (2**20 + 1, "1.0m"), (1000, "1000")],
)
def test_sizes_are_said_as_they_are_asked_for(size, words):
    assert limits.in_words(size) == words


@pytest.mark.parametrize(
    ("name", "file", "text", "was"),
    [
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", True),
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n", False),
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", False),  # before Linux 4.13
        ("v2", "memory.events", "low 0\nmax 51\noom 1\noom_kill 2\noom_group_kill 0\n", True),
        ("v2", "memory.events", "low 0\nmax 51\noom 1\noom_kill 0\noom_group_kill 0\n", False),
    ],
)
def test_the_kernel_says_whether_it_killed(trees, name, file, text, was):
    folder = trees(**{name: "rw,memory"})[name] / limits.DEFAULT_PARENT / ONE
    assert not limits.was_oom_killed(CGROUP)  # no cgroup at all
    folder.mkdir(parents=True)
    (folder / file).write_text(text)
    assert limits.was_oom_killed(CGROUP) is was


def test_a_cgroup_goes_from_every_tree_and_its_neighbours_stay(trees):
    mounts = trees(memory="rw,memory", cpu="rw,cpu", v2="")
    for mount in mounts.values():
        for name in (ONE, "sb-00000000000000a2"):
            (mount / limits.DEFAULT_PARENT / name).mkdir(parents=True)
    limits.remove_cgroups(CGROUP)
    limits.remove_cgroups(CGROUP)
    left = {path.name for mount in mounts.values() for path in (mount / limits.DEFAULT_PARENT).iterdir()}
    assert left == {"sb-00000000000000a2"}


def test_a_cgroup_that_cannot_go_is_an_error_that_names_it(trees):
    """The undo stays due, and audit goes on showing it."""
    folder = trees(memory="rw,memory")["memory"] / limits.DEFAULT_PARENT / ONE
    (folder / "child").mkdir(parents=True)
    with pytest.raises(SandbatchError, match=f"cgroup .*{ONE}"):
        limits.remove_cgroups(CGROUP, timeout_s=0)


def test_the_setting_says_where_cgroups_lie_and_the_journal_where_one_was_made(tmp_path, trees):
    """Who changes the setting while sandboxes live must not lose their cgroups."""
    trees(memory="rw,memory", cpu="rw,cpu")
    settings = Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run", cgroup_parent="mine")
    made = make_config(make_spec(args=["true"], cpus=1.0), ONE, Path("/var/run/netns") / ONE, settings)
    assert made["linux"]["cgroupsPath"] == f"/mine/{ONE}"
    assert limits.made_cgroup(bundle_data(made), ONE) == f"/mine/{ONE}"
    assert limits.made_cgroup({"has_cgroup": True}, ONE) == CGROUP  # of release 0.1.0
    assert limits.made_cgroup({"has_cgroup": False}, ONE) is None
    assert limits.made_cgroup({"has_cgroup": False, "cgroup": None}, ONE) is None


def test_the_audit_does_not_see_another_sandbatchs_cgroups(tmp_path, trees, monkeypatch):
    """Two of one machine have ids of the same pattern."""
    for name in ("_network_objects", "_processes", "_egress"):
        monkeypatch.setattr(audit, name, lambda *_: None)
    monkeypatch.setattr(audit, "_netns", dict)
    mount = trees(memory="rw,memory", cpu="rw,cpu")["memory"]
    for folder in (mount / "mine" / ONE, mount / "sandbatch" / ONE):
        folder.mkdir(parents=True)
    own = {"state_dir": tmp_path / "state", "run_dir": tmp_path / "run"}
    for parent in ("mine", "sandbatch"):
        found = audit.audit(Settings(**own, cgroup_parent=parent))
        assert [(one.kind, one.name) for one in found] == [("cgroup", str(mount / parent / ONE))]
    assert audit.audit(Settings(**own, cgroup_parent="another")) == []
