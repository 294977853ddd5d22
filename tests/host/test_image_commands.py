"""`pull`, `images`, `image rm` and `image prune` as a user has them, with a whole host behind them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.system import System
from tests.images.make import Layout, busybox


@pytest.fixture(scope="module")
def layout(host_parts: None, tmp_path_factory: Any) -> Path:
    """A folder with two images, v1 and v2."""
    images = Layout(Path(tmp_path_factory.mktemp("images")) / "layout")
    for tag in ("v1", "v2"):
        images.make(tag, [busybox().file("version", tag)])
    return images.folder


@pytest.fixture
def host(clean_system: System) -> Iterator[System]:
    """A host without an image."""
    yield clean_system
    clean_system.cli("rm", "--all")
    clean_system.cli("image", "prune")


def images(host: System) -> dict[str, dict[str, Any]]:
    """Its images, by their first reference."""
    return {row["references"][0]: row for row in json.loads(host.cli("images", "--json").stdout)}


def test_an_image_is_pulled_used_and_removed(host, layout):
    reference = f"oci:{layout}:v1"
    done = host.cli("pull", reference)
    name, digest = done.stdout.split()
    assert name == "test"
    assert f"test: done, {digest.removeprefix('sha256:')[:12]}" in done.stderr
    row = images(host)[reference]
    assert (row["host"], row["digest"], row["uses"], row["users"]) == ("test", digest, 0, [])
    assert row["size_bytes"] > 100_000
    (one,) = host.run("--image", reference, "--pull", "never", "--", "/bin/sleep", "600")
    assert host.wait([one], "running") == {one: "running"}
    assert images(host)[reference]["users"] == [one]
    refused = host.cli("image", "rm", reference, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"is in use by {one}" in refused.stderr
    assert host.cli("exec", one, "--", "cat", "/version").stdout == "v1"
    host.cli("rm", one)
    assert host.cli("image", "rm", digest[7:19]).stdout == f"test {digest}\n"
    assert images(host) == {}


def test_prune_leaves_what_is_new_or_in_use(host, layout):
    first, second = (f"oci:{layout}:{tag}" for tag in ("v1", "v2"))
    (one,) = host.run("--image", first, "--wait", "--", "/bin/sleep", "600")
    host.cli("pull", second)
    assert host.cli("image", "prune", "--older-than", "1h").stdout == ""
    gone = images(host)[second]["digest"]
    assert host.cli("image", "prune").stdout == f"test {gone}\n"
    assert list(images(host)) == [first]
    assert images(host)[first]["users"] == [one]


def test_a_pull_that_fails_says_so_in_the_words_of_the_host(host, layout):
    done = host.cli("pull", f"oci:{layout}:v9", "--all-hosts", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"sandbatch: host test: image oci:{layout}:v9: " in done.stderr
    assert "name one of its tags: v1, v2" in done.stderr
    assert images(host) == {}
