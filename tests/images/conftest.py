"""Registries with images, and systems that may pull from them. The images are made once a session."""

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lack
from tests.host.machine import difference, snapshot
from tests.host.system import System
from tests.images import make, registry
from tests.images.proxy import RegistryProxy
from tests.images.registry import Registry, registries_conf
from worker.image_store import ImageStore
from worker.settings import Settings

PROGRAMS = ("skopeo", "umoci", "busybox")
SUBNETS = (f"10.{number}.0.0/24" for number in count(210))
BIG = 48 * 2**20


@pytest.fixture(scope="session")
def image_parts(host_parts: None) -> None:
    """What images are made, kept and served with."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if registry.program() is None:
        lacking.append("docker-registry")
    if lacking:
        lack(f"this machine lacks {', '.join(lacking)}: run make test-host as root")


@pytest.fixture(scope="session")
def layout(image_parts: None, tmp_path_factory: Any) -> make.Layout:
    """Images by tag: `web`, `python`, `small` and `other` (busybox alone), `big` (takes a while)."""
    made = make.Layout(tmp_path_factory.mktemp("images") / "layout")
    made.make("web", *make.web())
    made.make("python", *make.python())
    made.make("small", [make.busybox()], {"env": [make.PATH], "cmd": ["sleep", "300"]})
    made.make("other", [make.busybox().file("other", "other")], {"env": [make.PATH], "cmd": ["sleep", "300"]})
    made.make("big", [make.busybox(), make.noise(BIG)], {"env": [make.PATH], "cmd": ["sleep", "300"]})
    return made


@pytest.fixture(scope="session")
def storage(layout: make.Layout, tmp_path_factory: Any) -> Path:
    """A registry's files with each of these as `team/TAG:1`, and `library/small:latest` for mirrors."""
    folder: Path = tmp_path_factory.mktemp("registry")
    with registry.serving(Registry(folder, folder / "storage")) as made:
        for tag in ("web", "python", "small", "other", "big"):
            made.push(layout.folder, tag, f"team/{tag}:1")
        made.push(layout.folder, "small", "library/small:latest")
    return folder / "storage"


@pytest.fixture
def hub(storage: Path, tmp_path: Path) -> Iterator[Registry]:
    """A registry for one test, with a log of its own; the images are those of all."""
    with registry.serving(Registry(tmp_path / "hub", storage)) as made:
        yield made


@pytest.fixture
def proxy(hub: Registry) -> Iterator[RegistryProxy]:
    """In front of `hub`, for what a registry of its own never does."""
    made = RegistryProxy(hub.port)
    yield made
    made.close()


@pytest.fixture
def registries(hub: Registry, proxy: RegistryProxy, tmp_path: Path) -> Path:
    return registries_conf(tmp_path / "registries.conf", hub.address, proxy.address, mirror=hub.address)


def store_of(system: System) -> ImageStore:
    """The images of a system's host, as they lie there."""
    return ImageStore(Settings(state_dir=system.folder / "state", run_dir=system.run_dir))


@pytest.fixture(scope="module")
def running_system(image_parts: None, tmp_path_factory: Any) -> Iterator[System]:
    """A system that runs for all tests of a module; it reads `registries.conf` in its folder."""
    before = snapshot()
    folder = tmp_path_factory.mktemp("system")
    file = registries_conf(folder / "registries.conf")
    env = {"SANDBATCH_REGISTRIES_CONF": str(file), "SANDBATCH_REGISTRY_AUTH_FILE": str(folder / "auth.json")}
    made = System(folder, next(SUBNETS), {**env, "SANDBATCH_CAPACITY": "60"})
    made.start()
    yield made
    made.remove()
    assert difference(before, snapshot()) == {}


@pytest.fixture
def host(running_system: System, hub: Registry, proxy: RegistryProxy) -> Iterator[System]:
    """The module's system with an empty store; after the test nothing is left, and the audit is clean."""
    addresses = (hub.address, proxy.address)
    registries_conf(running_system.folder / "registries.conf", *addresses, mirror=hub.address)
    yield running_system
    proxy.clear()
    running_system.cli("rm", "--all")
    assert running_system.audit() == []
    running_system.wait_until(lambda: not list(running_system.sandboxes.glob("*")), 10, "the journals to go")
    store_of(running_system).prune(0)
    assert running_system.audit() == []


@pytest.fixture
def make_host(
    image_parts: None, hub: Registry, registries: Path, tmp_path: Path
) -> Iterator[Callable[..., System]]:
    """Systems of one test; at its end each is audited clean and removed, and the machine is as before."""
    before, made = snapshot(), []

    def new(**env: str) -> System:
        folder = tmp_path / f"system{len(made)}"
        folder.mkdir(exist_ok=True)
        made.append(System(folder, next(SUBNETS), {"SANDBATCH_REGISTRIES_CONF": str(registries), **env}))
        return made[-1]

    yield new
    for system in made:
        if system.process is not None:
            system.cli("rm", "--all")
            assert system.audit() == []
    for system in reversed(made):
        system.remove()
    assert difference(before, snapshot()) == {}
