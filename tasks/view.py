"""A journal as the record has it, and a record as `--json` shows it (CLI.md)."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from tasks.sealed import readable
from tasks.state import State
from worker.journal import Journal

COMMAND_KEPT = 80  # characters, for tables
LABELS_CHARS = 8192  # an image may have any number of them, and a report has them each time
LIMITS = ("memory_bytes", "cpus", "pids")
Kind = TypeVar("Kind")
Else = TypeVar("Else")


def view(journal: Journal) -> tuple[State, dict[str, str]]:
    """What a journal says, as state and fields of a record."""
    from worker.attachments import attached  # with it comes pyroute2, for which a client has no time

    facts = journal.facts
    fields = {"stages": json.dumps([run.__dict__ for run in journal.runs])}
    ips = journal.data.get("network", {}).get("ips", [])
    if ips:
        fields |= {"ip": ips[0], "ips": json.dumps(ips)}
    if facts.get("publish"):
        fields["publish"] = json.dumps(facts["publish"])
    links = [{"if_name": one.if_name, "network": one.network, "ips": one.ips} for one in attached(journal)]
    if links:
        fields["links"] = json.dumps(links)
    if notes := journal.data.get("bundle", {}).get("notes"):
        fields["notes"] = json.dumps(notes)
    if image := journal.data.get("image"):
        fields |= {"image_digest": str(image.get("digest", "")), "ready": journal.spec.ready}
        args = journal.spec.args  # the image's own, where none were given
        fields |= {"args": json.dumps(args), "command": command_of(args)}
        fields["image_labels"] = json.dumps(_within(image.get("labels") or {}, LABELS_CHARS))
    is_over = journal.is_unwinding or bool(facts.get("restart_at"))
    for name in ("exit_code", "running_at", "ended_at", "reason", "restarts", "log_until"):
        if facts.get(name) is not None and (name != "ended_at" or is_over):
            fields[name] = str(facts[name])
    if journal.final and journal.spec.remove:
        fields["removed"] = "1"
    if facts.get("error"):
        fields["error"] = json.dumps(facts["error"])
    fields["limits"] = json.dumps({name: getattr(journal.spec, name) for name in LIMITS})
    if "oom" in facts:
        fields["oom"] = "1" if facts["oom"] else "0"
    if journal.asked.image is not None:
        fields["waits"] = "1" if journal.waits_for_image else "0"  # it holds no launch slot
    current = [run.name for run in journal.runs if run.verb == "do"]
    fields["stage"] = current[-1] if current else ""
    return state_of(journal), fields


def shape(raw: dict[str, str]) -> dict[str, Any]:
    """A record in the shape of `--json` of a sandbox (CLI.md)."""
    spec = readable(raw.get("spec") or "{}")
    asked = {name: spec.get(name) for name in LIMITS}  # the host's own come with its first report
    networks = [one["name"] for one in spec.get("networks") or []]
    stages = [{"do|undo": run["verb"], **run} for run in _dicts(raw, "stages") if "verb" in run]
    return {
        "id": raw["id"],
        "batch": raw.get("batch"),
        "labels": spec.get("labels", {}),
        "state": raw["state"],
        "stage": raw.get("stage") or None,
        "attempt": parsed(raw.get("attempt"), int, 1),
        "host": raw.get("host") or spec.get("host"),
        "network": networks[0] if networks else None,
        "networks": networks,
        "ip": raw.get("ip"),
        "ips": _texts(raw, "ips"),
        "links": _dicts(raw, "links"),
        "publish": _dicts(raw, "publish"),
        "egress": spec.get("egress"),  # null: no policy; an empty list: nothing is allowed
        "isolate": spec.get("isolate", False),
        "ready": raw.get("ready") or spec.get("ready"),  # of an image: known once that is there
        "notes": _texts(raw, "notes"),
        "image": spec.get("image") or spec.get("rootfs"),
        "image_digest": raw.get("image_digest"),  # null until its image is on the host, or it has none
        "image_labels": parsed(raw.get("image_labels"), dict, {}),
        "args": _texts(raw, "args") or spec.get("args", []),
        "created_at": raw.get("created_at"),
        "running_at": raw.get("running_at"),
        "ended_at": raw.get("ended_at"),
        "limits": {**asked, **parsed(raw.get("limits"), dict, {})},
        "exit_code": parsed(raw.get("exit_code"), int, None),
        "reason": raw.get("reason"),
        "restarts": parsed(raw.get("restarts"), int, 0),
        "oom": raw.get("oom") == "1",
        "error": parsed(raw.get("error"), dict, None),
        "log_until": raw.get("log_until"),
        "removed": raw.get("removed") == "1",
        "held": raw.get("held") == "1",  # by its batch
        "replaces": raw.get("replaces"),  # the sandbox of a lost host that this one was launched for
        "replaced_by": raw.get("replaced_by"),
        "stages": stages,
        "spec": spec,
    }


def command_of(args: Sequence[str]) -> str:
    """What a table shows of a command."""
    return " ".join(args)[:COMMAND_KEPT]


def _within(labels: dict[str, str], most: int) -> dict[str, str]:
    """The first of them, as far as they have no more characters than that together."""
    kept, used = {}, 0
    for name, value in labels.items():
        used += len(name) + len(value)
        if used > most:
            break
        kept[name] = value
    return kept


def parsed(text: str | None, wanted: type[Kind], otherwise: Else) -> Kind | Else:
    """A field that is JSON; `otherwise` if it is not there, or anything else than was wanted.

    Whoever has the broker's password can write it, and one record must not take the others of a list along.
    """
    if not text:  # of thousands of records most have none, and to parse an empty list takes time, too
        return otherwise
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return otherwise
    return found if isinstance(found, wanted) else otherwise


def _texts(raw: dict[str, str], name: str) -> list[str]:
    return [one for one in parsed(raw.get(name), list, []) if isinstance(one, str)]


def _dicts(raw: dict[str, str], name: str) -> list[dict[str, Any]]:
    return [one for one in parsed(raw.get(name), list, []) if isinstance(one, dict)]


def state_of(journal: Journal) -> State:
    """The state that a journal says, as the user sees it."""
    if journal.final:
        return State(journal.final)
    if journal.facts.get("stuck"):
        return State.STUCK
    if journal.is_unwinding:
        return State.UNDOING if journal.facts["wanted"] == State.FAILED else State.STOPPING
    if journal.facts.get("restart_at"):
        return State.RESTARTING
    if journal.facts.get("stop") and journal.is_up:
        return State.STOPPING
    if journal.is_done("ready") and not journal.is_stale:
        return State.RUNNING
    return State.LAUNCHING
