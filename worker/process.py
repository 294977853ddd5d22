"""Run one program of the host: argv list, deadline, bounded output, and no orphan when we are killed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker import faults
from worker.errors import ProcessTimeout, SandbatchError

WORDS = 400  # of a program's own words, this many characters reach an error message
TICK_S = 0.2


@dataclass(frozen=True)
class Completed:
    """How a program ended: exit status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str
    raw: bytes = b""  # of stdout


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    point: str = "",
    largest_file: int = 0,
    tick: Callable[[], None] | None = None,
) -> Completed:
    """Run `argv` to its end.

    It gets a session of its own, so that a timeout ends its children too, and the parent-death
    signal, so that it does not outlive a killed worker. Never for programs that leave a daemon
    behind with our stdio: the pipe would stay open (see `worker.conmon`). `point` names it in
    `worker.faults`; by default its own name does.

    Args:
        largest_file: In bytes, of each file that it may write.
        tick: Called meanwhile, every `TICK_S`; what it raises ends the program.
    Raises:
        ProcessTimeout: It ran longer than `timeout_s`, and was killed with its children.
        SandbatchError: It cannot be started.
    """
    name = Path(argv[0]).name
    point = point or name
    words = faults.program(point, [str(word) for word in argv])
    if (
        shutil.which(words[0], path=env.get("PATH") if env else None) is None
    ):  # setpriv has only a status for it
        raise SandbatchError(name, "cannot be started (no such program)", "run sandbatch doctor")
    limit = ["prlimit", f"--fsize={largest_file}"] if largest_file else []
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *limit, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else without_own(os.environ),
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        why = f"cannot be started ({error.filename or 'fork'}: {error.strerror})"
        raise SandbatchError(name, why, "run sandbatch doctor") from error
    try:
        stdout, stderr = _communicate(process, stdin.encode(), timeout_s, tick)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise ProcessTimeout(
            name, f"no end within {timeout_s:g} s; killed", "see what it waits for"
        ) from None
    except BaseException:  # a Celery time limit, Ctrl-C: leave nothing running
        _kill_group(process)
        raise
    faults.point(f"{point}.after")
    return Completed(process.returncode, _text(stdout), _text(stderr), stdout)


def without_own(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without our own settings: the broker's password is no program's."""
    return {name: value for name, value in environ.items() if not name.startswith(("SANDBATCH_", "FLOWER_"))}


def _communicate(
    process: subprocess.Popen[bytes], stdin: bytes, timeout_s: float, tick: Callable[[], None] | None
) -> tuple[bytes, bytes]:
    given: bytes | None = stdin
    deadline = time.monotonic() + timeout_s
    while tick is not None and (left_s := deadline - time.monotonic()) > TICK_S:
        try:
            return process.communicate(given, timeout=min(left_s, TICK_S))
        except subprocess.TimeoutExpired:
            given = None  # it is kept, and may not be given twice
            tick()
    return process.communicate(given, timeout=max(0.0, deadline - time.monotonic()))


def _text(output: bytes) -> str:
    return output.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def last_words(text: str, limit: int = WORDS) -> str:
    """The last non-empty line of a program's output, cut to `limit` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:limit] if lines else ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended by itself
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
