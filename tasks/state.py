"""The states of a sandbox as the user sees them, and the moves between them."""

from enum import StrEnum


class State(StrEnum):
    """`stage` of the record says which stage a launching sandbox is at."""

    QUEUED = "queued"  # enqueued, no host has taken it
    PLACED = "placed"  # a host has taken it
    LAUNCHING = "launching"  # its stages are being done
    RUNNING = "running"  # it answered its probe
    RESTARTING = "restarting"  # its program failed; it is started anew after a pause
    STOPPING = "stopping"  # it is being undone on its way to exited or cancelled
    UNDOING = "undoing"  # a stage failed; it is being undone on its way to failed
    STUCK = "stuck"  # an undo keeps failing; reconcile goes on trying
    EXITED = "exited"  # ended or removed; nothing is left
    FAILED = "failed"  # a stage failed; nothing is left
    CANCELLED = "cancelled"  # removed before it ran; nothing is left


UNKNOWN = "unknown"  # no state of a record: shown where its host is lost, which alone knows

TERMINAL = frozenset({State.EXITED, State.FAILED, State.CANCELLED})

_ENDING = {State.STUCK, State.STOPPING, State.UNDOING, *TERMINAL}
_ON_HOST = {State.LAUNCHING, State.RUNNING, State.RESTARTING, *_ENDING}

# A host reports the newest view of its journal, not each event: so a move may leave states out, but
# never goes back, but with a new attempt. The same state again is no move.
MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset(
        {State.PLACED, State.CANCELLED, State.FAILED}
    ),  # failed: the host refused the spec
    State.PLACED: frozenset({State.QUEUED} | _ON_HOST),  # queued: its host never began, another may
    State.LAUNCHING: frozenset(_ON_HOST),
    State.RUNNING: frozenset({State.RESTARTING} | _ENDING),
    State.RESTARTING: frozenset(_ON_HOST),
    State.STOPPING: frozenset(_ENDING),
    State.UNDOING: frozenset(_ENDING),
    State.STUCK: frozenset(_ENDING),  # an undo that works at last
    State.EXITED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
