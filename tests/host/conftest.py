"""Systems for the tests of a whole host. Each has folders, a bridge and a subnet of its own."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.host.machine import unchanged
from tests.host.redis_server import RedisServer
from tests.host.system import System

SUBNETS = (f"10.{number}.0.0/24" for number in count(150))


@pytest.fixture
def unchanged_machine(host_parts: None) -> Iterator[None]:
    """After the test the machine is as before: rules, links, leases, netns, cgroups, mounts, processes."""
    with unchanged():
        yield


@pytest.fixture
def make_system(unchanged_machine: None, tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Systems that are stopped and removed after the test."""
    made: list[System] = []

    def make(**env: str) -> System:
        folder = tmp_path / f"system{len(made)}"
        folder.mkdir()
        made.append(System(folder, next(SUBNETS), dict(env)))
        return made[-1]

    yield make
    for system in made:
        system.remove()


@pytest.fixture(scope="module")
def system(host_parts: None, tmp_path_factory: Any) -> Iterator[System]:
    """A system that runs for all tests of a module; each removes what it launched (`clean_system`)."""
    with unchanged():
        made = System(tmp_path_factory.mktemp("system"), next(SUBNETS))
        made.start()
        yield made
        made.remove()


@pytest.fixture
def clean_system(system: System) -> Iterator[System]:
    """The module's system; after the test its sandboxes are removed and the audit is clean."""
    yield system
    system.clear()


@pytest.fixture(scope="module")
def server(host_parts: None, tmp_path_factory: Any) -> Iterator[RedisServer]:
    """A broker with TLS, users and keys."""
    made = RedisServer(tmp_path_factory.mktemp("redis"), "test", "alice,bob")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def keyed(server: RedisServer, tmp_path_factory: Any) -> Iterator[System]:
    """A host with keys, and the command line of the user alice."""
    with unchanged():
        made = System(tmp_path_factory.mktemp("keyed"), next(SUBNETS), server.env("user-alice"))
        host = server.env("host-test")
        made.worker_url = host["SANDBATCH_BROKER_URL"]
        made.start(**host)
        yield made
        made.remove()


@pytest.fixture
def clean_keyed(keyed: System) -> Iterator[System]:
    """The module's host with keys; after the test its sandboxes are removed and the audit is clean."""
    yield keyed
    keyed.clear()
