"""One number says which release this is."""

import tomllib
from pathlib import Path

from tasks.messages import RELEASE


def test_hosts_say_the_release_of_the_package():
    """By it a worker knows which messages its own release has put aside."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == RELEASE
