"""Run one program of the host: argv list, deadline, bounded output, and no orphan when we are killed."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker import faults
from worker.errors import ProcessTimeout, SandbatchError

WORDS = 400  # of a program's own words, this many characters reach an error message


@dataclass(frozen=True)
class Completed:
    """How a program ended: exit status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    point: str = "",
) -> Completed:
    """Run `argv` to its end.

    It gets a session of its own, so that a timeout ends its children too, and the parent-death
    signal, so that it does not outlive a killed worker. Never for programs that leave a daemon
    behind with our stdio: the pipe would stay open (see `worker.conmon`). `point` names it in
    `worker.faults`; by default its own name does.

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
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        why = f"cannot be started ({error.filename or 'fork'}: {error.strerror})"
        raise SandbatchError(name, why, "run sandbatch doctor") from error
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise ProcessTimeout(
            name, f"no end within {timeout_s:g} s; killed", "see what it waits for"
        ) from None
    except BaseException:  # a Celery time limit, Ctrl-C: leave nothing running
        _kill_group(process)
        raise
    faults.point(f"{point}.after")
    return Completed(process.returncode, stdout, stderr)


def last_words(text: str, limit: int = WORDS) -> str:
    """The last non-empty line of a program's output, cut to `limit` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:limit] if lines else ""


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended by itself
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
