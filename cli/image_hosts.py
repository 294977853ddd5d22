"""Which hosts know images, and one question to many of them at the same time."""

import queue
import threading
from collections.abc import Mapping
from typing import Any

import redis

from cli.calls import converse
from cli.client import Client
from cli.hosts import since
from cli.output import one_line, say
from tasks.caller import new_call_id
from tasks.host_record import LIVE, Facts
from worker.calls import Call, make_call
from worker.errors import BadInput, SandbatchError
from worker.settings import Settings

KIND = "spec/v3"  # hosts that can read such a spec know images

Answers = dict[str, dict[str, Any]]
Errors = dict[str, SandbatchError]


def choose(client: Client, host: str | None, command: str) -> tuple[list[str], Errors]:
    """The hosts to ask, and those that would not understand: the one that is named, else all that live.

    Raises:
        BadInput: The one that is named is not known, not up, or too old.
        SandbatchError: No host is up.
    """
    known = client.record.all_hosts()
    if host is not None:
        if host not in known:
            raise BadInput(f"host {host}", "no such host", f"known: {', '.join(known) or 'none'}")
        if known[host]["state"] != LIVE:
            raise BadInput(f"host {host}", f"is {since(known[host])}", "start its worker first")
        if not knows_images(known[host]):
            error = too_old(host, known[host])
            raise BadInput(error.what, error.why, error.todo)
        return [host], {}
    live = {name: facts for name, facts in sorted(known.items()) if facts["state"] == LIVE}
    if not live:
        raise SandbatchError(command, "no host is up", "see sandbatch hosts")
    errors = {name: too_old(name, facts) for name, facts in live.items() if not knows_images(facts)}
    return [name for name in live if name not in errors], errors


def knows_images(facts: Facts) -> bool:
    return KIND in facts.get("kinds", ())


def too_old(host: str, facts: Facts) -> SandbatchError:
    words = f"has release {facts.get('version', 'unknown')}, which knows no images"
    return SandbatchError(f"host {host}", words, "upgrade it")


def ask(settings: Settings, verb: str, wanted: Mapping[str, Mapping[str, Any]]) -> tuple[Answers, Errors]:
    """Ask hosts at the same time, each with fields of its own; what they answer, and what went wrong."""
    found: queue.SimpleQueue[tuple[str, dict[str, Any] | SandbatchError]] = queue.SimpleQueue()
    for host, fields in wanted.items():
        call = make_call(verb, call_id=new_call_id(), **fields)
        # Daemons: after a Ctrl-C nobody waits for a host that is silent.
        threading.Thread(target=_ask, args=(settings, host, call, found), name=host, daemon=True).start()
    answers: Answers = {}
    errors: Errors = {}
    for _ in wanted:
        host, answer = found.get()
        if isinstance(answer, SandbatchError):
            errors[host] = answer
        else:
            answers[host] = answer
    return {host: answers[host] for host in wanted if host in answers}, errors


def tell(errors: Errors) -> None:
    """Say what went wrong, with the host's name where the words lack it."""
    for host, error in sorted(errors.items()):
        where = "" if f"host {host}" in str(error) else f"host {host}: "
        say(one_line(f"sandbatch: {where}{error}"))


def _ask(
    settings: Settings,
    host: str,
    call: Call,
    found: "queue.SimpleQueue[tuple[str, dict[str, Any] | SandbatchError]]",
) -> None:
    try:
        answer = {}
        for reply in converse(settings, host, call):
            if reply.kind == "end":
                answer = reply.document()
        found.put((host, answer))
    except SandbatchError as error:
        found.put((host, error))
    except (redis.RedisError, OSError) as error:
        words = str(error).split("\n")[0][:200]
        found.put((host, SandbatchError("broker", words, "check that it runs, and try again")))
