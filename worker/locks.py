"""Files that `flock` locks, and the wait for one, as it waits not at all or for ever."""

import fcntl
import os
import time
from pathlib import Path

LOOK_S = 0.02  # flock has no timed wait, and there is no event to wait for


def open_private(path: str | Path, flags: int) -> int:
    """For `open(…, opener=open_private)`: a new file is its owner's alone; an older one becomes so.

    Who may read a file may lock it, and so hold up whoever waits for the lock.
    """
    handle = os.open(path, flags, 0o600)
    if os.fstat(handle).st_mode & 0o077:
        os.fchmod(handle, 0o600)
    return handle


def lock_within(handle: int, wait_s: float) -> bool:
    """Take the exclusive lock of an open file or folder; False if another still holds it after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_S)
