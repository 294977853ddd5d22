"""Light rows: what a table shows of thousands, without what it does not show."""

import json
import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from typing import Any

import pytest

from cli.client import Client
from tasks import rows
from tasks.keys import SANDBOXES
from tasks.record import Record
from tasks.state import State
from tests.broker.conftest import CommandLine
from worker.settings import Settings
from worker.spec import make_spec

A, B, C = (f"sb-{number:016x}" for number in (0xA, 0xB, 0xC))
PINNED = make_spec(
    args=["sh", "-c", "true"], host="h1", labels={"team": "red"}, networks=[{"name": "n1"}, {"name": "n2"}]
)
SLOW_TO_IMPORT = ("celery", "kombu", "rich", "pyroute2", "tarfile")


@pytest.fixture
def three(record: Record) -> Record:
    """One that waits for its host, one that runs and has published a port, one that has failed."""
    record.enqueue("red", [(A, PINNED), (B, PINNED)])
    record.enqueue("blue", [(C, make_spec(args=["sleep", "60"]))])
    published = json.dumps([{"port": 80, "host_port": 8080, "host_ip": None, "protocol": "tcp"}])
    for container_id, state, fields in (
        (B, State.RUNNING, {"ip": "10.0.0.2", "publish": published, "stage": "ready"}),
        (C, State.FAILED, {"error": json.dumps({"stage": "netns", "message": "no room"}), "exit_code": "3"}),
    ):
        assert record.put(container_id, State.PLACED, 1, {"host": "h1"}) == 1
        assert record.put(container_id, state, 1, fields) == 1
    return record


def test_a_light_row_says_what_the_full_one_says(three: Record) -> None:
    """Filters and tables take either; whichever way it was read, a sandbox is the same."""
    three.mark_removed([C])
    light, full = rows.read(three, with_labels=True), three.get_all()

    assert [row["id"] for row in light] == [A, B, C]
    for one, other in zip(light, full, strict=True):
        common = set(one) & set(other)
        assert {name: one[name] for name in common} == {name: other[name] for name in common}
        assert {"state", "stage", "host", "ip", "networks", "labels", "publish", "error"} <= common
        assert one["command"] == " ".join(other["args"])


def test_a_record_with_its_own_words_needs_no_spec(three: Record, client: Any) -> None:
    """A spec is most of a record; ten thousand of them are most of the time of `ls`."""
    words = {"command": "sh -c true", "nets": "n1,n2", "queue": "host:h1", "memory": "1000"}
    client.hset(f"sandbatch:sb:{A}", mapping={**words, "spec": "no JSON"})

    row = rows.read(three, [A])[0]

    assert (row["command"], row["networks"], row["host"], row["memory"]) == (
        "sh -c true",
        ["n1", "n2"],
        "h1",
        1000,
    )


def test_more_than_one_call_holds_keeps_the_order(record: Record) -> None:
    ids = [f"sb-{number:016x}" for number in range(2500)]
    record.enqueue("many", [(one, PINNED) for one in ids])

    assert [row["id"] for row in rows.read(record)] == ids
    assert [row["id"] for row in rows.read(record, ids[::-1])] == ids[::-1]


def test_the_index_forgets_what_has_expired(three: Record, client: Any) -> None:
    client.delete(f"sandbatch:sb:{B}")

    assert [row["id"] for row in rows.read(three)] == [A, C]
    assert client.zrange(SANDBOXES, 0, -1) == [A, C]


def test_a_selection_is_the_same_in_full_and_lightly(three: Record, broker: Settings) -> None:
    asks: tuple[dict[str, Any], ...] = (
        {}, {"batch": "red"}, {"host": "h1"}, {"states": ["failed", "queued"]}, {"labels": ["team=red"]},
    )  # fmt: skip
    for ask in asks:
        client = Client(broker)
        found = [row["id"] for row in client.rows(**ask)]
        assert found == [row["id"] for row in client.select(**ask)]
        assert found


def test_the_table_has_a_line_for_each(three: Record, cli: CommandLine) -> None:
    lines = cli("ls").stdout.splitlines()

    assert lines[0].split() == ["ID", "STATE", "HOST", "IP", "NETWORK", "PORTS", "AGE", "COMMAND", "WHY"]
    assert lines[1].split()[:6] == [A, "queued", "h1", "-", "n1,n2", "-"]
    assert lines[2].split()[:6] == [B, "running", "h1", "10.0.0.2", "n1,n2", "8080->80/tcp"]
    assert lines[3].endswith("netns: no room")


def test_ls_imports_nothing_that_is_slow(three: Record, cli: CommandLine) -> None:
    """Half a second for ten thousand sandboxes: what takes a tenth each to import has no place in it."""
    script = "import sys; from cli.main import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    done = cli.python("-c", script, "ls")

    assert done.returncode == 0, done.stderr
    assert A in done.stdout
    modules = done.stdout.splitlines()[-1].split()
    assert [name for name in SLOW_TO_IMPORT if name in modules] == []


def test_a_terminal_gets_lines_of_its_width(three: Record, cli: CommandLine) -> None:
    """A table that wraps is no table."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    argv = [sys.executable, "-m", "cli", "ls"]
    done = subprocess.run(argv, stdout=theirs, env=cli.environment, timeout=60, check=False)
    os.close(theirs)
    lines = os.read(ours, 65536).decode().splitlines()
    os.close(ours)

    assert done.returncode == 0
    assert len(lines) == 4
    assert all(len(line) <= 50 for line in lines)
    assert lines[1].startswith(A)
    assert lines[3].endswith("…")


def test_commands_of_other_modules_are_found_listed_and_guessed(cli: CommandLine) -> None:
    assert "Did you mean 'exec'" in cli("exce").stderr
    text = cli("--help").stdout
    assert all(f" {name} " in text for name in ("run", "ls", "logs", "exec", "cp", "setup"))
