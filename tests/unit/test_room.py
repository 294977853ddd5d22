"""What a host has to give, and why a sandbox waits, in words for people."""

from typing import Any

import pytest

from tasks.room import misfit, need_of, why, why_queued

HEARTBEAT = "2026-01-02T12:00:03.250Z"


def host(name: str, **facts: Any) -> dict[str, Any]:
    known = {"name": name, "state": "live", "heartbeat_at": HEARTBEAT, "capacity": 100, "sandboxes": 0}
    known |= {
        "slots": 4,
        "launching": 0,
        "memory": 16 * 2**30,
        "memory_asked": 0,
        "labels": {},
        "version": "0.1.0",
    }
    return {**known, "networks": ["n"], "network_room": {"n": None}, "drained": None, **facts}


def row(**asked: Any) -> dict[str, Any]:
    return {"networks": asked.pop("networks", ["n"]), "spec": asked}


DRAINED = {"drained": True, "at": 1.0, "why": "new disk"}
FULL = {"sandboxes": 100}


@pytest.mark.parametrize(
    ("asked", "hosts", "words"),
    [
        ({}, [], "no host is up"),
        ({}, [host("a", state="lost")], "no host is up (a is lost since 2026-01-02T12:00:03Z)"),
        ({}, [host("a", state="stopped")], "no host is up"),
        ({}, [host("a")], "next to be taken"),
        ({}, [host("a", **FULL), host("b")], "next to be taken"),
        ({"host": "a"}, [host("b")], "host a is not known"),
        ({"host": "a"}, [host("a"), host("b", **FULL)], "next to be taken"),
        ({"host": "a"}, [host("a", state="lost")], "host a is lost since 2026-01-02T12:00:03Z"),
        ({"host": "a"}, [host("a", drained=DRAINED), host("b")], "host a is drained: new disk"),
        ({"host": "a"}, [host("a", drained={**DRAINED, "drained": False})], "next to be taken"),
        ({}, [host("a", **FULL)], "host a is full (100 of 100)"),
        ({}, [host("a", **FULL), host("b", **FULL)], "all 2 hosts are full (100 of 100, 100 of 100)"),
        ({}, [host(one, **FULL) for one in "abcd"],
         "all 4 hosts are full (100 of 100, 100 of 100, 100 of 100, …)"),
        ({}, [host("a", **FULL), host("b", drained=DRAINED)],
         "1 host is full (100 of 100), 1 host is drained: new disk"),
        ({"memory_bytes": 64 * 2**30}, [host("a"), host("b", memory=8 * 2**30)],
         "asks for 64g of memory: the most that a host has is 16g (a)"),
        ({"memory_bytes": 2**30}, [host("a", memory_asked=16 * 2**30 - 2**29)],
         "host a has 512m of 16g of memory left"),
        ({"on": {"gpu": "true"}}, [host("a", labels={"zone": "a"}), host("b", labels={"zone": "b"})],
         "no host has gpu=true; labels known: zone=a, zone=b"),
        ({"on": {"gpu": "true"}}, [host("a", state="lost", labels={"gpu": "true"}), host("b")],
         "no host that is up has gpu=true (a is lost since 2026-01-02T12:00:03Z)"),
        ({"on": {"gpu": "true"}}, [host("a", labels={"gpu": "true"}, **FULL), host("b")],
         "host a is full (100 of 100)"),
        ({"networks": ["m"]}, [host("a")], "no host has network m"),
        ({}, [host(one, network_room={"n": 0}) for one in "ab"],
         "network n has no free address or port on a, b"),
        ({}, [host("a", launching=4)], "host a launches as many at once as it may (4 of 4)"),
        ({}, [host("a", not_ready="disk full")], "host a is not ready: disk full"),
        ({"kind": "spec/v2", "on": {"gpu": "true"}}, [host("a"), host("b")],
         "no host that is up knows spec/v2 (a has release 0.1.0, b has release 0.1.0): upgrade one"),
        ({"kind": "spec/v9"}, [host("a"), host("b", version="0.9.0", kinds=["spec/v9"], **FULL)],
         "host b is full (100 of 100)"),
        ({"kind": "spec/v2", "host": "a"}, [host("a")],
         "host a has release 0.1.0, which does not know spec/v2: upgrade it"),
    ],
)  # fmt: skip
def test_why_a_sandbox_waits(asked, hosts, words):
    assert why(need_of(row(**asked)), {one["name"]: one for one in hosts}) == words


def test_a_row_of_ls_and_a_whole_one_need_the_same():
    """The first has the line in which it waits, the second the spec."""
    light = {"networks": ["n"], "queue": "on:gpu=true,zone=a", "memory": 2**30}
    assert need_of(light) == need_of(row(on={"zone": "a", "gpu": "true"}, memory_bytes=2**30))
    pinned = {"networks": ["n"], "queue": "host:a", "memory": None}
    assert need_of(pinned) == need_of(row(host="a"))


def test_what_its_batch_holds_back_waits_for_the_batch():
    held = {**row(), "held": True}
    assert why_queued(held, {}, {"rule": {"max_in_flight": 5}}) == "held back by its batch (max_in_flight 5)"
    assert why_queued(held, {}) == "held back by its batch"


def test_a_host_of_the_release_before_says_less_and_is_judged_by_that():
    """It has no budget, no labels, no rooms."""
    old = {name: host("a")[name] for name in ("name", "capacity", "sandboxes", "slots", "networks")}
    assert misfit(need_of(row()), old) == ""
    assert misfit(need_of(row(on={"a": "b"})), old) == "has no label a=b"
