"""What a host does for its calls: logs and exec, in sandboxes of its own, and its images."""

import asyncio
import logging
from typing import Any

from tasks.calls import CallService, Conversation
from worker.calls import Call, ExecCall, LogsCall
from worker.errors import SandbatchError
from worker.exec import end_left_over, run_exec
from worker.follow import send_log
from worker.image_calls import answer
from worker.image_store import ImageStore
from worker.runsc import Runsc
from worker.settings import Settings
from worker.watch import Folders

log = logging.getLogger("sandbatch")


class HostHandlers:
    """Of one worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders = Folders()
        self._executing = 0

    async def run(self, ready: asyncio.Event) -> None:
        """End what the execs of a killed worker have left, then hand on changes of folders."""
        try:
            await asyncio.to_thread(end_left_over, self._settings, self._runsc())
        except (SandbatchError, OSError) as error:
            log.warning("what an earlier worker's exec has left stays until its sandbox ends: %s", error)
        ready.set()
        await self._folders.run()

    async def handle(self, call: Call, talk: Conversation) -> dict[str, Any]:
        if isinstance(call, LogsCall):
            await send_log(self._settings, call, talk, self._folders)
            return {}
        if isinstance(call, ExecCall):
            return await self._exec(call, talk)
        # What it has begun goes on should its client go away: a removal is not done by halves.
        return await asyncio.to_thread(answer, ImageStore(self._settings), call)

    async def _exec(self, call: ExecCall, talk: Conversation) -> dict[str, Any]:
        slots = self._settings.exec_slots
        if self._executing >= slots:
            why = f"{slots} commands of exec run on it, its exec_slots"
            raise SandbatchError(f"host {self._settings.host}", why, "try again when one has ended")
        self._executing += 1
        try:
            ended = await run_exec(self._settings, self._runsc(), call, talk)
        finally:
            self._executing -= 1
        return {"exit_code": ended.exit_code, "words": ended.words}

    def _runsc(self) -> Runsc:
        return Runsc.from_settings(self._settings, hides_sysctl=False)  # which only a start needs


def make_service(settings: Settings) -> CallService:
    """The calls of a host."""
    return CallService(settings, lambda: HostHandlers(settings))
