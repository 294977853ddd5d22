"""conmon between us and a sandbox: it keeps the exit code and the log, and lives on when we do not.

`create` and its undo, `end_container`, stand side by side.
"""

import json
import os
import re
import select
import shutil
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from worker import faults, k8s_log, procs
from worker.errors import HostNotReady, ProcessTimeout, RunscError
from worker.mounted import confirm, given_by, read_only_view
from worker.process import last_words
from worker.runsc import Runsc, clean_env
from worker.settings import Settings

PID_FILE, CONMON_PID_FILE, CONMON_OUTPUT = "pid", "conmon.pid", "conmon.err"
# conmon's own files in the bundle folder: gone with the container, so that a new create finds none.
OWN_FILES = (PID_FILE, CONMON_PID_FILE, CONMON_OUTPUT, "attach", "ctl", "winsz", "oom")
# A process in its execve has no command line to know it by (seen: a gofer whose runsc was just killed).
NAMING_S, NAMING_PAUSE_S = 1.0, 0.005
FAREWELL_S = 2.0  # conmon has this long to write log and exit file after the sandbox's end
TAIL_BYTES = 1 << 16
EXIT_CODE = re.compile(rb"-1|[0-9]{1,3}")


def create(
    runsc: Runsc, settings: Settings, container_id: str, bundle_dir: Path, log_path: Path, netns_path: Path
) -> None:
    """Create the container of a bundle, under a conmon of its own; `runsc.start` then starts it.

    All that the bundle gives of the host is read-only there, and confirmed to be (`worker.mounted`).
    After an error, and before a second try, `end_container` is due.

    Raises:
        SandbatchError: A source is not there.
        NotContained: The gofer has something else than the bundle says, or something writable.
        RunscError, ProcessTimeout: As `create_in`.
    """
    config = json.loads((bundle_dir / "config.json").read_text())
    with read_only_view(given_by(config, (settings.state_dir, settings.run_dir))) as view:
        create_in(view.namespace, runsc, settings, container_id, bundle_dir, log_path, netns_path)
    confirm(runsc.gofer_pid(container_id), view)


def create_in(
    namespace: Path,
    runsc: Runsc,
    settings: Settings,
    container_id: str,
    bundle_dir: Path,
    log_path: Path,
    netns_path: Path,
) -> None:
    """`create` with runsc in a mount namespace that is there; conmon stays in ours.

    `bundle_dir` must lie in a folder named after the id: by it `end_container` finds the gofer of
    the 2024 runsc. After an error, and before a second try, `end_container` is due.

    Raises:
        RunscError: runsc refused; its own last words.
        ProcessTimeout: No word within `runsc.timeout_s`. Everything of the id has been ended.
    """
    if container_id not in bundle_dir.parts:
        raise ValueError(f"bundle folder {bundle_dir} is in no folder named {container_id}")
    runsc.prepare()
    exit_dir = settings.exit_dir
    for folder in (log_path.parent, exit_dir):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _cut_log(log_path, settings.log_max_bytes)
    argv = create_argv(namespace, runsc, settings, container_id, bundle_dir, log_path, netns_path)
    deadline = time.monotonic() + runsc.timeout_s
    try:
        answer = _spawn(faults.program("conmon.create", argv), bundle_dir / CONMON_OUTPUT, deadline)
        faults.point("conmon.create.after")
    except ProcessTimeout:
        end_container(runsc, container_id, bundle_dir, exit_dir)
        raise
    _check_answer(runsc, container_id, answer, bundle_dir / CONMON_OUTPUT)


def create_argv(
    namespace: Path,
    runsc: Runsc,
    settings: Settings,
    container_id: str,
    bundle_dir: Path,
    log_path: Path,
    netns_path: Path,
) -> list[str]:
    """What `create` runs: conmon, with `nsenter … runsc` as its runtime."""
    runtime = [f"--mount={namespace}", str(runsc.binary), *runsc.create_args(netns_path)]
    return [
        *("conmon", "--api-version", "1"),
        *("-c", container_id, "-u", container_id, "-n", container_id),
        *("-r", _nsenter()),
        *(f"--runtime-arg={arg}" for arg in runtime),
        *("-b", str(bundle_dir)),
        *("-p", str(bundle_dir / PID_FILE), "--conmon-pidfile", str(bundle_dir / CONMON_PID_FILE)),
        *("--exit-dir", str(settings.exit_dir), "-l", f"k8s-file:{log_path}", "--log-level", "warning"),
        "--full-attach",  # the attach socket lies in the bundle, not in a folder of conmon's choice
        f"--log-size-max={settings.log_max_bytes}",
        "--no-sync-log",  # an fsync for every end; logs need not outlive a power cut
    ]


@lru_cache(maxsize=1)
def _nsenter() -> str:
    """conmon looks for no program on the PATH."""
    found = shutil.which("nsenter")
    if found is None:
        raise HostNotReady("nsenter", "not on the PATH", "run sandbatch setup")
    return found


def _cut_log(log_path: Path, limit_bytes: int) -> None:
    """Begin a full log anew: conmon appends, and counts only what it writes itself.

    At its limit conmon puts an empty file in the log's place and goes on there, so that a log never
    holds more than the limit; with the rest of an earlier start it holds less than twice as much.
    """
    try:
        if log_path.stat().st_size >= limit_bytes:
            log_path.unlink()
    except FileNotFoundError:
        pass  # the first start


def end_container(
    runsc: Runsc, container_id: str, bundle_dir: Path, exit_dir: Path, *, is_half_made: bool = True
) -> None:
    """Undo `create` and `start`: no process, state file, socket or exit file of the id is left.

    Safe to repeat, after a half-done create, and after a SIGKILL of any of its processes. The
    bundle, the log and the netns stay. Read `exit_code` before. `is_half_made`: its create may not
    have come to its end, so that processes of it may be just about to begin.

    Raises:
        RunscError: A process does not die; nothing was removed.
    """
    # By hand, not by `runsc delete --force`: with our flags it does no more than this (seen with the
    # 2024 and 2026 ones), costs 10 to 20 ms of CPU, takes a zombie for alive, and then waits.
    _end_processes(runsc, container_id)
    if is_half_made:
        deadline = time.monotonic() + NAMING_S
        while procs.is_one_being_named() and time.monotonic() < deadline:
            time.sleep(NAMING_PAUSE_S)  # nothing tells the end of an execve
        _end_processes(runsc, container_id)
    # In the root: `<id>_sandbox:<id>.state`, its `.lock`, and the control socket `runsc-<id>.sock`.
    own_files = [bundle_dir / name for name in OWN_FILES]
    for path in (*_entries(runsc.root, container_id), *own_files, *_entries(exit_dir, container_id)):
        path.unlink(missing_ok=True)


def exit_code(exit_dir: Path, container_id: str) -> int | None:
    """How the container ended, 128 + n for signal n; None while it runs, or where nobody knows.

    conmon was killed, then, or a power cut has left what is no number.
    """
    try:
        found = EXIT_CODE.fullmatch((exit_dir / container_id).read_bytes())
    except FileNotFoundError:
        return None
    code = int(found[0]) if found else None
    return code if code is not None and code <= 255 else None


def wait_for_exit(runsc: Runsc, container_id: str, timeout_s: float) -> bool:
    """Wait until the container has ended and conmon has written its exit code; False if it goes on."""
    with procs.PidFds(p for p in procs.processes_of(runsc.root, container_id) if p.role == "conmon") as fds:
        return not fds.wait(timeout_s)


def tail_log(log_path: Path, lines: int = 5) -> str:
    """The last lines that the sandbox wrote, both streams, without conmon's time stamps."""
    try:
        with log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - TAIL_BYTES))
            raw = log.read()
    except FileNotFoundError:
        return ""
    joined: list[bytes] = []
    is_partial = False
    for record in filter(None, map(k8s_log.parse, raw.split(b"\n"))):  # else cut off by the seek
        if is_partial:
            joined[-1] += record.text
        else:
            joined.append(record.text)
        is_partial = record.is_partial
    return b"\n".join(joined[-lines:]).decode(errors="replace")


def _spawn(argv: list[str], output: Path, deadline: float) -> bytes:
    """Start conmon and return its first line on the sync pipe; empty if it died before.

    It forks and its first process returns at once, so the pipe is the event. No parent-death signal
    and a session of its own: it must outlive us.
    """
    reader, writer = os.pipe()
    try:
        try:
            with output.open("wb") as out:  # a file: what conmon starts may inherit it
                first = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=clean_env() | {"_OCI_SYNCPIPE": str(writer)},
                    pass_fds=(writer,),
                    cwd=output.parent,  # where conmon leaves a file `oom`
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise HostNotReady("conmon", "not on the PATH", "run sandbatch setup") from error
        finally:
            os.close(writer)
        try:
            first.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()
            raise _no_answer() from None
        return _read_line(reader, deadline)
    finally:
        os.close(reader)


def _read_line(reader: int, deadline: float) -> bytes:
    line = b""
    while b"\n" not in line:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise _no_answer()
        part = os.read(reader, 65536)
        if not part:
            break
        line += part
    return line


def _no_answer() -> ProcessTimeout:
    return ProcessTimeout("runsc create", "no word from conmon before the deadline; killed", "see runsc.log")


def _check_answer(runsc: Runsc, container_id: str, answer: bytes, output: Path) -> None:
    """conmon answers {"data": PID}, or a negative number and runsc's stderr as "message"."""
    if not answer:
        words = last_words(output.read_text(errors="replace")) if output.exists() else ""
        raise RunscError(f"conmon {container_id}", words or "it died without a word", f"see {runsc.log}")
    text = answer.decode(errors="replace")
    try:
        found = json.loads(text, strict=False)
        pid, message = int(found["data"]), str(found.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pid, message = -1, text  # its escaping of odd bytes is not always JSON
    if pid <= 0:
        raise runsc.error("create", container_id, message or "it was killed, or ended without a word")


def _end_processes(runsc: Runsc, container_id: str) -> None:
    """End every process of the id; look again until there is none, as a verb at work starts new ones."""
    deadline = time.monotonic() + runsc.timeout_s
    while found := procs.processes_of(runsc.root, container_id):
        if time.monotonic() > deadline:
            left = ", ".join(f"{proc.role} {proc.pid}" for proc in found)
            raise RunscError(
                f"runsc delete {container_id}", f"{left} cannot be killed", "see its kernel stack"
            )
        conmons = [proc for proc in found if proc.role == "conmon"]
        others = [proc for proc in found if proc.role != "conmon"]
        with procs.PidFds(conmons) as conmon_fds:
            procs.end(others, timeout_s=FAREWELL_S)
            # conmon reaps them, writes the rest of the log and ends by itself. One that has nothing
            # to wait for yet, or is stuck, does not.
            if conmon_fds.wait(FAREWELL_S if others else 0.0):
                conmon_fds.kill()
                conmon_fds.wait(FAREWELL_S)


def _entries(folder: Path, container_id: str) -> list[Path]:
    """Files with the id as a whole word in their name, temporary ones of a killed writer too."""
    word = re.compile(rf"(?<![0-9a-zA-Z]){re.escape(container_id)}(?![0-9a-zA-Z])")
    try:
        return [folder / name for name in os.listdir(folder) if word.search(name)]
    except FileNotFoundError:
        return []
