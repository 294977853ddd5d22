"""The nft program: load a text in one transaction, and what our tables hold."""

import json
import shutil
import time
from dataclasses import dataclass, field
from typing import Any

from worker import process
from worker.egress_rules import BRIDGE, INET, MAPS, TABLE, unload_tables_text
from worker.errors import SandbatchError

TIMEOUT_S, LIST_TIMEOUT_S = 30.0, 80.0
TRIES, PAUSE_S = 5, 0.05
BUSY = "Device or resource busy"  # what is to be deleted is in use
# Another transaction came in between; the kernel asks to come again, and nobody tells when.
AGAIN = ("Interrupted system call", "Resource temporarily unavailable")
TODO = "see nft list ruleset, and sandbatch doctor"


@dataclass
class Held:
    """What is in our tables now; (family, name) of a chain, a set or a (map, link)."""

    chains: dict[tuple[str, str], int] = field(default_factory=dict)  # -> number of its rules
    sets: set[tuple[str, str]] = field(default_factory=set)
    elements: dict[tuple[str, str, str], str] = field(default_factory=dict)  # -> chain
    tables: set[str] = field(default_factory=set)  # families


def is_here() -> bool:
    return shutil.which("nft") is not None


def load(text: str) -> None:
    """Load a text: all of it, or nothing.

    Raises:
        SandbatchError: nft's own words, or the kernel's.
    """
    for tries_left in reversed(range(TRIES)):
        done = process.run(["nft", "-f", "-"], timeout_s=TIMEOUT_S, stdin=text, point="nft.load")
        if done.returncode == 0:
            return
        if not (tries_left and any(words in done.stderr for words in AGAIN)):
            break
        time.sleep(PAUSE_S)
    raise SandbatchError("nft", _words(done.stderr), TODO)


def check(text: str) -> str:
    """What is wrong with a text on this kernel, tried without a change; empty if it can be loaded."""
    done = process.run(["nft", "--check", "-f", "-"], timeout_s=TIMEOUT_S, stdin=text)
    return _words(done.stderr) if done.returncode else ""


def drop_empty_tables() -> None:
    """Remove the shared tables, unless a sandbox uses them; that is for the kernel to say."""
    try:
        load(unload_tables_text())
    except SandbatchError as error:
        if BUSY not in error.why:
            raise


def table_handles() -> dict[str, int]:
    """Family -> handle of our table in it; a table that is made anew has another."""
    tables = [one["table"] for one in _list("tables") if "table" in one]
    return {one["family"]: int(one["handle"]) for one in tables if one["name"] == TABLE}


def rules_in(family: str, table: str, chain: str) -> int:
    """How many rules a chain has; 0 where it, or its table, is not there."""
    return sum("rule" in one for one in _list("chain", family, table, chain))


def held() -> Held:
    """List our tables. With a thousand policies that is 2 to 3 s of CPU: never during a launch."""
    found = Held()
    for table in (one["table"] for one in _list("tables") if "table" in one):
        if table["name"] == TABLE and table["family"] in (BRIDGE, INET):
            family = table["family"]
            # Without elements: a set that remembers a flood has 65,535, and says nothing about a policy.
            for one in _list("table", family, TABLE, terse=True):
                _note(found, one)
            for name in MAPS[family]:
                for one in _list("map", family, TABLE, name):
                    _note(found, one)
    return found


def _note(found: Held, one: dict[str, Any]) -> None:
    ((kind, body),) = one.items()
    if kind == "table":
        found.tables.add(body["family"])
    elif kind == "chain":
        found.chains.setdefault((body["family"], body["name"]), 0)
    elif kind == "rule":
        key = body["family"], body["chain"]
        found.chains[key] = found.chains.get(key, 0) + 1
    elif kind == "set":
        found.sets.add((body["family"], body["name"]))
    elif kind == "map":
        for link, verdict in body.get("elem", []):
            target = verdict.get("goto", {}).get("target", "")
            found.elements[body["family"], body["name"], str(link)] = target


def _list(*what: str, terse: bool = False) -> list[dict[str, Any]]:
    options = ["--json", *(["--terse"] if terse else [])]
    done = process.run(["nft", *options, "list", *what], timeout_s=LIST_TIMEOUT_S)
    if done.returncode:
        if "No such file" in done.stderr:
            return []  # it went with its last sandbox, just now
        raise SandbatchError("nft", _words(done.stderr), "run as root; see sandbatch doctor")
    rows: list[dict[str, Any]] = json.loads(done.stdout)["nftables"] if done.stdout else []
    return [row for row in rows if "metainfo" not in row]


def _words(stderr: str) -> str:
    """The error itself: behind it nft prints the line and marks the place."""
    lines = [line.partition("Error: ")[2] or line for line in stderr.splitlines() if "Error: " in line]
    return (lines[0] if lines else process.last_words(stderr) or "failed")[: process.WORDS]
