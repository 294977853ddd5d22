"""Wake whoever waits for a change in a folder: one inotify for all of them, no thread for each."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch

CHANGES = (
    Mask.MODIFY
    | Mask.CREATE
    | Mask.MOVED_TO
    | Mask.MOVED_FROM
    | Mask.DELETE
    | Mask.DELETE_SELF
    | Mask.ONLYDIR
)


class Folders:
    """Of one asyncio loop. An event says only that it is time to look again."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._watches: dict[Path, Watch] = {}
        self._waiting: dict[Path, set[asyncio.Event]] = {}

    async def run(self) -> None:
        """Hand events on until cancelled."""
        with self._inotify:
            async for event in self._inotify:
                if event.watch is None:  # the kernel's queue was full: anything may have changed
                    wake = [one for waiting in self._waiting.values() for one in waiting]
                else:
                    wake = list(self._waiting.get(event.watch.path, ()))
                for one in wake:
                    one.set()

    @contextmanager
    def watch(self, folder: Path) -> Iterator[asyncio.Event]:
        """An event that is set at each change in the folder; never, if there is no such folder."""
        woken = asyncio.Event()
        waiting = self._waiting.setdefault(folder, set())
        if not waiting:
            with suppress(OSError):  # it has gone: whoever watches looks before waiting
                self._watches[folder] = self._inotify.add_watch(folder, CHANGES)
        waiting.add(woken)
        try:
            yield woken
        finally:
            waiting.discard(woken)
            if not waiting:
                self._waiting.pop(folder, None)
                watch = self._watches.pop(folder, None)
                if watch is not None:
                    with suppress(
                        OSError, ValueError, KeyError
                    ):  # its folder has gone, and the watch with it
                        self._inotify.rm_watch(watch)
