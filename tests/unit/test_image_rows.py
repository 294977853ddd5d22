"""What `ls --json` and `show` say of a sandbox's image; its labels are a stranger's words."""

import io

from rich.console import Console

from cli.render import details
from tasks.view import LABELS_CHARS, shape, view
from worker import journal as journals
from worker.spec import make_spec

ID, DIGEST = "sb-0123456789abcdef", "sha256:" + "a" * 64


def row_of(tmp_path, labels):
    """The row of a sandbox whose image is there."""
    spec = make_spec(args=["true"], image="team/app", network="net")
    known = journals.create(tmp_path, ID, attempt=1, batch="b", spec=spec)
    known.mark_begun("image", {"reference": spec.image, "digest": DIGEST})
    data = {"digest": DIGEST, "rootfs": "/x/rootfs", "labels": labels, "spec": {"rootfs": "/x/rootfs"}}
    known.mark_done("image", {"reference": spec.image, **data})
    state, fields = view(known)
    return shape({"id": ID, "state": state, "spec": spec.model_dump_json(), **fields})


def test_a_row_names_the_reference_the_digest_and_the_labels(tmp_path):
    row = row_of(tmp_path, {"team": "web"})
    found = {name: row[name] for name in ("image", "image_digest", "image_labels", "labels")}
    assert found == {
        "image": "docker.io/team/app:latest",
        "image_digest": DIGEST,
        "image_labels": {"team": "web"},
        "labels": {},
    }


def test_a_sandbox_without_an_image_has_its_rootfs_there():
    row = shape({"id": ID, "state": "queued", "spec": make_spec(args=["true"]).model_dump_json()})
    assert (row["image"], row["image_digest"], row["image_labels"]) == ("host", None, {})


def test_labels_without_an_end_do_not_fill_the_record(tmp_path):
    row = row_of(tmp_path, {f"name{number}": "x" * 1000 for number in range(1000)})
    assert 0 < sum(map(len, row["image_labels"].values())) <= LABELS_CHARS


def test_labels_cannot_draw_on_the_terminal(tmp_path):
    """Neither by escapes nor by marks that rich understands, which would end `show` with a traceback."""
    row = row_of(tmp_path, {"a": "\x1b[2J\nstate running", "b": "[/red]"})
    out = io.StringIO()
    Console(file=out, width=200).print(details(row))
    (line,) = [one for one in out.getvalue().splitlines() if one.startswith("image labels")]
    assert r"a=\x1b[2J\nstate running, b=[/red]" in line
