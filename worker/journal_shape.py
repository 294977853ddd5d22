"""What an event of a journal looks like: checked once where it is read, so that nobody else need ask."""

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

FINALS = ("exited", "failed", "cancelled")
EVENTS = ("begun", "done", "failed", "undo", "undone", "undo-failed", "facts", "attempt")
MOST_S = 1e11  # of a moment or a span, in seconds
Check = Callable[[Any], None]


def check(event: Any) -> None:
    """See that all that we know of is of its type; what another release has added is passed over.

    Raises:
        TypeError, ValueError, KeyError: It is not.
    """
    if event["event"] not in EVENTS:
        return  # another release's: whoever reads it says so
    kind, stage = event["event"], event.get("stage")
    _record({"seq": _is(int), "t": _moment}, "seq", "t")(event)
    if kind == "attempt":
        _is(int)(event["attempt"])
    elif kind != "facts":  # a stage without a name would be written into an error, which none can read then
        _is(str)(stage)
    if kind == "facts":
        _fields(event["facts"], FACTS)
    elif kind in ("failed", "undo-failed"):
        _is(str)(event["message"])
    elif kind in ("begun", "done"):
        said = event["intent" if kind == "begun" else "data"]
        _fields(said, (INTENTS if kind == "begun" else DATA).get(stage, {}))
        needed = NEEDED.get(stage, ()) if kind == "done" else ()
        if said and not all(name in said for name in needed):
            raise KeyError(f"{stage} lacks one of {', '.join(needed)}")


def _is(*types: type) -> Check:
    def check_type(value: Any) -> None:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{str(value)[:40]!r} is of another type")

    return check_type


def _moment(value: Any) -> None:
    datetime.fromisoformat(value).timestamp()


def _span(value: Any) -> None:
    _is(int, float)(value)
    if not (math.isfinite(value) and abs(value) < MOST_S):
        raise ValueError(f"{value} is no time")


def _utf8(value: str) -> None:
    value.encode()


def _final(value: Any) -> None:
    if value not in FINALS:
        raise ValueError(f"{value!r} is no end")


def _fields(value: Any, checks: dict[str, Check], *needed: str) -> None:
    """A key that is there, and is not null, is what its check says; those that are needed are there."""
    _is(dict)(value)
    for name in needed:
        checks[name](value[name])
    for name, one in value.items():
        if name in checks and one is not None:
            checks[name](one)


def _record(checks: dict[str, Check], *needed: str) -> Check:
    return lambda value: _fields(value, checks, *needed)


def _list_of(each: Check) -> Check:
    def check_list(value: Any) -> None:
        _is(list)(value)
        for one in value:
            each(one)

    return check_list


TEXT, TEXTS, ANY = _is(str), _list_of(_is(str)), _is(dict)
WORDS = _record({"stage": TEXT, "message": TEXT}, "stage", "message")
PORT = {"host_port": _is(int), "port": _is(int), "protocol": TEXT, "host_ip": TEXT}


def _port(value: Any) -> None:
    _record(PORT, "host_port", "port", "protocol")(value)
    _ = value["host_ip"]  # null: every address


FACTS: dict[str, Check] = {
    **dict.fromkeys(("wanted", "final"), _final),
    **dict.fromkeys(("error", "stuck"), WORDS),
    **dict.fromkeys(("reason", "image_digest"), TEXT),
    **dict.fromkeys(("running_at", "ended_at", "restart_at", "log_until"), _moment),
    **dict.fromkeys(("exit_code", "restarts", "quick_ends", "gone"), _is(int)),
    "stop": _record({"at": _moment, "grace_s": _span, "reason": TEXT}, "at", "grace_s", "reason"),
    "publish": _list_of(_port),
    "unfinished": ANY,
}
PLANNED = {"if_name": TEXT, "config": _utf8, "capability_args": ANY}
MADE = {"if_name": TEXT, "network": TEXT, "ips": TEXTS, "result": ANY}
LINK = {"addresses": TEXTS, "neighbours": TEXTS}
INTENTS: dict[str, dict[str, Check]] = {
    "network": {"attachments": _list_of(_record(PLANNED, "if_name", "config")), "config": _utf8},
    "egress": {"links": _list_of(_record(LINK, *LINK))},
    "image": {"digest": TEXT, "reference": TEXT},
    "bundle": {"rootfs": TEXT},
}


def _texts_by_name(value: Any) -> None:
    TEXTS(list(value.values()))


def _links(value: Any) -> None:
    _list_of(_record(MADE, *MADE))(value)
    if not value:
        raise ValueError("a network without a link")


# What an image's config says in place of the spec (`worker.image_config.overrides`).
OF_IMAGE: dict[str, Check] = {
    "args": TEXTS,
    "env": _texts_by_name,
    "groups": _list_of(_is(int)),
    **dict.fromkeys(("cwd", "user", "ready", "stop_signal", "rootfs"), TEXT),
}


def _of_image(value: Any) -> None:
    _is(dict)(value)
    for name, one in value.items():
        if name in OF_IMAGE and (one is not None or name != "stop_signal"):  # none: TERM
            OF_IMAGE[name](one)


DATA: dict[str, dict[str, Check]] = {
    "network": {"ips": TEXTS, "result": ANY, "attachments": _links},
    "image": {"spec": _of_image, "labels": _texts_by_name, "digest": TEXT},
    "bundle": {"notes": _is(list), "rootfs": TEXT},
}
NEEDED = {"image": ("spec",)}
