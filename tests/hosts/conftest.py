"""Fleets for the tests of many hosts: real hosts, each in namespaces of its own."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lack
from tests.host.machine import difference, snapshot
from tests.hosts.fleet import Fleet

PROGRAMS = ("unshare", "tc")


@pytest.fixture(scope="session")
def fleet_parts(host_parts: None) -> None:
    """What hosts in a machine need beside the parts of a host."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        lack(f"this machine lacks {', '.join(lacking)} (util-linux, iproute2)")


@pytest.fixture
def make_fleet(fleet_parts: None, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Fleets that are up, and removed after the test; then the machine is as before."""
    before, made = snapshot(), []

    def make(hosts: int, **env: str) -> Fleet:
        fleet = Fleet(tmp_path / f"fleet{len(made)}", hosts, **env)
        made.append(fleet)
        fleet.start()
        return fleet

    yield make
    for fleet in made:
        fleet.remove()
    assert difference(before, snapshot()) == {}


@pytest.fixture(scope="module")
def fleet(fleet_parts: None, tmp_path_factory: Any) -> Iterator[Fleet]:
    """Three hosts for all tests of a module; each removes what it launched (`clean_fleet`)."""
    before = snapshot()
    with Fleet(tmp_path_factory.mktemp("fleet") / "fleet", 3, SANDBATCH_CAPACITY="8") as made:
        yield made
    assert difference(before, snapshot()) == {}


@pytest.fixture
def clean_fleet(fleet: Fleet) -> Iterator[Fleet]:
    """The module's fleet; after the test its sandboxes are removed and every audit is clean."""
    yield fleet
    fleet.cli("rm", "--all")
    assert fleet.audits() == []
    # The record knows of an end before its journal goes: the next test must not find it half there.
    fleet.wait_until(lambda: not any(host.journals() for host in fleet.hosts.values()), 10, "end of journals")
