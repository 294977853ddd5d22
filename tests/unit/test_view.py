"""Records as another release, or anybody with the broker's password, may have written them."""

import json
from typing import Any

import pytest

from tasks import rows, view
from worker.spec import make_spec

RECORD = {"id": "sb-00000000000000a1", "state": "running", "spec": make_spec(args=["true"]).model_dump_json()}
LISTS = ("stages", "ips", "links", "publish", "notes", "args")
OBJECTS = ("image_labels", "limits", "error")
NUMBERS = ("attempt", "exit_code", "restarts")
FOREIGN = ("{", "null", "7", "-1.5", "x", '"a"', "[7, null]", "[" * 6000, "9" * 5000)


@pytest.mark.parametrize("name", [*LISTS, *OBJECTS, *NUMBERS])
def test_a_field_of_another_type_is_as_if_it_were_not_there(name: str) -> None:
    """`ls` and a worker's sweep read all records: one of them must not take the others along."""
    usual = view.shape(RECORD)
    for text in FOREIGN:
        row = view.shape({**RECORD, name: text})
        assert row[name] == usual[name] or type(row[name]) in _types(name), text
        json.dumps(row)


def _types(name: str) -> tuple[type, ...]:
    return (list,) if name in LISTS else (int,) if name in NUMBERS else (dict,)


def test_what_is_right_is_kept() -> None:
    fields: dict[str, Any] = {
        "stages": [{"name": "netns", "verb": "do"}],
        "ips": ["10.0.0.2"],
        "limits": {"pids": 7},
        "error": {"stage": "netns", "message": "no"},
    }
    row = view.shape({**RECORD, "exit_code": "3", **{one: json.dumps(fields[one]) for one in fields}})
    assert (row["exit_code"], row["ips"], row["limits"]["pids"]) == (3, ["10.0.0.2"], 7)
    assert (row["error"], row["stages"][0]["do|undo"]) == (fields["error"], "do")


@pytest.mark.parametrize("name", ["exit_code", "error", "publish", "memory", "line"])
def test_a_light_row_stands_the_same(name: str) -> None:
    for text in FOREIGN:
        fields: list[str | None] = [{**RECORD, name: text}.get(one) for one in rows.FIELDS]
        json.dumps(rows._row(fields))
