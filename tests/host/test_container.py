"""Containers by real runsc and conmon: started, answering, ended, and nothing left of them.

Every test runs with `runsc` of the PATH and with each that SANDBATCH_TEST_RUNSC names.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.host.machine import copy_program
from worker import bundle, conmon, procs, rootfs
from worker.doctor import doctor
from worker.errors import NotContained, ProcessTimeout, RunscError
from worker.mounted import View
from worker.probe_runsc import HOLE, probe
from worker.runsc import MENDED, Runsc, is_old
from worker.settings import Settings
from worker.spec import make_spec, new_container_id

pytestmark = pytest.mark.usefixtures("host_parts")

RUNSCS = ["runsc", *filter(None, os.environ.get("SANDBATCH_TEST_RUNSC", "").split(":"))]
KILLS = 12
OUTSIDE = f"--mount=/proc/{os.getpid()}/ns/mnt"  # nsenter: out of the view, into the test's own mounts
STUBS_DIE_S = 2.0
HTTP_SERVER = ["python3", "-m", "http.server", "8000"]


@dataclass
class Sandbox:
    """One container of a test, with what it needs: a netns with an address, a bundle."""

    runsc: Runsc
    settings: Settings
    number: int
    container_id: str = field(default_factory=new_container_id)

    @property
    def folder(self) -> Path:
        return self.settings.sandboxes_dir / self.container_id

    @property
    def bundle_dir(self) -> Path:
        return self.folder / "bundle"

    @property
    def netns_path(self) -> Path:
        return Path("/var/run/netns") / self.container_id

    @property
    def ip(self) -> str:
        return f"198.19.{self.number}.2"

    def prepare(self, **fields) -> None:
        """A netns on a veth pair of its own, as CNI would leave it, and the bundle."""
        host_end, peer = f"sbtest{self.number}", f"sbpeer{self.number}"
        _ip("netns", "add", self.container_id)
        _ip("link", "add", host_end, "type", "veth", "peer", "name", peer)
        _ip("link", "set", peer, "netns", self.container_id, "name", "eth0")
        _ip("addr", "add", f"198.19.{self.number}.1/30", "dev", host_end)
        _ip("link", "set", host_end, "up")
        _ip("-n", self.container_id, "addr", "add", f"{self.ip}/30", "dev", "eth0")
        _ip("-n", self.container_id, "link", "set", "lo", "up")
        _ip("-n", self.container_id, "link", "set", "eth0", "up")
        spec = make_spec(**fields)
        config = bundle.make_config(spec, self.container_id, self.netns_path, self.settings)
        bundle.write_bundle(self.bundle_dir, config)

    def create(self) -> None:
        log_path = self.folder / "log"
        conmon.create(
            self.runsc, self.settings, self.container_id, self.bundle_dir, log_path, self.netns_path
        )

    def run(self, *args: str, **fields) -> None:
        self.prepare(args=list(args), **fields)
        self.create()
        self.runsc.start(self.container_id, self.netns_path)

    def wait(self) -> int | None:
        assert conmon.wait_for_exit(self.runsc, self.container_id, 30), "it goes on"
        return conmon.exit_code(self.settings.exit_dir, self.container_id)

    def log(self) -> str:
        return conmon.tail_log(self.folder / "log", lines=50)

    def end(self) -> None:
        conmon.end_container(self.runsc, self.container_id, self.bundle_dir, self.settings.exit_dir)

    def remove(self) -> None:
        self.end()
        bundle.remove_bundle(self.bundle_dir)
        subprocess.run(["ip", "netns", "del", self.container_id], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"sbtest{self.number}"], check=False, capture_output=True)

    def leftovers(self) -> list[str]:
        """Whatever on this host still bears the id, the netns, bundle and log aside."""
        found = [f"process {proc}" for proc in procs.processes_of(self.runsc.root, self.container_id)]
        for folder in (self.runsc.root, self.settings.exit_dir):
            found += [str(path) for path in folder.rglob(f"*{self.container_id}*")]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [line for line in mounts if str(self.settings.run_dir) in line or str(self.folder) in line]
        return found + [f"process {pid} in the netns" for pid in self.stuck_netns_holders()]

    def stuck_netns_holders(self) -> list[int]:
        """Those that are still there in a while: a killed sentry's stubs die by the kernel, just after it."""
        deadline = time.monotonic() + STUBS_DIE_S
        while (found := self.netns_holders()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def netns_holders(self) -> list[int]:
        """Processes that live in the netns: named by nothing but this, such as gVisor's stubs."""
        wanted, found = self.netns_path.stat().st_ino, []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{name}/ns/net").st_ino == wanted:
                    found.append(int(name))
            except OSError:
                continue  # it ended, or is a zombie
        return found


@pytest.fixture(scope="module", params=RUNSCS)
def host(request, tmp_path_factory):
    """Settings of one runsc in folders of this test's own, judged by the probe."""
    folder = tmp_path_factory.mktemp("host")
    settings = Settings(
        state_dir=folder / "state",
        run_dir=folder / "run",
        runsc=request.param,
        rootfs_allow=(folder / "roots",),
    )
    found = probe(settings)
    assert found.ok, found.error
    return settings, Runsc.from_settings(settings, found.hides_sysctl)


@pytest.fixture
def make_sandbox(host):
    settings, runsc = host
    made: list[Sandbox] = []

    def make(**changes) -> Sandbox:
        sandbox = Sandbox(changes.get("runsc", runsc), settings, number=100 + len(made))
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.remove()


def test_the_tutorials_server_answers_on_the_address_of_its_netns(make_sandbox):
    sandbox = make_sandbox()
    sandbox.run(*HTTP_SERVER, cwd="/var/www/html")
    assert _fetch(f"http://{sandbox.ip}:8000/") == "Hello World!\n"
    assert sandbox.runsc.state(sandbox.container_id)["status"] == "running"
    assert [state["id"] for state in sandbox.runsc.list()] == [sandbox.container_id]
    sandbox.end()
    assert sandbox.leftovers() == []


def test_exit_code_and_both_streams_are_kept(make_sandbox):
    sandbox = make_sandbox()
    sandbox.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert sandbox.wait() == 7
    assert set(sandbox.log().splitlines()) == {"out", "err"}
    sandbox.end()
    assert sandbox.leftovers() == []


def test_signals_reach_the_command(make_sandbox):
    sandbox = make_sandbox()
    sandbox.run("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    _wait_for(lambda: "ready" in sandbox.log())
    sandbox.runsc.kill(sandbox.container_id, "TERM")
    assert sandbox.wait() == 9


@pytest.mark.parametrize(
    ("command", "words"),
    [("nope", 'error finding executable "nope" in PATH'), ("/nope", "failed to load /nope")],
)
def test_a_missing_command_fails_with_runscs_own_words(make_sandbox, command, words):
    sandbox = make_sandbox()
    with pytest.raises(RunscError, match=words):
        sandbox.run(command)
    sandbox.end()
    assert sandbox.leftovers() == []


def test_a_sandbox_sees_the_hosts_programs_and_none_of_its_secrets(make_sandbox):
    sandbox = make_sandbox()
    script = """
    for path in /etc/shadow /home /boot /etc/ssl/private; do [ ! -e $path ] || echo found $path; done
    touch /x /usr/x /etc/x 2>/dev/null && echo written
    touch /tmp/x /run/x /dev/shm/x || echo not writable
    ls /root | wc -l; hostname; getent passwd nobody | cut -d: -f1; cat /proc/net/dev | grep -c eth0
    """
    sandbox.run("sh", "-c", script)
    assert sandbox.wait() == 0
    assert sandbox.log().splitlines() == ["0", sandbox.container_id, "nobody", "1"]


def test_the_shared_rootfs_stays_as_it_was(make_sandbox):
    sandbox = make_sandbox()
    root = rootfs.host_rootfs(sandbox.settings)
    before = sorted(map(str, root.rglob("*")))
    sandbox.run("sh", "-c", "ls /; mkdir /new; echo x >/etc/passwd")
    sandbox.wait()
    sandbox.end()
    assert sorted(map(str, root.rglob("*"))) == before


def test_a_users_rootfs_without_mount_points_works_and_is_not_written_to(make_sandbox):
    """gVisor makes /proc, /dev, /tmp … in its own memory; only binds and cwd would be made on the host."""
    sandbox = make_sandbox()
    root = sandbox.settings.rootfs_allow[0] / sandbox.container_id
    copy_program("sh", root)
    before = sorted(root.rglob("*"))
    sandbox.run(
        "/bin/sh", "-c", "echo x >/tmp/x && echo </proc/self/stat >/dev/null && echo fine", rootfs=str(root)
    )
    assert sandbox.wait() == 0
    assert sandbox.log() == "fine"
    sandbox.end()
    assert sorted(root.rglob("*")) == before


def test_what_is_swapped_between_the_look_and_the_mount_is_seen(make_sandbox, tmp_path):
    """By somebody who may write to an allowed folder on the host: runsc follows the link."""
    sandbox, swapped = make_sandbox(), make_sandbox()
    (tmp_path / "a b/data").mkdir(parents=True)
    source = tmp_path / "a b/data"
    mounts = [{"type": "bind", "source": str(source), "target": "/data"}]
    for one in (sandbox, swapped):
        one.settings = one.settings.model_copy(update={"mount_allow": (tmp_path,)})
        one.prepare(args=["ls", "/data"], mounts=mounts)
    sandbox.create()
    early = make_sandbox()
    early.settings = sandbox.settings
    early.prepare(args=["ls", "/data"], mounts=mounts)
    (tmp_path / "a b").rename(tmp_path / "moved")
    (tmp_path / "a b").symlink_to(tmp_path / "moved")
    with pytest.raises(NotContained, match="mount at /data: a symlink was in the path of"):
        early.create()
    (tmp_path / "a b").unlink()
    (tmp_path / "moved").rename(tmp_path / "a b")
    swap = f"nsenter {OUTSIDE} sh -c 'mv \"$0\" \"$1\"; ln -s /etc \"$0\"' '{source}' '{tmp_path}/aside'"
    swapped.runsc = wrapped(swapped.runsc, tmp_path, swap)
    with pytest.raises(NotContained, match="/etc was in its place"):
        swapped.create()


def test_outside_of_the_read_only_view_an_old_runsc_is_refused_before_the_program_starts(
    make_sandbox, tmp_path
):
    """A newer one mounts read-only by itself, and may."""
    sandbox = make_sandbox()
    sandbox.prepare(args=["true"])
    sandbox.runsc = wrapped(sandbox.runsc, tmp_path, f'exec nsenter {OUTSIDE} {sandbox.runsc.binary} "$@"')
    if is_old(sandbox.runsc.version()):
        with pytest.raises(NotContained, match=r"mount at /.*: runsc has mounted it without ro"):
            sandbox.create()
    else:
        sandbox.create()


def test_python_outside_of_usr_is_bound_and_runs(make_sandbox, monkeypatch):
    """As on machines whose python is pyenv's below /root: that folder, and nothing else of /root."""
    if Path(sys.base_prefix).is_relative_to("/usr"):
        pytest.skip("this python lies below /usr: there is none elsewhere to try")
    monkeypatch.setattr(rootfs, "usr_has_python", lambda: False)
    sandbox = make_sandbox()
    sandbox.run(
        f"{Path(sys.base_prefix).resolve()}/bin/python3",
        "-c",
        "import sys, ssl, os; print(sys.base_prefix); print(os.listdir('/root'))",
    )
    assert sandbox.wait() == 0
    prefix = Path(sys.base_prefix).resolve()
    inside = [prefix.relative_to("/root").parts[0]] if prefix.is_relative_to("/root") else []
    assert sandbox.log().splitlines() == [str(prefix), str(inside)]


def test_ten_at_once_all_answer_and_all_end(make_sandbox):
    sandboxes = [make_sandbox() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda sandbox: sandbox.run(*HTTP_SERVER, cwd="/var/www/html"), sandboxes))
        pages = list(pool.map(lambda sandbox: _fetch(f"http://{sandbox.ip}:8000/"), sandboxes))
        list(pool.map(Sandbox.end, sandboxes))
    assert pages == ["Hello World!\n"] * 10
    assert [left for sandbox in sandboxes for left in sandbox.leftovers()] == []


def test_the_undo_ends_a_running_container_fast_and_may_be_repeated(make_sandbox):
    sandbox = make_sandbox()
    sandbox.run("sleep", "100")
    began = time.monotonic()
    sandbox.end()
    assert time.monotonic() - began < 1.0  # measured: 5 ms
    sandbox.end()
    assert sandbox.leftovers() == []


def test_an_undo_leaves_the_neighbour_running(make_sandbox):
    """Nor does it touch one whose id begins alike: runsc itself would."""
    ended, neighbour = make_sandbox(), make_sandbox()
    neighbour.container_id = ended.container_id[:-1] + ("0" if ended.container_id[-1] != "0" else "1")
    for sandbox in (ended, neighbour):
        sandbox.run("sleep", "100")
    ended.end()
    assert ended.leftovers() == []
    assert neighbour.runsc.state(neighbour.container_id)["status"] == "running"


@pytest.mark.parametrize("role", ["conmon", "sandbox", "gofer"])
def test_after_sigkill_of_any_process_the_undo_leaves_nothing(make_sandbox, role):
    sandbox = make_sandbox()
    sandbox.run("sleep", "100")
    found = procs.processes_of(sandbox.runsc.root, sandbox.container_id)
    assert procs.end([proc for proc in found if proc.role == role], timeout_s=5) == []
    sandbox.end()
    assert sandbox.leftovers() == []


@pytest.mark.parametrize("role", ["conmon", "runsc", "sandbox"])
def test_a_create_killed_half_way_leaves_nothing_after_the_undo(make_sandbox, host, role):
    """A killed `runsc create` leaves a spinning sandbox, a gofer and a socket that blocks the id."""
    rng = random.Random(role)  # noqa: S311 - moments, not secrets
    sandbox = make_sandbox(runsc=replace(host[1], timeout_s=3.0))
    sandbox.prepare(args=["sleep", "100"])
    for _ in range(KILLS):
        delay_s = rng.uniform(0.0, 0.12)
        killer = threading.Timer(delay_s, _kill_role, (sandbox, role))
        killer.start()
        try:
            sandbox.create()
        except (RunscError, ProcessTimeout):
            pass  # the kill came before the answer; the deadline, where an orphan holds conmon's pipe
        finally:
            killer.join()
        sandbox.end()
        assert sandbox.leftovers() == [], f"killed {role} after {delay_s * 1000:.0f} ms"
    sandbox.create()  # and the id can be used again
    sandbox.runsc.start(sandbox.container_id, sandbox.netns_path)


def test_conmon_and_sandbox_outlive_the_worker(make_sandbox):
    """SIGKILL to the worker's whole process group, as a shell's or a supervisor's kill does."""
    sandbox = make_sandbox()
    sandbox.prepare(args=["sh", "-c", "sleep 0.5; exit 5"])
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)
        sandbox.create()
        sandbox.runsc.start(sandbox.container_id, sandbox.netns_path)
        os.killpg(0, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert sandbox.wait() == 5


def test_a_create_that_hangs_ends_at_its_deadline_with_all_it_began(make_sandbox, host, tmp_path):
    """`--platform=kvm` without a real KVM hangs so: a runsc that never comes back."""
    binary = tmp_path / "runsc"
    binary.write_text(f'#!/bin/sh\n[ "$1" = flags ] && exec {host[1].binary} flags\nkill -STOP $$\n')
    binary.chmod(0o755)
    _, runsc = host
    sandbox = make_sandbox(runsc=replace(runsc, binary=binary, timeout_s=1.0))
    sandbox.prepare(args=["true"])
    began = time.monotonic()
    with pytest.raises(ProcessTimeout):
        sandbox.create()
    assert time.monotonic() - began < 5
    assert sandbox.leftovers() == []


def test_the_probe_is_remembered_and_leaves_nothing(host):
    settings, _ = host
    again = probe(settings)
    assert again.ok
    assert (settings.state_dir / "runsc-probe.json").exists()
    assert list(settings.run_dir.glob("probe-*")) == []


def test_a_probe_that_was_killed_is_swept_by_the_next(host):
    """Else its sandbox would run on, below a runsc root that nothing else knows."""
    settings, _ = host
    prober = os.fork()
    if prober == 0:
        os.setpgid(0, 0)
        (settings.state_dir / "runsc-probe.json").unlink()
        probe(settings)
        os._exit(0)
    _wait_for(lambda: _probe_processes(settings))
    os.kill(prober, signal.SIGKILL)
    os.waitpid(prober, 0)
    [folder] = settings.run_dir.glob("probe-*")
    [container_id] = [path.name for path in folder.glob("sb-*")]
    assert probe(settings).ok
    assert list(settings.run_dir.glob("probe-*")) == []
    assert procs.processes_of(folder / "root", container_id) == []
    assert not (Path("/var/run/netns") / container_id).exists()


def test_a_runsc_that_cannot_run_a_sandbox_is_refused_with_the_reason(host, tmp_path):
    """The words are those of a runsc that was built without CGO_ENABLED=0."""
    binary = tmp_path / "runsc"
    binary.write_text(
        '#!/bin/sh\necho "creating container: waiting for sandbox to start: EOF" >&2\nexit 128\n'
    )
    binary.chmod(0o755)
    found = probe(host[0].model_copy(update={"runsc": str(binary)}))
    assert not found.ok
    assert "waiting for sandbox to start: EOF" in found.error
    assert "CGO_ENABLED=0" in found.error


def test_a_runsc_that_does_not_contain_is_refused_by_the_probe(host, tmp_path):
    """In the test's own mounts again, a gofer of before July 2025 could empty files of the host."""
    settings, runsc = host
    binary = wrapped(runsc, tmp_path, f'exec nsenter {OUTSIDE} {runsc.binary} "$@"').binary
    settings = settings.model_copy(update={"runsc": str(binary)})
    found = probe(settings)
    assert found.ok is not found.is_old
    assert (HOLE in found.error and "without ro" in found.error) is found.is_old
    [row] = [one for one in doctor(settings) if one.name == "runsc"]
    assert row.ok is found.ok
    assert (MENDED in row.mend) is found.is_old  # the release to take


def test_the_probe_sees_a_file_that_was_emptied(host, monkeypatch):
    """Without the read-only view and the look at it each runsc shows whether it contains by itself."""
    settings, _ = host

    @contextmanager
    def no_view(_):
        yield View(Path("/proc/self/ns/mnt"), {}, frozenset())

    monkeypatch.setattr(conmon, "read_only_view", no_view)
    monkeypatch.setattr(conmon, "confirm", lambda *_: None)
    (settings.state_dir / "runsc-probe.json").unlink()
    found = probe(settings)
    assert (found.error, found.ok) == ((HOLE, False) if found.is_old else ("", True))


def wrapped(runsc: Runsc, folder: Path, before_create: str) -> Runsc:
    """A runsc that does something else first when it is to create: a script in its place."""
    binary = folder / "wrapped-runsc"
    binary.write_text(
        f'#!/bin/sh\ncase " $* " in *" create "*) {before_create} ;; esac\nexec {runsc.binary} "$@"\n'
    )
    binary.chmod(0o755)
    return replace(runsc, binary=binary)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def _fetch(url: str) -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own address
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.02)


def _wait_for(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def _probe_processes(settings: Settings) -> list[procs.Proc]:
    roots = [folder / "root" for folder in settings.run_dir.glob("probe-*")]
    return [proc for root in roots for proc in procs.all_sandbox_processes(root)]


def _kill_role(sandbox: Sandbox, role: str) -> None:
    found = procs.processes_of(sandbox.runsc.root, sandbox.container_id)
    procs.end([proc for proc in found if proc.role == role], timeout_s=5)


def test_a_log_is_bounded_and_keeps_the_newest(make_sandbox):
    """conmon begins the file anew at its limit."""
    limit = 1 << 16
    box = make_sandbox()
    box.settings = box.settings.model_copy(update={"log_max_bytes": limit})
    box.run("seq", "1", "100000")
    assert box.wait() == 0
    assert 0 < (box.folder / "log").stat().st_size <= limit
    assert box.log().splitlines()[-1] == "100000"
