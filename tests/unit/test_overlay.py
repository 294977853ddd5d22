"""A writable root: its flag, what a runsc must be able to do for it, and what the disk can promise."""

from pathlib import Path

import pytest

from worker.bundle import remove_bundle
from worker.errors import BadInput, SandbatchError
from worker.overlay import check_overlay, make_overlay_folder, overlay_flag
from worker.runsc import Runsc
from worker.settings import Settings
from worker.spec import make_spec

BUNDLE = Path("/state/sandboxes/sb-1/bundle")


@pytest.fixture
def settings(tmp_path):
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def runsc(settings, tmp_path):
    """A runsc by what its help says."""

    def make(words: str) -> Runsc:
        binary = tmp_path / "runsc"
        binary.write_text(f"#!/bin/sh\necho '{words}' >&2\n")
        binary.chmod(0o755)
        return Runsc.from_settings(settings.model_copy(update={"runsc": str(binary)}), False)

    return make


def spec(kind, size=None):
    return make_spec(args=["true"], writable=kind, writable_bytes=size)


@pytest.mark.parametrize(
    ("kind", "size", "flag"),
    [
        ("no", None, "none"),
        ("memory", None, "root:memory"),
        ("memory", 2**20, "root:memory,size=1048576"),
        ("disk", 2**21, f"root:dir={BUNDLE}/overlay,size=2097152"),
        ("disk", None, f"root:dir={BUNDLE}/overlay,size=1073741824"),  # the disk is never without a limit
    ],
)
def test_the_flag_of_runsc(settings, kind, size, flag):
    assert overlay_flag(spec(kind, size), BUNDLE, settings) == flag


def test_a_runsc_without_a_limit_gets_no_disk_and_no_size(runsc):
    """Debian 13's says `{mount}:{medium}` and would fill the disk."""
    old = runsc("wrap mounts with overlayfs. Format is {mount}:{medium}, where")
    check_overlay(spec("no"), old)
    check_overlay(spec("memory"), old)
    for refused in (spec("disk"), spec("disk", 2**20), spec("memory", 2**20)):
        with pytest.raises(BadInput, match="release of 2025 or later"):
            check_overlay(refused, old)


def test_a_runsc_with_a_limit_gets_both(runsc):
    new = runsc("* {mount}:{medium}[,size={size}], where")
    for taken in (spec("disk"), spec("memory", 2**20)):
        check_overlay(taken, new)


def test_the_disk_is_promised_once(settings):
    """All that others may still write must fit beside it; a sandbox that is gone has no promise."""
    others, own = (settings.sandboxes_dir / one / "bundle" for one in ("sb-1", "sb-2"))
    for bundle in (others, own):
        bundle.mkdir(parents=True)
    make_overlay_folder(spec("memory"), own, settings)
    assert list(own.iterdir()) == []
    make_overlay_folder(spec("disk", 2**20), others, settings)
    make_overlay_folder(spec("disk", 2**20), own, settings)
    (others / "overlay/bytes").write_text(str(2**60))
    with pytest.raises(SandbatchError, match="MiB are promised"):
        make_overlay_folder(spec("disk", 2**20), own, settings)
    remove_bundle(others)
    make_overlay_folder(spec("disk", 2**20), own, settings)
