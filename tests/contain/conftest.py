"""A host for each runsc, whose sandboxes hostile programs run in.

The runscs are `debian` and `newest` in .venv/runsc, or what CONTAIN_RUNSCS says: `NAME=PATH,...`.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lack
from tests.contain.attack import Hostile
from tests.contain.judge import Bait
from tests.host.machine import unchanged
from tests.host.system import System

SUBNETS = (f"10.{number}.0.0/24" for number in count(230))
FOLDER = Path(__file__).parents[2] / ".venv" / "runsc"
RUNSCS = ("debian", "newest")
USERS = {"root": (), "user": ("--user", "1000:1000")}


def runsc_of(name: str) -> Path:
    """The runsc of this name; the test is skipped, or fails in CI, where it is missing."""
    asked = os.environ.get("CONTAIN_RUNSCS", "")
    known = dict(one.split("=", 1) for one in asked.split(",") if one)
    path = Path(known.get(name, FOLDER / name / "runsc"))
    if not os.access(path, os.X_OK) or (known and name not in known):
        lack(f"there is no runsc `{name}` at {path}")
    return path


def make_system(folder: Path, runsc: Path) -> System:
    """A host with this runsc that allows binds of `allowed` and roots of `roots`; not started yet."""
    made = System(folder, next(SUBNETS))
    for name in ("allowed", "roots", "cni"):  # the last would come with the first launch, and be seen
        (folder / name).mkdir()
    made.env |= {
        "SANDBATCH_RUNSC": str(runsc),
        "SANDBATCH_MOUNT_ALLOW": json.dumps([str(folder / "allowed")]),
        "SANDBATCH_ROOTFS_ALLOW": json.dumps([str(folder / "roots")]),
    }
    return made


@pytest.fixture(scope="module", params=RUNSCS)
def contained(request: Any, host_parts: None, tmp_path_factory: Any) -> Iterator[System]:
    """A started system with this runsc; `folder / "allowed"` may be bound, `folder / "roots"` has roots."""
    runsc = runsc_of(request.param)
    with unchanged():
        made = make_system(tmp_path_factory.mktemp(f"system-{request.param}"), runsc)
        try:
            made.start()
            yield made
        finally:
            made.remove()


@pytest.fixture
def clean_contained(contained: System) -> Iterator[System]:
    """The module's system; after the test its sandboxes are removed and the audit is clean."""
    yield contained
    contained.clear()


@pytest.fixture(params=USERS)
def user(request: Any) -> tuple[str, ...]:
    """The options of `run` for root inside, and for somebody who is not."""
    return USERS[request.param]


@pytest.fixture(scope="session")
def hostile() -> Iterator[Hostile]:
    """The hostile program, in a folder that every user may enter, with a secret beside it."""
    if shutil.which("cc") is None:
        lack("there is no C compiler: apt-get install gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="contain-") as folder:
        Path(folder).chmod(0o755)
        yield Hostile(
            compile_static(Path(__file__).with_name("hostile.c"), Path(folder, "hostile")), Path(folder)
        )


@pytest.fixture
def bait(hostile: Hostile) -> Iterator[Callable[[Path], Bait]]:
    """Makes a bait in a folder; its socket and FIFO are open until the end of the test."""
    made: list[Bait] = []

    def make(folder: Path) -> Bait:
        made.append(hostile.bait(folder))
        return made[-1]

    yield make
    for one in made:
        one.close()


def compile_static(source: Path, program: Path) -> Path:
    """A program without libraries, so that it runs in any root; executable for every user."""
    argv = ["cc", "-static", "-O1", "-Wall", "-Werror", "-pthread", "-o", str(program), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program.chmod(0o755)
    return program
