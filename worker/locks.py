"""The wait for a `flock`, which itself waits not at all or for ever."""

import fcntl
import time

LOOK_S = 0.02  # flock has no timed wait, and there is no event to wait for


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
