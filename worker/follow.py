"""Hand a sandbox's log to a client, from where it asks, and on until the sandbox has ended."""

import asyncio
import time
from pathlib import Path

from worker import journal, logs
from worker.calls import LogsCall, Talk
from worker.errors import JournalError, SandbatchError
from worker.k8s_log import LogFile, Record, Shower, cursor_of, read_cursor, start_of
from worker.settings import Settings
from worker.watch import Folders

CHUNK_BYTES = 1 << 15


async def send_log(settings: Settings, call: LogsCall, talk: Talk, folders: Folders) -> None:
    """Send the log that the call asks for.

    conmon's rotation puts a new file in the place of the old, which is read to its end before the
    new one; a client that is slower than a whole log loses what was rotated away meanwhile.

    Raises:
        SandbatchError: There is no log of such a sandbox here.
    """
    follower = _Follower(settings, call, talk)
    with folders.watch(follower.folder) as changed:
        try:
            await follower.run(changed)
        finally:
            follower.close()


class _Follower:
    def __init__(self, settings: Settings, call: LogsCall, talk: Talk) -> None:
        self._settings, self._call, self._talk = settings, call, talk
        self._log: LogFile | None = None
        self._shower = Shower(call.streams, call.timestamps)
        self.folder = settings.sandboxes_dir / call.container_id

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    async def run(self, changed: asyncio.Event) -> None:
        path = self._path()
        if path is None and self._has_ended():
            raise SandbatchError(
                self._call.container_id, "its host has no log of it", "it ended too long ago, or was removed"
            )
        if path is not None:
            self._log = await self._begin(path)
        if not self._call.follow:
            await self._send(until=self._log.size if self._log else 0)
            return
        while True:
            changed.clear()
            if await self._send() or await self._go_on_in_the_next_file():
                continue
            if self._has_ended():
                break
            await changed.wait()
        await self._send()  # what came between the last look and the end
        while await self._go_on_in_the_next_file():
            await self._send()
        await self._send_rest()

    def _path(self) -> Path | None:
        return logs.find(self._settings, self._call.container_id)

    def _has_ended(self) -> bool:
        """It will not write any more: by its journal's last word conmon has gone, too."""
        try:
            return journal.read(self.folder).final is not None
        except JournalError:
            return not self.folder.exists()

    async def _begin(self, path: Path) -> LogFile:
        """Open the log where the call wants it to begin."""
        log, call = LogFile(path), self._call
        if call.cursor:
            identity, offset, mid = read_cursor(call.cursor)
            self._shower.mid = mid
            if log.identity == identity and offset <= log.size:
                log.offset = offset
            elif identity.split(" ")[1]:  # else it had not yet begun
                await self._talk.note("the log was begun anew meanwhile: a part of it may be missing here")
            return log
        since = call.since_at if call.since_s is None else time.time() - call.since_s
        if since is not None or call.tail is not None:
            # In a thread: it reads the whole log, and others wait for this loop.
            log.offset = await asyncio.to_thread(
                start_of, log, since=since, tail=call.tail, streams=call.streams
            )
        return log

    async def _go_on_in_the_next_file(self) -> bool:
        """Turn to the file that has taken the log's place, if there is one."""
        path = self._path()
        if path is None or (self._log is not None and self._log.is_at(path)):
            return False
        try:
            new = LogFile(path)
        except FileNotFoundError:
            return False  # moved just now, which wakes us
        if self._log is not None:
            await self._send()  # what conmon wrote between our last look and the change
            self._log.close()
        self._log = new
        return True

    async def _send(self, until: int | None = None) -> bool:
        """Send all that stands there now; True if there was anything."""
        if self._log is None:
            return False
        before, part, stream, cursor = self._log.offset, bytearray(), "", ""
        for record in self._log.records(until):
            text = self._shower.show(record)
            if not text:
                continue  # of the stream that nobody asked for
            if part and (record.stream != stream or len(part) >= CHUNK_BYTES):
                await self._talk.output(stream, bytes(part), cursor)
                part.clear()
            part += text
            stream, cursor = record.stream, cursor_of(self._log, record.end, self._shower)
        if part:
            await self._talk.output(stream, bytes(part), cursor)
        return self._log.offset > before

    async def _send_rest(self) -> None:
        record: Record | None = self._log.rest() if self._log else None
        if self._log is not None and record is not None:
            text = self._shower.show(record)
            await self._talk.output(record.stream, text, cursor_of(self._log, record.end, self._shower))
