"""The host's own record of one sandbox: what was begun, CNI results, spec. The truth about the host.

One folder a sandbox, in it `journal.jsonl`: a header line, then one line an event. An intent is
synced to disk before the act; an outcome is only written, since it survives our death in the page
cache, and after a power cut the intent alone makes reconcile undo the stage.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker import faults
from worker.errors import Busy, JournalError
from worker.journal_shape import check
from worker.locks import lock_within
from worker.spec import CONTAINER_ID, Spec
from worker.sync import sync_folder

VERSION = "journal/v1"
FILE = "journal.jsonl"
SET_ASIDE = re.compile(r"^journal\.jsonl\.(?P<kind>empty|torn|foreign|release-[\w.]+)-\d{8}T\d{6}$")
NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
listener: "Callable[[Journal, dict[str, Any]], None] | None" = None  # hears what this process has noted
CREATE_WAIT_S = 5.0  # without a journal the lock is held by a twin of `create`, or by audit --mend


def now() -> str:
    """This moment, RFC 3339 in UTC with milliseconds."""
    return _text(datetime.now(UTC))


def stamp(at_s: float) -> str:
    """A moment in seconds since the epoch, as `now` writes it."""
    return _text(datetime.fromtimestamp(at_s, UTC))


def seconds(text: str) -> float:
    """A moment that was written so, in seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
    created_at: str
    asked: Spec  # as the user asked for it
    seq: int = 0
    runs: list[StageRun] = field(default_factory=list)
    intents: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> what its undo must know
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> what its `do` returned
    # wanted, error, final, stuck; running_at, ended_at, exit_code, reason; stop; restarts, restart_at;
    # image_digest; pulling, fetched (while it waits for its image); gone (how often that went meanwhile)
    facts: dict[str, Any] = field(default_factory=dict)
    signed: dict[str, str] | None = (
        None  # what the broker must know again of the spec's signature, if it had one
    )
    _begun: dict[str, bool] = field(default_factory=dict)  # stage -> done; absent: not begun or undone
    _stale: set[str] = field(default_factory=set)  # begun by an attempt that is over
    _spec: Spec | None = None  # with what its image says, once that is there

    # -- what it says ------------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        """What is launched: as asked, and where that is silent, as the image says, once it is there."""
        return self._spec or self.asked

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
    def is_up(self) -> bool:
        """Its program was started, and nobody has noted its end: it runs, or has ended just now."""
        is_over = self.is_unwinding or self.is_stale or self.facts.get("restart_at")
        return self.is_done("container") and not is_over

    @property
    def waits_for_image(self) -> bool:
        """Its image is being fetched, or is here and the launch waits for a slot; it holds none meanwhile."""
        is_begun = "image" in self._begun and ("image" in self._stale or not self.is_done("image"))
        return is_begun and bool(self.facts.get("pulling")) and not self.is_unwinding

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
            written = os.write(handle, line)
            if written != len(line):  # the disk is full: half an event would make the next one unreadable
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / FILE))
            if sync:
                os.fdatasync(handle)
        finally:
            os.close(handle)
        faults.point(f"{point}.after")
        self._apply(event)
        if listener is not None:
            listener(self, event)

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
            if stage == "image":
                self._spec = self.asked.model_copy(update=event["data"]["spec"])
            self._end(stage, "do", "done", at)
        elif kind == "failed":
            self._end(stage, "do", "failed", at, event["message"])
        elif kind == "undo":
            self.runs.append(StageRun(stage, "undo", "begun", at))
        elif kind == "undone":
            self._begun.pop(stage, None)
            self.data.pop(stage, None)
            if stage == "image":
                self._spec = None
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
            why, todo = f"unknown event {kind!r}", "another release wrote it"
            raise JournalError(str(self.folder / FILE), why, todo, _release(VERSION))

    def _end(self, stage: str, verb: str, state: str, at: str, error: str | None = None) -> None:
        for run in reversed(self.runs):
            if run.name == stage and run.verb == verb and run.state == "begun":
                run.state, run.ended_at, run.error = state, at, error
                run.duration_s = round(seconds(at) - seconds(run.started_at), 3)
                return
        self.runs.append(StageRun(stage, verb, state, at, at, 0.0, error))  # its begin was not written


def create(
    sandboxes_dir: Path,
    container_id: str,
    *,
    attempt: int,
    batch: str,
    spec: Spec,
    signed: Mapping[str, str] | None = None,
) -> Journal:
    """Begin the journal of a new sandbox; the one that is there if there is one already.

    Raises:
        Busy: Somebody removes what an earlier sandbox of this id has left.
        JournalError: The one that is there cannot be read, or was set aside.
    """
    folder = sandboxes_dir / container_id
    header = {
        "kind": VERSION,
        "id": container_id,
        "attempt": attempt,
        "batch": batch,
        "boot_id": boot_id(),
        "t": now(),
        "spec": spec.model_dump(),
        **({"signed": dict(signed)} if signed else {}),
    }
    while not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            # Under the lock, so that nobody takes the folder for an orphan's in between.
            with held(sandboxes_dir, container_id, wait_s=CREATE_WAIT_S):
                if not (folder / FILE).exists():
                    _begin(folder, header)
        except FileNotFoundError:
            continue  # it was an orphan's, and is gone now
    return read(folder)


def _begin(folder: Path, header: dict[str, Any]) -> None:
    for old in set_aside_files(folder):
        raise JournalError(
            str(folder), f"its journal was set aside as {old.name}", "run sandbatch audit --mend"
        )
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(handle, "w") as out:  # it has the values of the environment
            out.write(json.dumps(header, separators=(",", ":")) + "\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(folder / FILE)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError:  # a full disk: no launch is begun that could not be journaled, and no folder stays
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            folder.rmdir()
        raise


def read(folder: Path, *, cut: bool = False) -> Journal:
    """Read a journal. A torn last line (we died while writing it) is as if it had not been written.

    Args:
        cut: Take the torn line away, so that no later event is glued to it. Only under the lock:
            without it, what looks torn may be a line that is being written.
    Raises:
        JournalError: Empty, torn elsewhere, foreign, or of another release, as its `kind` says; or
            there is none, or the disk refuses: then `kind` is empty.
    """
    path = folder / FILE
    raw = _bytes(path)
    lines = raw.split(b"\n")
    torn = lines.pop()  # what stands behind the last newline; empty when all is well
    head = _head(path, raw, lines)
    try:
        journal = Journal(
            folder=folder,
            container_id=head["id"],
            attempt=head["attempt"],
            batch=head["batch"],
            boot=head["boot_id"],
            created_at=head["t"],
            asked=Spec(**head["spec"]),
            signed=head.get("signed"),
        )
        if not CONTAINER_ID.fullmatch(journal.container_id) or journal.container_id != folder.name:
            why = f"is of {journal.container_id!r}"
            raise JournalError(str(path), why, "its folder has another name", "foreign")
        for line in lines[1:]:
            event = json.loads(line)
            check(event)
            journal._apply(event)
        if journal.signed is not None and {"as", "token", "spec"} - set(map(str, journal.signed)):
            raise ValueError("signed is no signature")
        if not isinstance(journal.attempt, int) or not isinstance(journal.batch, str):
            raise ValueError("attempt is a number, and batch a text")
        seconds(journal.created_at)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _broken(path, error, "torn") from None
    if torn and cut:
        with path.open("r+b") as out:
            out.truncate(len(raw) - len(torn))
    return journal


def _bytes(path: Path) -> bytes:
    try:
        # A link may lead anywhere, and a pipe would make us wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _broken(path, "it is no file", "foreign")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        aside = [one.name for one in set_aside_files(path.parent)]
        why = f"has no journal any more: it was set aside as {aside[0]}" if aside else "has no journal"
        raise JournalError(str(path.parent), why, "sandbatch audit shows what it may belong to") from None
    except OSError as error:
        kind = "foreign" if path.is_symlink() or path.is_dir() else ""
        raise _broken(path, error, kind) from None


def _head(path: Path, raw: bytes, lines: list[bytes]) -> dict[str, Any]:
    if not raw.strip():
        raise _broken(path, "it is empty", "empty")
    if not lines:
        raise _broken(path, "its first line has no end", "torn")
    try:
        head = json.loads(lines[0])
        kind = head["kind"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(path, error, "torn" if f'"{VERSION}"'.encode() in lines[0] else "foreign") from None
    if not isinstance(kind, str) or not kind.startswith("journal/"):
        raise JournalError(str(path), f"is foreign (its kind is {kind!r})", "see sandbatch audit", "foreign")
    if kind != VERSION:
        why = f"is of another release ({kind!r})"
        raise JournalError(str(path), why, f"this one reads {VERSION}", _release(kind))
    return dict(head)


def _broken(path: Path, why: object, kind: str) -> JournalError:
    todo = "it is set aside when the worker starts; see sandbatch audit" if kind else "see the host's disk"
    return JournalError(str(path), f"cannot be read ({why})", todo, kind)


def _release(kind: str) -> str:
    return "release-" + re.sub(r"[^\w.]", "_", kind, flags=re.ASCII)[:40]


def set_aside(folder: Path) -> Path | None:
    """Give a journal that cannot be read a name that says so; None if it can be, or there is none.

    Under the sandbox's lock. It stays in its folder, which keeps the sandbox's name from being
    taken again, until `audit --mend` has undone what it held.
    """
    try:
        read(folder)
    except JournalError as error:
        if not error.kind:
            return None
        name = folder / f"{FILE}.{error.kind}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}"
        (folder / FILE).rename(name)
        sync_folder(folder)
        sync_folder(folder.parent)
        return name
    return None


def set_aside_files(folder: Path) -> list[Path]:
    """The journals in a sandbox's folder that were set aside."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if SET_ASIDE.match(name))
    except (FileNotFoundError, NotADirectoryError):
        return []


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
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(held(sandboxes_dir, container_id, wait_s=wait_s))
        except OSError as error:
            if error.errno not in NO_FOLDER:
                raise
            raise JournalError(
                container_id, "is not known on this host", "it has ended, or never came here"
            ) from None
        yield read(folder, cut=True)


@contextmanager
def held(sandboxes_dir: Path, container_id: str, *, wait_s: float = 0.0) -> Iterator[Path]:
    """The sandbox's folder under its lock, whatever it holds.

    Raises:
        Busy: Another process holds it.
        FileNotFoundError: There is no such folder (any more).
    """
    folder = sandboxes_dir / container_id
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(handle, container_id, wait_s)
            if os.path.samestat(os.fstat(handle), os.lstat(folder)):  # else another one since we waited
                yield folder
                return
        finally:
            os.close(handle)


def _lock(handle: int, container_id: str, wait_s: float) -> None:
    if not lock_within(handle, wait_s):
        raise Busy(container_id, "another task works on it", "it is tried again")
