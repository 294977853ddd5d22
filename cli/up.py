"""The long-running commands of a host: worker, up."""

import contextlib
import json
import logging
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from cli.flower import ADDRESS, flower_argv
from cli.output import say
from tasks import signing
from tasks.connection import check, connect
from worker import log_lines
from worker.doctor import NEWER, check_host
from worker.errors import BadInput, HostNotReady, SandbatchError
from worker.probe_runsc import remembered
from worker.settings import Settings
from worker.subnet import NAME, ensure_network

log = logging.getLogger("sandbatch")
UNDER_TINI = "SANDBATCH_UNDER_TINI"
STOP_S = 35  # a stage that is under way is finished; the longest deadline of one is 30 s
FLAGS = ("host", "capacity", "slots", "labels", "log_format", "log_level")


def run_host_worker(settings: Settings) -> None:
    """Run this host's worker in this process, under `tini -s`.

    tini reaps what becomes an orphan here: runsc takes a zombie for a running sandbox, and Python
    must not reap strangers (DESIGN, point 5).

    Raises:
        HostNotReady: The host lacks something, or another worker runs.
        BrokerError: No broker answers.
    """
    if os.geteuid() != 0:
        raise BadInput("worker", "root is needed", "run it as root on the host")
    _harden()
    log_lines.set_up(settings)
    _export(settings)
    started_by = os.environ.pop(UNDER_TINI, None)
    if started_by is None:
        argv = _under_tini()
        os.environ[UNDER_TINI] = "worker"
        os.execv(argv[0], argv)  # noqa: S606 - argv list
    if started_by != "up":  # which has looked already
        _prepare(settings)
        check(connect(settings), settings)

    from tasks.consumer import die_with_parent, run_worker, take_host_lock

    die_with_parent(_tini())
    take_host_lock(settings)
    run_worker()


def _harden() -> None:
    """Of this process and all that it starts: no file that others may write to, no core with what we know."""
    os.umask(0o022)  # what is secret has a mode of its own; a rootfs is for every user in it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _export(settings: Settings) -> None:
    """Flags reach the tasks, and the processes that we start, this way."""
    for name in FLAGS:
        value = getattr(settings, name)
        os.environ[f"SANDBATCH_{name.upper()}"] = json.dumps(value) if name == "labels" else str(value)


def _under_tini() -> list[str]:
    tini = shutil.which("tini")
    if tini is None:
        raise HostNotReady("tini", "not on the PATH", "sandbatch setup, or apt-get install tini")
    return [tini, "-s", "--", sys.executable, "-m", "cli", "worker"]


def _tini() -> int:
    """The pid of the tini that started us, which may have been killed since: then nobody would reap."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        name = "nobody"
    if name != "tini":
        raise HostNotReady("tini", f"ended while the worker started; {name} is there now", "start it again")
    return parent


def _prepare(settings: Settings) -> None:
    signing.check_host(settings)
    if settings.network == NAME:
        ensure_network(settings)
    check_host(settings)
    if (known := remembered(settings)) and known.is_old:
        words = "only this worker's read-only mounts keep its sandboxes from changing what is bound"
        log.warning("runsc %s: %s; %s", known.version, words, NEWER)


def run_up(settings: Settings, *, flower_port: int | None = None) -> int:
    """Run broker, worker and perhaps Flower as children until a signal comes or one of them ends.

    A dead broker ends the rest too: what restarts `up` then restarts all of it, with the broker's data.
    """
    from tasks.broker import embedded_broker

    if os.geteuid() != 0:
        raise BadInput("up", "root is needed", "run it as root on the host")
    if not settings.is_broker_embedded:
        raise BadInput("up", "SANDBATCH_BROKER_URL names another broker", "unset it, or run sandbatch worker")
    flower = None if flower_port is None else flower_argv(flower_port, ADDRESS)
    _harden()
    log_lines.set_up(settings)
    _prepare(settings)
    _export(settings)
    with _signals() as signalled, embedded_broker(settings) as broker, contextlib.ExitStack() as children:
        pids = {broker: f"the broker (its log: {settings.state_dir / 'broker' / 'valkey.log'})"}
        pids[children.enter_context(_child(_under_tini(), {UNDER_TINI: "up"})).pid] = "the worker"
        if flower is not None:
            pids[children.enter_context(_child(flower, {})).pid] = "Flower"
            _tell(settings, f"Flower: http://{ADDRESS}:{flower_port}")
        _tell(settings, f"host {settings.host} is up; Ctrl-C stops it, sandboxes go on")
        ended = _wait_for_any(pids, signalled)
        if ended:
            _tell(settings, f"{ended} has ended by itself; so does all of sandbatch up, and sandboxes go on")
        return 1 if ended else 0


def _tell(settings: Settings, words: str) -> None:
    """For whoever sits before it; whoever reads JSON gets nothing else."""
    if settings.log_format == "json":
        log.info(words)
    else:
        say(words)


@contextlib.contextmanager
def errors_in_the_log(settings: Settings) -> Iterator[None]:
    """Why a host's process does not start or go on, as the settings say."""
    try:
        yield
    except SandbatchError as error:
        if settings.log_format != "json":
            raise
        log.error("%s", error)
        raise typer.Exit(error.exit_code) from None


@contextlib.contextmanager
def _child(argv: list[str], env: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    # A session of its own: Ctrl-C reaches us alone, and we send one TERM, after which Celery
    # finishes what it does. Two signals would make it drop its work.
    # Killed with us: the next `up` starts from the journals, and no half of it is left running.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv], start_new_session=True, env={**os.environ, **env}
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that can be read once SIGINT or SIGTERM has come."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _wait_for_any(pids: dict[int, str], signalled: int) -> str:
    """Empty after a signal; the name of the one of `pids` that has ended by itself."""
    fds = {os.pidfd_open(pid): name for pid, name in pids.items()}
    try:
        ready = select.select([signalled, *fds], [], [])[0]
        return "" if signalled in ready else " and ".join(fds[fd] for fd in ready)
    finally:
        for fd in fds:
            os.close(fd)
