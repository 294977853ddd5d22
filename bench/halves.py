"""The two halves: sandboxes through the whole system, and through the same functions without it."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis

from tasks.app import make_app
from tasks.connection import connect
from tasks.record import Record
from tasks.state import TERMINAL, State
from tasks.submit import remove, submit
from worker.errors import SandbatchError
from worker.journal import Journal, now
from worker.launch import run_stage, undo_stage
from worker.prober import until_ready
from worker.process import last_words
from worker.settings import Settings
from worker.spec import Spec, make_spec, new_container_id
from worker.stages import Host, stages_of

PORT = 8000
START_S, STEP_S, STOP_S = 60.0, 120.0, 90.0
LOOK_S = 2.0  # the longest sleep in a wait for events, so that a broken worker is noticed


@dataclass
class Row:
    """One sandbox: what is written to the file of raw figures. Times in seconds."""

    round: int
    half: str
    id: str = ""
    up_s: float | None = None
    down_s: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    undos: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def web_server(host: str | None) -> Spec:
    """The program of gVisor's CNI tutorial, ready when it answers a GET."""
    args = ["python3", "-m", "http.server", str(PORT)]
    return make_spec(args=args, cwd="/var/www/html", ready=f"http:{PORT}/", host=host)


def sleeper(host: str | None) -> Spec:
    """A program that costs next to nothing: what is left is the launch itself."""
    return make_spec(args=["sleep", "86400"], host=host)


class MemoryJournal(Journal):
    """A journal that is nowhere but in memory: what the stages need of one, at no cost."""

    def _append(self, event: dict[str, Any], *, sync: bool = False) -> None:
        self._apply({"seq": self.seq + 1, "t": now(), **event})


class Bare:
    """`do` and `undo` of each stage in a pool of threads: no queue, no record, no journal on the disk."""

    name = "bare"

    def __init__(self, host: Host, at_a_time: int) -> None:
        self._host = host
        self._at_a_time = at_a_time
        self._spec = web_server(None)
        self._works = tuple(stage for stage in stages_of(self._spec) if stage.name != "ready")
        self._journals: dict[str, Journal] = {}

    def up(self, rows: Sequence[Row]) -> None:
        """Launch one sandbox a row, until each has answered."""
        self._each(self._launch, rows)

    def down(self, rows: Sequence[Row]) -> None:
        self._each(self._take_down, rows)

    def close(self) -> None:
        """Undo whatever is left, from wherever it broke off."""
        for container_id in list(self._journals):
            self._take_down(Row(0, self.name, container_id))

    def _each(self, act: Callable[[Row], None], rows: Sequence[Row]) -> None:
        pool = ThreadPoolExecutor(self._at_a_time)
        try:
            for done in [pool.submit(act, row) for row in rows]:
                done.result()
        finally:  # after an error or Ctrl-C those under way are finished, and none is begun
            pool.shutdown(cancel_futures=True)

    def _launch(self, row: Row) -> None:
        row.id = new_container_id()
        folder = self._host.settings.sandboxes_dir / row.id
        journal = MemoryJournal(folder, row.id, 1, "bare", "", now(), self._spec)
        self._journals[row.id] = journal
        began = time.perf_counter()
        for stage in self._works:
            with _Timed(row.stages, stage.name):
                run_stage(self._host, journal, stage.name)
        with _Timed(row.stages, "ready"):
            asyncio.run(asyncio.wait_for(until_ready(journal), self._spec.ready_timeout_s))
        row.up_s = round(time.perf_counter() - began, 6)

    def _take_down(self, row: Row) -> None:
        journal = self._journals[row.id]
        began = time.perf_counter()
        for stage in reversed(self._works):
            with _Timed(row.undos, stage.name):
                undo_stage(self._host, journal, stage)
        journal.log_path.unlink(missing_ok=True)
        if journal.folder.exists():
            journal.folder.rmdir()
        row.down_s = round(time.perf_counter() - began, 6)
        del self._journals[row.id]


class Ours:
    """The whole system: `sandbatch up` as a process of its own, and a client that follows its events."""

    name = "ours"

    def __init__(
        self, settings: Settings, environment: dict[str, str], at_a_time: int, spec: Spec | None = None
    ) -> None:
        self._settings = settings
        self._at_a_time = at_a_time
        self.spec = spec or web_server(settings.host)
        self._log = settings.run_dir / "up.log"
        settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._log.open("w") as log:
            # Should we be killed, it stops, too.
            argv = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "cli", "up"]
            self._process = subprocess.Popen(
                argv,
                env=environment,
                cwd=Path(__file__).parent.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us to pass on
            )
        self._record = Record(connect(settings))
        self._app = make_app(settings, "client")
        try:
            self._wait_for_host()
        except BaseException:
            self.close()
            raise

    def up(self, rows: Sequence[Row]) -> None:
        """Keep `at_a_time` launches under way, until every sandbox runs."""

        def begin(row: Row) -> str:
            row.id = submit(self._app, self._record, self._settings, [self.spec])[1][0]
            return row.id

        for row, seconds in self._keep_going(begin, rows, {State.RUNNING}):
            row.up_s = round(seconds, 6)

    def up_at_once(self, rows: Sequence[Row]) -> None:
        """Enqueue them as one batch, and follow it until every sandbox runs."""
        ids: list[str] = []

        def begin(row: Row) -> str:
            if not ids:  # not sooner: now the events are followed
                ids.extend(submit(self._app, self._record, self._settings, [self.spec] * len(rows))[1])
            row.id = ids.pop()
            return row.id

        for row, seconds in self._keep_going(begin, rows, {State.RUNNING}, len(rows)):
            row.up_s = round(seconds, 6)

    def down(self, rows: Sequence[Row]) -> None:
        """Remove them as `sandbatch rm` does, until nothing of each is left."""

        def begin(row: Row) -> str:
            remove(self._app, self._record, self._record.get_all([row.id]))
            return row.id

        for row, seconds in self._keep_going(begin, rows, set(TERMINAL)):
            row.down_s = round(seconds, 6)
        for row, found in zip(rows, self._record.get_all([row.id for row in rows]), strict=True):
            for run in found["stages"]:
                times = row.stages if run["verb"] == "do" else row.undos
                times[run["name"]] = run["duration_s"]

    def close(self) -> None:
        """Stop worker and broker: a stage under way is finished first."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _keep_going(
        self, begin: Callable[[Row], str], rows: Sequence[Row], goal: set[State], at_a_time: int = 0
    ) -> Iterator[tuple[Row, float]]:
        """Begin the next as soon as one has reached its goal; yields each with its seconds."""
        left, mark = list(reversed(rows)), self._record.last_event()
        under_way: dict[str, tuple[Row, float]] = {}
        last_news = time.perf_counter()
        while left or under_way:
            while left and len(under_way) < (at_a_time or self._at_a_time):
                row, began = left.pop(), time.perf_counter()
                under_way[begin(row)] = (row, began)
            for seen, event in self._record.follow(mark, LOOK_S):
                mark = seen
                if event["id"] not in under_way:
                    continue
                last_news = time.perf_counter()
                if event["state"] in goal:
                    row, began = under_way.pop(event["id"])
                    yield row, last_news - began
                elif event["state"] in (*TERMINAL, State.UNDOING, State.STUCK):
                    raise self._failure(event["id"], event["state"])
            if time.perf_counter() - last_news > STEP_S or self._process.poll() is not None:
                raise self._error(f"no news of {', '.join(under_way)}")

    def _wait_for_host(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self._settings.host in self._record.live_hosts():
                    return
            except redis.RedisError:
                pass  # the broker is not there yet
            time.sleep(0.1)  # nothing tells us of a socket to come
        raise self._error("sandbatch up does not come up")

    def _failure(self, container_id: str, state: str) -> SandbatchError:
        error = (self._record.get(container_id) or {}).get("error") or {"stage": state, "message": state}
        return SandbatchError(container_id, f"{error['stage']}: {error['message']}", "")

    def _error(self, why: str) -> SandbatchError:
        words = last_words(self._log.read_text(errors="replace"))
        return SandbatchError("sandbatch up", f"{why}; its last words: {words or 'none'}", "")


class _Timed:
    def __init__(self, times: dict[str, float], name: str) -> None:
        self._times, self._name = times, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._times[self._name] = round(time.perf_counter() - self._began, 6)
