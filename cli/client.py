"""What the commands without root do with the broker: find, validate, wait."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from celery import Celery

from cli.parse import pair
from tasks.app import make_app
from tasks.connection import check, connect
from tasks.record import Record
from tasks.state import TERMINAL, State
from worker import capabilities, limits, names
from worker.bundle import own_mounts
from worker.cni_config import find_network
from worker.errors import BadInput, BadNetwork, HostNotReady
from worker.journal import boot_id
from worker.mounts import lay_out
from worker.overlay import check_overlay
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import Spec

FOLLOW_S = 2.0  # shorter than the socket's timeout; then the wait begins anew


class Client:
    """The broker as the command line sees it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        connection = connect(settings)
        check(connection, settings)
        self.record = Record(connection)

    def app(self) -> Celery:
        """A Celery app that only sends; without a result backend it subscribes to nothing."""
        return make_app(self.settings, "client")

    def resolve(self, given: Iterable[str], *, unknown_ok: bool = False) -> list[dict[str, Any]]:
        """Sandboxes by id, or by a prefix that only one id has.

        Raises:
            BadInput: No such id, unless `unknown_ok`, or several begin so.
        """
        known = self.record.ids()
        matches = {
            text: [text] if text in known else [one for one in known if text and one.startswith(text)]
            for text in given
        }
        # The index may still have an id whose record has expired.
        rows = {row["id"]: row for row in self.record.get_all(sorted({*chain(*matches.values())}))}
        found: dict[str, dict[str, Any]] = {}
        for text, ids in matches.items():
            live = [one for one in ids if one in rows]
            if not live and not unknown_ok:
                raise BadInput(text or "id ''", "no such sandbox", "see sandbatch ls")
            if len(live) > 1:
                raise BadInput(text, f"{len(live)} sandboxes begin so", "give more of the id")
            found |= {one: rows[one] for one in live}
        return list(found.values())

    def select(
        self,
        ids: Sequence[str] = (),
        *,
        batch: str | None = None,
        host: str | None = None,
        states: Sequence[str] = (),
        labels: Sequence[str] = (),
        unknown_ok: bool = False,
    ) -> list[dict[str, Any]]:
        """Sandboxes by any of what `ls` filters by."""
        for state in states:
            if state not in set(State):
                raise BadInput(f"--state {state}", "no such state", f"one of {', '.join(State)}")
        wanted = dict(pair(label, "--label") for label in labels)
        rows = self.resolve(ids, unknown_ok=unknown_ok) if ids else self.record.get_all()
        rows = [
            row
            for row in rows
            if (batch is None or row["batch"] == batch)
            and (host is None or row["host"] == host)
            and (not states or row["state"] in states)
            and all(row["labels"].get(name) == value for name, value in wanted.items())
        ]
        if batch is not None and not rows and not unknown_ok:
            raise BadInput(f"batch {batch}", "no such batch", "see sandbatch ls")
        return rows

    def validate(self, spec: Spec) -> None:
        """Refuse what no host can do, before anything is enqueued.

        On a machine that is a host itself its own files decide; elsewhere what the hosts say of
        themselves. Each host checks again.

        Raises:
            BadInput: What is wrong, and what is known.
        """
        limits.check(spec)
        hosts = self.record.live_hosts()
        if spec.host is not None and hosts and spec.host not in hosts:
            raise BadInput(f"--host {spec.host}", "no such host", f"known: {', '.join(hosts)}")
        wanted = [facts for name, facts in hosts.items() if spec.host in (None, name)]
        is_here = any(one["boot_id"] == boot_id() for one in wanted)
        if is_here or (not hosts and self.settings.is_broker_embedded):
            self._check_here(spec, wanted)
        elif wanted:
            _check_there(spec, wanted)

    def _check_here(self, spec: Spec, hosts: list[dict[str, Any]]) -> None:
        """By this machine's own files: they are newer than what its worker said of them."""
        if not any(_network_error(spec, facts) is None for facts in hosts):
            conf_dirs = (self.settings.own_cni_conf_dir, self.settings.cni_conf_dir)
            found = {one.name: find_network(one.name, conf_dirs) for one in spec.networks}
            capabilities.check(spec, {name: capabilities.advertised(one) for name, one in found.items()})
        with suppress(PermissionError):  # of this user; the host's worker is root and looks again
            lay_out(spec, own_mounts(spec, self.settings), self.settings)
            names.check(spec, self.settings)
        with suppress(HostNotReady):  # which sandbatch hosts says better
            check_overlay(spec, Runsc.from_settings(self.settings, hides_sysctl=False))
        limits.check_here(spec)

    def next_change(self, mark: str) -> str:
        """Wait until something changes after `mark` of the stream; the new mark."""
        while True:
            entries = [entry for entry, _ in self.record.follow(mark, FOLLOW_S)]
            if entries:
                return entries[-1]

    def wait(
        self,
        ids: Sequence[str],
        goal: str,
        timeout_s: float | None,
        on_change: Callable[[dict[str, str]], None] = lambda states: None,
    ) -> dict[str, str]:
        """Wait by events until each sandbox has reached `goal` ("running" or "terminal") or its end.

        Returns the states when all have, or when the time is up.
        """
        mark = self.record.last_event()  # before the look: nothing between the two is missed
        states = {row["id"]: row["state"] for row in self.record.get_all(ids)}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        on_change(states)
        while not all(has_reached(state, goal) for state in states.values()):
            left_s = FOLLOW_S if deadline is None else min(FOLLOW_S, deadline - time.monotonic())
            if left_s <= 0:
                break
            changed = False
            for entry, event in self.record.follow(mark, left_s):
                mark = entry
                if event["id"] in states:
                    states[event["id"]] = event["state"]
                    changed = True
            if changed:
                on_change(states)
        return states


def _check_there(spec: Spec, hosts: list[dict[str, Any]]) -> None:
    errors = [_network_error(spec, facts) for facts in hosts]
    if errors and None not in errors:
        known = sorted({name for facts in hosts for name in facts["networks"]})
        for one in spec.networks:
            if one.name not in known:
                todo = f"known: {', '.join(known) or 'none'}"
                raise BadNetwork(f"network {one.name}", "no host has it", todo)
        raise next(error for error in errors if error is not None)
    if spec.rootfs != "host":
        allowed = sorted({folder for facts in hosts for folder in facts["rootfs_allow"]})
        if not any(Path(spec.rootfs).is_relative_to(folder) for folder in allowed):
            todo = f"allowed: {', '.join(allowed) or 'none'}"
            raise BadInput(f"--rootfs {spec.rootfs}", "lies in no folder that a host allows", todo)
    allowed = sorted({folder for facts in hosts for folder in facts.get("mount_allow", ())})
    for source in (mount.source for mount in spec.mounts if mount.source is not None):
        if not any(Path(source).is_relative_to(folder) for folder in allowed):
            todo = f"allowed: {', '.join(allowed) or 'none'}"
            raise BadInput(f"bind {source}", "lies in no folder that a host allows", todo)


def _network_error(spec: Spec, facts: dict[str, Any]) -> BadInput | None:
    """Why a host, as it speaks of itself, cannot attach a sandbox as the spec asks; None if it can."""
    for one in spec.networks:
        if one.name not in facts["networks"]:
            return BadNetwork(f"network {one.name}", "not every host has it", "name the host with --host")
    known = facts.get("capabilities", {})  # a host of the release before has none
    try:
        capabilities.check(spec, {one.name: known.get(one.name, []) for one in spec.networks})
    except BadInput as error:
        return error
    return None


def has_reached(state: str, goal: str) -> bool:
    """`gone` gives up on the stuck: their host goes on trying, perhaps for ever."""
    if goal == "running":
        return state in TERMINAL or state in (State.RUNNING, State.STUCK)
    return state in TERMINAL or (goal == "gone" and state == State.STUCK)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the exact shape of CLI.md's `--json`."""
    return json.loads(json.dumps({name: value for name, value in row.items() if name != "spec"}))  # type: ignore[no-any-return]
