"""That a signed spec is launched once: by one host, for the sandbox for which it was signed.

A signature does not say so itself: whoever copies a record with what lies beside it has a valid one. So the
host that launches it notes it in the broker, where clients have no access, and on its own disk. What is
launched anew for a lost host stands in for that for which the spec was signed: the script that makes it hands
the note on, whatever a record says.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import cast

import redis

from tasks.batch import NAME
from tasks.keys import TAKEN_KEPT_S, sandbox_key, taken_key
from tasks.record import Record
from tasks.sealed import parts, token_of, unseal
from tasks.signing import SKEW_S, Refused, Seen, trust
from worker import log_lines
from worker.errors import BadInput, SandbatchError
from worker.journal import FILE, Journal, seconds
from worker.settings import Settings
from worker.spec import Spec

# KEYS: the note.  ARGV: "host id", "* id", seconds.  Answers 1, or 0 if another has it.
CLAIM = """
local said = redis.call('GET', KEYS[1])
if said and said ~= ARGV[1] and said ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
return 1
"""

# KEYS: the note.  ARGV: "host id", seconds.
END = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
"""


def spec_of(
    settings: Settings, record: Record, container_id: str, known: tuple[str, str]
) -> tuple[Spec, Mapping[str, str] | None]:
    """The spec of a record, judged anew, as whoever wrote it may have gone round the client.

    Args:
        known: As `Record.spec` has it.
    Returns:
        And what the journal is to keep of its signature.
    Raises:
        BadInput: This host does not launch it.
        Refused: Nobody whom this host trusts asks for it, or it was launched before.
    """
    text, batch = known
    if not NAME.fullmatch(batch):
        raise BadInput("batch", "it is no name of a batch", "letters, digits, '_', '.', '-', at most 63")
    log_lines.also_about(batch=batch)
    beside = record.sealed(container_id)
    signed = _check(settings, record.client, container_id, batch, text, beside)
    spec = unseal(text, beside)
    if spec.host not in (None, settings.host):
        raise BadInput("spec", f"it is for host {spec.host}", f"this is {settings.host}")
    lacking = [name for name, value in spec.on.items() if settings.labels.get(name) != value]
    if lacking:
        raise BadInput("spec", f"it is for hosts with label {lacking[0]}", "this one has it not, or another")
    return spec, signed


def why(error: Exception) -> str:
    """The words of one of these errors, behind `the host refuses the spec`."""
    if isinstance(error, SandbatchError) and error.what == "spec":
        return f"{error.why}; {error.todo}"
    return str(error)


def _check(
    settings: Settings, client: "redis.Redis", container_id: str, batch: str, spec: str, beside: str | None
) -> Mapping[str, str] | None:
    """See that somebody whom this host trusts has signed the spec for this sandbox, for one launch."""
    known, (token, env) = trust(settings), token_of(beside)
    if known is None and token is None:
        return None
    signed_as = cast("str | None", client.hget(sandbox_key(container_id), "signed_as")) or container_id
    if known is not None:
        is_successor = signed_as != container_id
        max_age_s = math.inf if is_successor else settings.spec_age_s  # its age was judged when it began
        known.verify("spec", parts(signed_as, batch, spec, env), token, max_age_s=max_age_s)
        if is_successor and not json.loads(spec).get("reschedule"):
            raise Refused("spec", f"{signed_as} is not to be launched elsewhere", "run it again")
        _see_that_it_is_new(settings, client, container_id, signed_as)
    return {"as": signed_as, "token": token or "", "spec": spec}


def _see_that_it_is_new(settings: Settings, client: "redis.Redis", container_id: str, signed_as: str) -> None:
    said = cast("str | None", client.get(taken_key(signed_as)))
    is_here = (settings.sandboxes_dir / container_id / FILE).exists()
    if is_here and said in (None, _mine(settings, container_id)):
        return  # a twin of this message has begun it
    if signed_as != container_id:
        if said != f"* {container_id}":
            words = f"it was signed for {signed_as}, which this one does not stand in for"
            raise Refused("spec", words, "run it again")
    elif said is not None or container_id in launched(settings):
        where = said.partition(" ")[0].replace("*", "another host") if said else settings.host
        raise Refused("spec", f"it was launched before, on {where}", "run it again: each is for one sandbox")


def claim(settings: Settings, client: "redis.Redis", journal: Journal) -> None:
    """Note that this host launches what the journal is of; before the first stage, and safe to repeat.

    Raises:
        Refused: Another host, or another sandbox, has it.
    """
    if not journal.signed or trust(settings) is None:
        return
    container_id, key = journal.container_id, taken_key(journal.signed["as"])
    args: list[str | int] = [_mine(settings, container_id), f"* {container_id}", kept_s(settings, journal)]
    if not client.register_script(CLAIM)(keys=[key], args=args):
        raise Refused("spec", "it was launched before", "run it again: each is for one sandbox")
    launched(settings).add(container_id, seconds(journal.created_at))


def kept_s(settings: Settings, journal: Journal) -> int:
    """For how long the broker is to keep the note, in seconds."""
    return TAKEN_KEPT_S if journal.asked.reschedule else _replay_s(settings)


def end(settings: Settings, client: "redis.Redis", journal: Journal) -> None:
    """Let the broker forget the note, once the signature is too old to be used again."""
    if journal.signed and trust(settings) is not None:
        args: list[str | int] = [_mine(settings, journal.container_id), _replay_s(settings)]
        client.register_script(END)(keys=[taken_key(journal.signed["as"])], args=args)


def launched(settings: Settings) -> Seen:
    """The sandboxes that this host has launched by a signature that might be used again; over a reboot."""
    return _launched(settings.state_dir / "launched", float(_replay_s(settings)))


@lru_cache(maxsize=4)
def _launched(path: Path, keep_s: float) -> Seen:
    return Seen(path, keep_s)


def _replay_s(settings: Settings) -> int:
    return math.ceil(settings.spec_age_s + 2 * SKEW_S)


def _mine(settings: Settings, container_id: str) -> str:
    return f"{settings.host} {container_id}"
