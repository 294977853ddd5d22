"""Which runsc of a host is taken, and what its version says. The runscs are doubles."""

import os
import shutil

import pytest

from worker import runsc
from worker.errors import HostNotReady
from worker.runsc import find_binary, is_old
from worker.settings import Settings


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Puts a runsc of a version into a folder of the PATH; the folders in the order of the calls."""
    tools = tmp_path / "tools"  # what starts a program, and no runsc of this machine
    tools.mkdir()
    (tools / "setpriv").symlink_to(shutil.which("setpriv"))
    folders = [tools]
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(runsc, "LOCAL_FOLDERS", ())

    def call(folder, version):
        binary = tmp_path / folder / "runsc"
        binary.parent.mkdir()
        binary.write_text(f"#!/bin/sh\necho 'runsc version {version}'\necho 'spec: 1.2.0'\n")
        binary.chmod(0o755)
        folders.append(binary.parent)
        monkeypatch.setenv("PATH", ":".join(map(str, folders)))
        return binary

    return call


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("0.0~20240729.0", True),  # Debian 13's
        ("release-20250630.0", True),
        ("release-20250707.0", False),  # the first that makes read-only binds read-only on the host
        ("release-20260817.0", False),
        ("VERSION_MISSING", False),  # built from the Go module
        ("unknown", False),
    ],
)
def test_which_versions_are_old(version, old):
    assert is_old(version) is old


def test_a_newer_one_further_along_the_path_is_taken_before_an_old_one(place):
    place("first", "0.0~20240729.0")
    newer = place("second", "release-20260817.0")
    place("third", "release-20260901.0")
    assert find_binary(Settings()) == newer


def test_of_old_ones_the_first_is_taken(place):
    first = place("first", "0.0~20240729.0")
    place("second", "release-20240101.0")
    assert find_binary(Settings()) == first


def test_the_one_of_the_settings_is_taken_whatever_its_age(place):
    old = place("first", "0.0~20240729.0")
    place("second", "release-20260817.0")
    assert find_binary(Settings(runsc=str(old))) == old


def test_where_an_administrator_installs_one_is_looked_at_too(place, tmp_path, monkeypatch):
    place("first", "0.0~20240729.0")
    newer = place("local", "release-20260817.0")
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{tmp_path}/first")
    monkeypatch.setattr(runsc, "LOCAL_FOLDERS", (str(newer.parent),))
    assert find_binary(Settings()) == newer


def test_none_at_all_is_told_in_words(place):
    with pytest.raises(HostNotReady, match="not on the PATH"):
        find_binary(Settings())


def test_a_file_that_the_path_has_twice_keeps_its_first_place(place, tmp_path, monkeypatch):
    """/bin is a link to /usr/bin on most hosts."""
    first = place("first", "release-20260817.0")
    place("second", "release-20260901.0")
    (tmp_path / "link").symlink_to(first.parent)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}/link")
    assert find_binary(Settings()) == first
