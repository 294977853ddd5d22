"""The host's own record of one sandbox: what was begun, CNI results, spec. The truth about the host.

One folder a sandbox, in it `journal.jsonl`: a header line, then one line an event. An intent is
synced to disk before the act; an outcome is only written, since it survives our death in the page
cache, and after a power cut the intent alone makes reconcile undo the stage.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker import faults
from worker.errors import Busy, JournalError
from worker.spec import CONTAINER_ID, Spec

VERSION = "journal/v1"
FILE = "journal.jsonl"


def now() -> str:
    """This moment, RFC 3339 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class StageRun:
    """One `do` or `undo` of a stage, as `show` prints it."""

    name: str
    verb: str  # "do" or "undo"
    state: str  # "begun", "done", "failed"
    started_at: str
    ended_at: str | None = None
    duration_s: float | None = None
    error: str | None = None


@dataclass
class Journal:
    """One sandbox's journal, open under its lock or read without it.

    `seq` counts the events: the record in Redis takes a view of the journal only if it is newer.
    """

    folder: Path
    container_id: str
    attempt: int
    batch: str
    boot: str
    spec: Spec
    seq: int = 0
    runs: list[StageRun] = field(default_factory=list)
    intents: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> what its undo must know
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> what its `do` returned
    facts: dict[str, Any] = field(default_factory=dict)  # wanted, error, running_at, ended_at, final, stuck
    _begun: dict[str, bool] = field(default_factory=dict)  # stage -> done; absent: not begun or undone
    _stale: set[str] = field(default_factory=set)  # begun by an attempt that is over

    # -- what it says ------------------------------------------------------------------------------

    @property
    def begun(self) -> list[str]:
        """Stages that may hold something, in the order in which they were begun."""
        return list(self._begun)

    def is_done(self, stage: str) -> bool:
        return self._begun.get(stage, False)

    @property
    def is_stale(self) -> bool:
        """It holds something of an attempt that is over."""
        return bool(self._stale)

    @property
    def is_unwinding(self) -> bool:
        return "wanted" in self.facts

    @property
    def final(self) -> str | None:
        """The terminal state, once everything is undone."""
        value = self.facts.get("final")
        return str(value) if value else None

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def log_path(self) -> Path:
        return self.folder / "container.log"

    # -- events ------------------------------------------------------------------------------------

    def mark_begun(self, stage: str, intent: dict[str, Any] | None = None) -> None:
        """Before the act; `intent` is what an undo by another process needs to know of it."""
        self._append({"event": "begun", "stage": stage, "intent": intent or {}}, sync=True)

    def mark_done(self, stage: str, data: dict[str, Any]) -> None:
        self._append({"event": "done", "stage": stage, "data": data})

    def mark_failed(self, stage: str, message: str) -> None:
        self._append({"event": "failed", "stage": stage, "message": message})

    def mark_undo_begun(self, stage: str) -> None:
        self._append({"event": "undo", "stage": stage})

    def mark_undone(self, stage: str) -> None:
        self._append({"event": "undone", "stage": stage})

    def mark_undo_failed(self, stage: str, message: str) -> None:
        self._append({"event": "undo-failed", "stage": stage, "message": message})

    def set_facts(self, **facts: Any) -> None:
        """Note facts about the whole sandbox; synced, since they steer what is done next."""
        self._append({"event": "facts", "facts": facts}, sync=True)

    def new_attempt(self, attempt: int) -> None:
        """Fence off every message of the attempts before."""
        self._append({"event": "attempt", "attempt": attempt}, sync=True)

    def remove(self) -> None:
        """Forget the sandbox. Only after the record knows its end, and with everything undone."""
        for path in self.folder.iterdir():
            if path.name != FILE:
                path.unlink()
        (self.folder / FILE).unlink(missing_ok=True)
        self.folder.rmdir()

    def _append(self, event: dict[str, Any], *, sync: bool = False) -> None:
        event = {"seq": self.seq + 1, "t": now(), **event}
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        point = ".".join(filter(None, ("journal", event["event"], event.get("stage"))))
        faults.point(f"{point}.before")
        handle = os.open(self.folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(handle, line)
            if sync:
                os.fdatasync(handle)
        finally:
            os.close(handle)
        faults.point(f"{point}.after")
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        kind, stage, at = event["event"], event.get("stage", ""), event["t"]
        self.seq = event["seq"]
        if kind == "begun":
            self._begun[stage] = False
            self.intents[stage] = event["intent"]
            self.runs.append(StageRun(stage, "do", "begun", at))
        elif kind == "done":
            self._begun[stage] = True
            self.data[stage] = event["data"]
            self._end(stage, "do", "done", at)
        elif kind == "failed":
            self._end(stage, "do", "failed", at, event["message"])
        elif kind == "undo":
            self.runs.append(StageRun(stage, "undo", "begun", at))
        elif kind == "undone":
            self._begun.pop(stage, None)
            self.data.pop(stage, None)
            self._stale.discard(stage)
            self._end(stage, "undo", "done", at)
        elif kind == "undo-failed":
            self._end(stage, "undo", "failed", at, event["message"])
        elif kind == "facts":
            self.facts.update(event["facts"])
        elif kind == "attempt":
            self.attempt = event["attempt"]
            self._stale = set(self._begun)
        else:
            raise JournalError(str(self.folder), f"unknown event {kind!r}", "another release wrote it")

    def _end(self, stage: str, verb: str, state: str, at: str, error: str | None = None) -> None:
        for run in reversed(self.runs):
            if run.name == stage and run.verb == verb and run.state == "begun":
                run.state, run.ended_at, run.error = state, at, error
                run.duration_s = round(_seconds(at) - _seconds(run.started_at), 3)
                return


def create(sandboxes_dir: Path, container_id: str, *, attempt: int, batch: str, spec: Spec) -> Journal:
    """Begin the journal of a new sandbox; the one that is there if there is one already."""
    folder = sandboxes_dir / container_id
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / FILE
    if not path.exists():
        header = {
            "kind": VERSION,
            "id": container_id,
            "attempt": attempt,
            "batch": batch,
            "boot_id": boot_id(),
            "t": now(),
            "spec": spec.model_dump(),
        }
        temporary = folder / f".{FILE}.{os.getpid()}"
        with temporary.open("w") as out:
            out.write(json.dumps(header, separators=(",", ":")) + "\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
        _sync_folder(folder)
    return read(folder)


def read(folder: Path) -> Journal:
    """Read a journal. A torn last line (we died while writing it) is as if it had not been written.

    Raises:
        JournalError: Empty, torn elsewhere, foreign, or of another release.
    """
    path = folder / FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise JournalError(
            str(folder), "has no journal", "sandbatch audit shows what it may belong to"
        ) from None
    lines = raw.split(b"\n")
    torn = lines.pop()  # what stands behind the last newline; empty when all is well
    try:
        head = json.loads(lines[0])
        if head["kind"] != VERSION:
            raise JournalError(
                str(path), f"is of another release ({head['kind']!r})", f"this one reads {VERSION}"
            )
        journal = Journal(
            folder, head["id"], head["attempt"], head["batch"], head["boot_id"], Spec(**head["spec"])
        )
        if not CONTAINER_ID.fullmatch(journal.container_id) or journal.container_id != folder.name:
            raise JournalError(str(path), f"is of {journal.container_id!r}", "its folder has another name")
        for line in lines[1:]:
            journal._apply(json.loads(line))
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise JournalError(
            str(path), f"cannot be read ({error})", "it is set aside; see sandbatch audit"
        ) from None
    if torn:  # later events must not be glued to it
        with path.open("r+b") as out:
            out.truncate(len(raw) - len(torn))
    return journal


def read_all(sandboxes_dir: Path) -> tuple[list[Journal], list[JournalError]]:
    """Every journal of this host, without their locks, and the folders that cannot be read."""
    journals, errors = [], []
    for folder in sorted(sandboxes_dir.iterdir()) if sandboxes_dir.is_dir() else []:
        if not CONTAINER_ID.fullmatch(folder.name):
            continue
        try:
            journals.append(read(folder))
        except JournalError as error:
            if folder.exists():  # else its sandbox has just ended
                errors.append(error)
    return journals, errors


@contextmanager
def locked(sandboxes_dir: Path, container_id: str, *, wait_s: float = 0.0) -> Iterator[Journal]:
    """The journal under the sandbox's lock, which keeps twins of a message apart.

    The lock is on the folder itself, so it leaves no file behind; the kernel drops it with the
    process. `wait_s` bounds the wait for another holder, a process that does one stage.

    Raises:
        Busy: Another process holds it.
        JournalError: There is no such sandbox here (any more), or its journal cannot be read.
    """
    folder = sandboxes_dir / container_id
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise JournalError(
            container_id, "is not known on this host", "it has ended, or never came here"
        ) from None
    try:
        _lock(handle, container_id, wait_s)
        yield read(folder)  # a folder removed while we waited has no journal: JournalError
    finally:
        os.close(handle)


def _lock(handle: int, container_id: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Busy(container_id, "another task works on it", "it is tried again") from None
            time.sleep(0.02)  # flock has no timed wait, and no event to wait for


def _sync_folder(folder: Path) -> None:
    for path in (folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
