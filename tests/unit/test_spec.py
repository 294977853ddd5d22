"""What may be asked for: checked before it is enqueued, and again on the host."""

import json

import pytest
from pydantic import ValidationError

from tasks.messages import Order, read_order
from worker.errors import BadInput
from worker.spec import Spec, make_spec, new_container_id

ID = "sb-0123456789abcdef"
NOT_UTF8 = "\udcff"  # how Python shows a byte of the command line that is no UTF-8


def test_a_command_is_enough():
    spec = make_spec(args=["true"])
    assert (spec.rootfs, spec.network, spec.host, spec.cwd, spec.ready) == (
        "host",
        "sandbatch",
        None,
        "/",
        "none",
    )


def test_a_spec_survives_the_record():
    """It goes to the host as JSON, which is read as strictly as a flag."""
    spec = make_spec(args=["a", ""], env={"A": "ü\n"}, labels={"k": "v"}, host="h", ready_timeout_s=1)
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_what_the_release_before_does_not_know_is_left_out_unless_asked_for():
    """Its hosts forbid unknown fields, also in their journals; they go on beside newer clients."""
    plain = make_spec(args=["true"])
    for dump in (plain.model_dump(), json.loads(plain.model_dump_json())):
        assert not {"on", "reschedule"} & set(dump)
        assert {"args", "host", "labels", "remove"} <= set(dump)
    asked = make_spec(args=["true"], on={"gpu": "true"}, reschedule=True)
    assert asked.model_dump()["on"] == {"gpu": "true"}
    assert Spec.model_validate_json(asked.model_dump_json()) == asked
    assert Spec.model_validate(plain.model_dump()) == plain


BAD = {
    "kind": ["spec/v5", ""],
    "args": [[], [""], ["", "x"], ["a\0"], [NOT_UTF8], [1], "true", None],
    "rootfs": ["", "Host", "dir", "./dir", "/a/../b", "/..", "/a\0", f"/{NOT_UTF8}", "host\n", None],
    "network": ["", ".a", "-a", "a/b", "a b", "a\n", "a\0", "ü", "..", None],
    "host": ["", "-a", "a/b", "a\n", "a\0", "a" * 64, 1],
    "env": [
        *({name: "x"} for name in ("", "1A", "A-B", "A=B", "A\n", "Ü")),
        *({"A": value} for value in ("\0", NOT_UTF8, 1)),
        [],
    ],
    "cwd": ["", "tmp", "../tmp", "/tmp/..", "/a/../b", "/a\0", f"/{NOT_UTF8}"],
    "labels": [{"a": 1}, {"a": "\0"}, {"\0": "a"}, {NOT_UTF8: "a"}, {"a": NOT_UTF8}, []],
    "ready": [
        *("", "none\n", "udp:80", "HTTP:80/", "http:80", "tcp"),
        *(f"tcp:{port}" for port in ("", "0", "65536", "-1", "1.5", "000080", "80\n", "80/", "٨٠")),
        *(f"http:{rest}" for rest in ("0/", "65536/", "80/a b", "80/\n", "80/ü", "80/a\r\nX: y")),
    ],
    "ready_timeout_s": [0, -1, 3601, float("nan"), float("inf"), "60", None],
    "on": [{"a b": "c"}, {"a": "b,c"}, {"a=": "b"}, {"": "a"}, {"a": 1}, {"a": "x" * 64}, "gpu=true"],
    "reschedule": ["yes", 1, None],
    "user": ["root"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values], ids=ascii
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_field(field, value):
    with pytest.raises(BadInput) as caught:
        make_spec(**{"args": ["true"], field: value})
    assert caught.value.what.split(".")[0] == field
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("args", ["/bin/sh", "-c", "echo\nä"]),
        ("rootfs", "/srv/a..b"),
        ("network", "my_net-1.x"),
        ("host", "build-7.example"),
        ("env", {"_a1": "", "B": "a=b\n"}),
        ("cwd", "/"),
        ("labels", {"": "", "a/b": "ü"}),
        ("on", {"gpu": "true", "example.com/zone": "a-1", "empty": ""}),
        ("ready", "none"),
        ("ready", "tcp:1"),
        ("ready", "tcp:65535"),
        ("ready", "http:80/"),
        ("ready", "http:8000/a?b=c#d"),
        ("ready_timeout_s", 0.1),
        ("ready_timeout_s", 3600),
    ],
)
def test_a_value_at_the_edge_is_taken_as_it_is(field, value):
    assert getattr(make_spec(**{"args": ["true"], field: value}), field) == value


def test_an_error_in_one_variable_does_not_show_the_others():
    """They may be secrets, and errors end in logs."""
    with pytest.raises(BadInput) as caught:
        make_spec(args=["true"], env={"TOKEN": "hunter2", "A-B": "x"})
    assert "hunter2" not in str(caught.value)
    assert "'A-B'" in str(caught.value)


def test_new_ids_are_ours_and_differ():
    ids = {new_container_id() for _ in range(100)}
    assert len(ids) == 100
    for one in ids:
        assert Order(container_id=one, attempt=1).container_id == one


@pytest.mark.parametrize(
    "container_id",
    ["", "sb-", ID[:-1], ID + "0", ID.upper(), ID + "\n", " " + ID, "sb-0123456789abcdeg", "b1", "../" + ID],
)
def test_an_id_of_another_shape_is_refused(container_id):
    """runsc takes a prefix for the whole id, and the id is a folder's name."""
    with pytest.raises(ValidationError, match="16 lowercase hexadecimal digits"):
        Order(container_id=container_id, attempt=1)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        "x",
        {},
        {"container_id": ID},
        {"container_id": ID, "attempt": 0},
        {"container_id": ID, "attempt": "one"},
        {"container_id": ID, "attempt": 1, "more": 1},
        {"container_id": ID, "attempt": 1, "kind": "order/v2"},
        {"container_id": "../etc", "attempt": 1},
    ],
    ids=str,
)
def test_a_message_that_is_no_order_is_refused(message):
    """Anybody with the broker's password can write one."""
    with pytest.raises(BadInput, match="message: "):
        read_order(message)
