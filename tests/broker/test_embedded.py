"""Who may open the embedded broker's socket: root, and a group that the settings name."""

import contextlib
import grp
import os
from pathlib import Path

import pytest

from tasks.broker import embedded_broker
from worker.errors import BadInput
from worker.settings import Settings


def settings(folder: Path, **more: str) -> Settings:
    return Settings(run_dir=folder / "run", state_dir=folder / "state", **more)  # type: ignore[arg-type]


def test_its_socket_is_its_owners_alone(tmp_path):
    """Whoever opens it may start sandboxes on this machine, unsigned."""
    current = settings(tmp_path)
    with embedded_broker(current):
        assert current.broker_socket.stat().st_mode & 0o777 == 0o600


def test_a_group_of_the_settings_may_open_it(tmp_path):
    current = settings(tmp_path, broker_group=grp.getgrgid(os.getgid()).gr_name)
    with embedded_broker(current):
        found = current.broker_socket.stat()
        assert (found.st_mode & 0o777, found.st_gid) == (0o660, os.getgid())


def test_an_unknown_group_is_refused_before_anything_is_started(tmp_path):
    current = settings(tmp_path, broker_group="no-such-group")
    with pytest.raises(BadInput, match="no such group"), contextlib.ExitStack() as stack:
        stack.enter_context(embedded_broker(current))
    assert not current.run_dir.exists()
