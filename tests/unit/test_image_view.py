"""The command that people and programs see of a sandbox that has an image."""

import json
from typing import Any

import pytest
from rich.console import Console

from cli import render
from tasks.view import shape, view
from worker import journal as journals
from worker.journal import Journal
from worker.settings import Settings
from worker.spec import make_spec

ID = "sb-0123456789abcdef"
DIGEST = "sha256:" + "ab" * 32
OF_IMAGE: dict[str, Any] = {
    "reference": "docker.io/library/busybox:latest",
    "digest": DIGEST,
    "rootfs": "/store/rootfs",
    "labels": {"a": "1"},
    "spec": {
        "args": ["httpd", "-f", "\x1b[2J[red]"],
        "user": "7:8",
        "ready": "tcp:80",
        "rootfs": "/store/rootfs",
    },
}


@pytest.fixture
def known(tmp_path) -> Journal:
    settings = Settings(state_dir=tmp_path, run_dir=tmp_path)
    spec = make_spec(image="busybox")
    return journals.create(settings.sandboxes_dir, ID, attempt=1, batch="b", spec=spec)


def seen(known: Journal, before: dict[str, str] | None = None) -> dict[str, Any]:
    """The record, as `--json` has it."""
    state, fields = view(known)
    record = {"id": ID, "state": str(state), "spec": known.asked.model_dump_json()}
    return shape({**record, **(before or {}), **fields})


def shown(row: dict[str, Any]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render.details(row))
    return captured.get()


def test_before_the_image_is_here_its_reference_is_known_and_no_more(known):
    row = seen(known)
    assert (row["image"], row["image_digest"]) == ("docker.io/library/busybox:latest", None)
    assert (row["image_labels"], row["args"], row["ready"]) == ({}, [], "image")
    assert "docker.io/library/busybox:latest" in shown(row)


def test_then_there_are_its_digest_its_labels_and_the_command(known):
    known.mark_begun("image", {"digest": DIGEST})
    known.mark_done("image", OF_IMAGE)
    row = seen(known)
    assert (row["image_digest"], row["image_labels"]) == (DIGEST, OF_IMAGE["labels"])
    assert (row["args"], row["ready"]) == (OF_IMAGE["spec"]["args"], "tcp:80")
    assert view(known)[1]["command"] == " ".join(row["args"])
    assert r"httpd -f \x1b[2J[red]" in shown(row)  # it is a stranger's: no marks, no escapes
    assert row["spec"]["image"] == "docker.io/library/busybox:latest"


def test_they_stay_known_once_it_is_undone(known):
    known.mark_begun("image", {"digest": DIGEST})
    known.mark_done("image", OF_IMAGE)
    before = view(known)[1]
    known.mark_undone("image")
    row = seen(known, before)
    assert (row["image_digest"], row["args"]) == (DIGEST, ["httpd", "-f", "\x1b[2J[red]"])


def test_a_command_that_nobody_knows_yet_is_a_dash_in_the_table():
    row: dict[str, Any] = dict.fromkeys(("host", "ip", "error", "replaced_by", "publish", "networks"))
    row |= {"id": ID, "state": "queued", "command": "", "created_at": None, "networks": [], "publish": []}
    assert render.sandboxes([row]).splitlines()[1].split()[-1] == "-"


def test_a_sandbox_without_an_image_is_seen_as_ever(tmp_path):
    spec = make_spec(args=["true"])
    known = journals.create(tmp_path, ID, attempt=1, batch="b", spec=spec)
    row = seen(known)
    assert (row["image"], row["args"], row["image_digest"]) == ("host", ["true"], None)
    assert not {"args", "command", "image_digest"} & set(view(known)[1])
    assert json.dumps(row)
