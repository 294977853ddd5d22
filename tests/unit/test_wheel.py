"""The wheel: what `pipx install` gets, built from a copy and installed into an empty environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("cli", "tasks", "worker")
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(
            REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", source)
    (made,) = (folder / "dist").iterdir()
    return made


def run(*argv: object, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET},
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    """setuptools' own discovery leaves a folder called `tasks` out."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_it_runs_in_an_empty_environment_by_a_user_who_is_not_root(wheel, tmp_path):
    """The command line needs no root and nothing of a host; and we name all that we import."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/pip", "install", "--no-compile", wheel)
    # A user namespace of its own: uid 65534 there, whoever may read this Python outside.
    nobody = ["unshare", "--user"] if os.geteuid() == 0 else []
    text = run(*nobody, tmp_path / "venv/bin/sandbatch", "--help", cwd="/")
    assert "Launch gVisor sandboxes in batches" in text
    look = (
        "import os, cli.main, cli.up, cli.demo, tasks.workflow, tasks.consumer, tasks.flower, worker.setup\n"
        "print(os.geteuid(), cli.main.__file__)"
    )
    uid, file = run(*nobody, tmp_path / "venv/bin/python", "-c", look, cwd="/").split()
    assert uid != "0"
    assert file.startswith(str(tmp_path))
