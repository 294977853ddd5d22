"""The words of a spec in a batch file: those of `run`'s options, and those of the spec as `--json` has it."""

import difflib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cli import parse
from cli.refused import refusal
from worker.errors import BadInput
from worker.image_ref import absolute
from worker.spec import Spec

Fields = dict[str, Any]


class Trouble(NamedTuple):
    """What is wrong with a word; "" is the spec as a whole."""

    word: str
    what: str
    why: str
    todo: str


def _plain(name: str) -> Callable[[Any, str], Fields]:
    return lambda value, word: {name: value}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _many(name: str, read: Callable[[str], Any] = lambda text: text) -> Callable[[Any, str], Fields]:
    """A list, or one alone; texts as the command line has them, mappings as the spec has them."""
    return lambda value, word: {name: [read(one) if isinstance(one, str) else one for one in _list(value)]}


def _mapping(name: str, read: Callable[[str], tuple[str, str]] | None = None) -> Callable[[Any, str], Fields]:
    def parts(value: Any, word: str) -> Fields:
        if isinstance(value, dict):
            return {name: value}
        pairs = [
            read(_text(one, word)) if read else parse.pair(_text(one, word), word) for one in _list(value)
        ]
        return {name: dict(pairs)}

    return parts


def _text(value: Any, word: str) -> str:
    if not isinstance(value, str):
        raise BadInput(word, "a text or a number is needed", "correct it")
    return value


def _command(value: Any, word: str) -> Fields:
    if not isinstance(value, str):
        return {"args": value}
    try:
        return {"args": shlex.split(value)}
    except ValueError as error:
        raise BadInput(word, f"{error} in its text", "write a list of words") from None


def _image(value: Any, word: str) -> Fields:
    return {"image": absolute(_text(value, word), Path.cwd())}


def _entrypoint(value: Any, word: str) -> Fields:
    """A list as in an image's config; a text is its one word, as docker's --entrypoint has it."""
    return {"entrypoint": value if isinstance(value, list) else [value] if value else []}


def _text_of(name: str) -> Callable[[Any, str], Fields]:
    return lambda value, word: {name: _text(value, word)}


def _numbers(name: str) -> Callable[[Any, str], Fields]:
    return lambda value, word: {name: _list(value)}


def _read_only(value: Any, word: str) -> Fields:
    if str(value).lower() not in ("true", "yes", "false", "no"):
        raise BadInput(word, "true or false is needed", "or say it by writable: no, memory, disk")
    return {"writable": "no"} if str(value).lower() in ("true", "yes") else {}


def _seconds(name: str) -> Callable[[Any, str], Fields]:
    return lambda value, word: {name: parse.duration(_text(value, word), word)}


def _size(name: str) -> Callable[[Any, str], Fields]:
    return lambda value, word: {name: parse.size(_text(value, word), word)}


def _bandwidth(value: Any, word: str) -> Fields:
    return {"bandwidth": parse.bandwidth(value) if isinstance(value, str) else value}


def _egress(value: Any, word: str) -> Fields:
    rules = [_text(one, word) for one in _list(value)]
    return {"egress": parse.egress(rules) if rules else []}


def _writable(value: Any, word: str) -> Fields:
    return parse.writable(_text(value, word))


_network = _many("networks", parse.network)
_mount = _many("mounts", parse.bind)
_env, _labels = _mapping("env"), _mapping("labels")
_hosts = _mapping("hosts", parse.name_and_address)
# Word -> the name under which a spec's word takes the place of a default's, and how it is read.
WORDS: dict[str, tuple[str, Callable[[Any, str], Fields]]] = {
    "command": ("command", _command),
    "args": ("command", _command),
    "host": ("host", _plain("host")),
    "on": ("on", _mapping("on")),
    "reschedule": ("reschedule", _plain("reschedule")),
    "env": ("env", _env),
    "cwd": ("cwd", _plain("cwd")),
    "label": ("labels", _labels),
    "labels": ("labels", _labels),
    "ready": ("ready", _plain("ready")),
    "ready_timeout": ("ready_timeout", _seconds("ready_timeout_s")),
    "ready_timeout_s": ("ready_timeout", _seconds("ready_timeout_s")),
    "memory": ("memory", _size("memory_bytes")),
    "memory_bytes": ("memory", _size("memory_bytes")),
    "cpus": ("cpus", _plain("cpus")),
    "pids": ("pids", _plain("pids")),
    "ttl": ("ttl", _seconds("ttl_s")),
    "ttl_s": ("ttl", _seconds("ttl_s")),
    "deadline": ("deadline", lambda value, word: {"deadline_at": parse.moment(_text(value, word), word)}),
    "deadline_at": ("deadline", _plain("deadline_at")),
    "stop_grace": ("stop_grace", _seconds("stop_grace_s")),
    "stop_grace_s": ("stop_grace", _seconds("stop_grace_s")),
    "restart": ("restart", _plain("restart")),
    "keep": ("keep", _seconds("keep_s")),
    "keep_s": ("keep", _seconds("keep_s")),
    "rm": ("remove", _plain("remove")),
    "remove": ("remove", _plain("remove")),
    "network": ("network", _network),
    "networks": ("network", _network),
    "publish": ("publish", _many("publish", parse.publish)),
    "bandwidth": ("bandwidth", _bandwidth),
    "dns": ("dns", _many("dns")),
    "dns_search": ("dns_search", _many("dns_search")),
    "add_host": ("hosts", _hosts),
    "hosts": ("hosts", _hosts),
    "egress": ("egress", _egress),
    "isolate": ("isolate", _plain("isolate")),
    "image": ("image", _image),
    "pull": ("pull", _plain("pull")),
    "entrypoint": ("entrypoint", _entrypoint),
    "user": ("user", _text_of("user")),
    "group_add": ("groups", _numbers("groups")),
    "groups": ("groups", _numbers("groups")),
    "stop_signal": ("stop_signal", _text_of("stop_signal")),
    "read_only": ("writable", _read_only),
    "rootfs": ("rootfs", _plain("rootfs")),
    "volume": ("volume", _mount),
    "mount": ("mount", _mount),
    "mounts": ("mount", _mount),
    "tmpfs": ("tmpfs", _many("mounts", parse.tmpfs)),
    "writable": ("writable", _writable),
    "writable_bytes": ("writable_bytes", _size("writable_bytes")),
    "kind": ("kind", _plain("kind")),
}
MAIN = [word for word in WORDS if not word.endswith(("_s", "_at", "_bytes"))] + ["count"]
ADD_UP = ("env", "labels", "on", "hosts")  # a spec adds to those of the defaults; else its word counts alone
Slots = dict[str, tuple[str, Fields]]  # what is given, under its name: the word that was used, its fields


def read(words: Mapping[str, Any]) -> tuple[Slots, list[Trouble]]:
    """What the words of one mapping mean; a word whose value is null takes that of the defaults away."""
    slots: Slots = {}
    troubles = []
    for given, value in words.items():
        word = given.replace("-", "_")
        if word not in WORDS:
            why, todo = refusal(word) or ("no such word", suggest(word, MAIN))
            troubles.append(Trouble(given, given, why, todo))
            continue
        slot, parts = WORDS[word]
        if slot in slots:
            todo = "leave one of them"
            troubles.append(Trouble(given, given, f"it means the same as {slots[slot][0]}", todo))
            continue
        try:
            slots[slot] = given, ({} if value is None else parts(value, given))
        except BadInput as error:
            what = error.what.removeprefix("--")
            what = what if what.startswith(given) else f"{given}: {what}"
            troubles.append(Trouble(given, what, error.why, error.todo))
            slots[slot] = given, {}
    return slots, troubles


def make(slots: Slots, defaults: Slots, network: str, deadline_at: str | None) -> "Spec | list[Trouble]":
    """The spec that a mapping and the defaults make together, or what is wrong.

    Args:
        network: Of a spec that names none.
        deadline_at: Of the whole batch; an earlier one of its own stays.
    """
    fields: Fields = {"networks": [{"name": network}]}
    origin: dict[str, str] = {}
    mounts: list[str] = []  # which word gave each
    for slot in {**defaults, **slots}:
        word, given = slots[slot] if slot in slots else defaults[slot]
        if slot in ADD_UP and given and slot in slots and slot in defaults:
            both = {**defaults[slot][1].get(slot, {}), **given[slot]}
            given = {slot: {name: one for name, one in both.items() if one is not None}}
        for name, value in given.items():
            if name == "mounts":
                mounts += [word] * len(value)
                value = [*fields.get("mounts", []), *value]
            fields[name], origin[name] = value, word
    try:
        spec = Spec.model_validate(fields, strict=False)  # numbers and bools come as text
    except ValidationError as error:
        return list(_troubles(error, origin, mounts))
    if spec.host is not None and spec.reschedule:
        why = f"host {spec.host} leaves it no other host"
        return [Trouble(origin["reschedule"], origin["reschedule"], why, "leave one of them out")]
    if deadline_at is not None and (spec.deadline_at is None or _is_later(spec.deadline_at, deadline_at)):
        return spec.model_copy(update={"deadline_at": deadline_at})
    return spec


def _is_later(one: str, other: str) -> bool:
    return parse.instant(one) > parse.instant(other)


def _troubles(error: ValidationError, origin: Mapping[str, str], mounts: list[str]) -> Iterable[Trouble]:
    for one in error.errors():
        loc = [str(part) for part in one["loc"]]
        word = origin.get(loc[0], "") if loc else ""
        if loc and loc[0] == "mounts" and len(loc) > 1:
            word = mounts[int(loc[1])]
        if one["type"] == "missing" and loc == ["args"]:
            yield Trouble("", "command", "there is none", "name one, here or in defaults")
            continue
        what = ".".join([word or (loc[0] if loc else "spec"), *loc[1:]])
        why, given = one["msg"].removeprefix("Value error, "), one.get("input")
        # Of a list or a mapping the error speaks of one part; another may be a secret.
        why = why if given is None or isinstance(given, dict | list) else f"{given!r}: {why}"
        yield Trouble(word, what, why, "correct it")


def suggest(word: str, known: Iterable[str]) -> str:
    """What may have been meant, else all that is known."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def key(words: Mapping[str, Any]) -> str:
    """The same for mappings that mean the same."""
    return json.dumps(words, sort_keys=True)
