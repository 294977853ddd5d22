"""A journal as the record has it, and a record as `--json` shows it (CLI.md)."""

import json
from collections.abc import Sequence
from typing import Any

from tasks.sealed import readable
from tasks.state import State
from worker.journal import Journal

COMMAND_KEPT = 80  # characters, for tables
LABELS_CHARS = 8192  # an image may have any number of them, and a report has them each time
LIMITS = ("memory_bytes", "cpus", "pids")


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
    stages = [{"do|undo": run["verb"], **run} for run in _list(raw, "stages")]
    return {
        "id": raw["id"],
        "batch": raw.get("batch"),
        "labels": spec.get("labels", {}),
        "state": raw["state"],
        "stage": raw.get("stage") or None,
        "attempt": int(raw.get("attempt") or 1),
        "host": raw.get("host") or spec.get("host"),
        "network": networks[0] if networks else None,
        "networks": networks,
        "ip": raw.get("ip"),
        "ips": _list(raw, "ips"),
        "links": _list(raw, "links"),
        "publish": _list(raw, "publish"),
        "egress": spec.get("egress"),  # null: no policy; an empty list: nothing is allowed
        "isolate": spec.get("isolate", False),
        "ready": raw.get("ready") or spec.get("ready"),  # of an image: known once that is there
        "notes": _list(raw, "notes"),
        "image": spec.get("image") or spec.get("rootfs"),
        "image_digest": raw.get("image_digest"),  # null until its image is on the host, or it has none
        "image_labels": json.loads(raw["image_labels"]) if raw.get("image_labels") else {},
        "args": _list(raw, "args") or spec.get("args", []),
        "created_at": raw.get("created_at"),
        "running_at": raw.get("running_at"),
        "ended_at": raw.get("ended_at"),
        "limits": {**asked, **(json.loads(raw["limits"]) if raw.get("limits") else {})},
        "exit_code": int(raw["exit_code"]) if raw.get("exit_code") else None,
        "reason": raw.get("reason"),
        "restarts": int(raw.get("restarts") or 0),
        "oom": raw.get("oom") == "1",
        "error": json.loads(raw["error"]) if raw.get("error") else None,
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


def _list(raw: dict[str, str], name: str) -> list[Any]:
    """Of thousands of records most have none, and to parse an empty list takes time, too."""
    return list(json.loads(raw[name])) if raw.get(name) else []


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
