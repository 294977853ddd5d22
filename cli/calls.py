"""`sandbatch logs` and `exec`: a conversation with the sandbox's host, through the broker."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import redis
import typer
from typer.core import TyperCommand

from cli import parse
from cli.client import FOLLOW_S, Client
from cli.output import errors_for_humans, one_line, say
from tasks.caller import Conversation, new_call_id
from tasks.state import TERMINAL, State
from tasks.wire import Entry
from worker.calls import STREAMS, Call, ExecCall, make_call
from worker.errors import BadInput, Lost, SandbatchError
from worker.settings import Settings, load_settings

OUTPUT_LIMIT = "1g"
CHUNK_BYTES = 1 << 16
LOOK_S = 1.0  # a heartbeat is a key, not an event
PIPE_CLOSED = 141  # as a shell sees a program that SIGPIPE has ended

Id = Annotated[str, typer.Argument(metavar="ID", help="Full id or a unique prefix.")]


app = typer.Typer()


class BeforeACommand(TyperCommand):
    """Options stand before or after the ID; what follows `--`, or without one the ID, is the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@app.command(epilog="Example: sandbatch logs -f --tail 100 sb-0123")
def logs(
    container_id: Id,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it has ended.")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="S|TIME", help="Not older: seconds ago, or a moment.")
    ] = None,
    tail: Annotated[int | None, typer.Option("-n", "--tail", min=0, metavar="N", help="Last lines.")] = None,
    timestamps: Annotated[bool, typer.Option("-t", "--timestamps", help="When each was written.")] = False,
    stream: Annotated[str | None, typer.Option(metavar="stdout|stderr", help="Only this one.")] = None,
) -> None:
    """Print what a sandbox has written, each stream to the same of ours; also after its end, for a while."""
    with errors_for_humans(), pipes():
        if stream not in (None, *STREAMS):
            raise BadInput(f"--stream {stream}", "not known", "stdout or stderr")
        fields: dict[str, Any] = {"tail": tail, "timestamps": timestamps, "streams": STREAMS}
        if stream is not None:
            fields["streams"] = (stream,)
        client = Client(load_settings())
        row = client.resolve([container_id])[0]
        LogPrinter(client, row["id"], {**fields, **parse.since(since)}, follow=follow).run()


class LogPrinter:
    """Prints a sandbox's log; a follower outlives a restart of its host's worker, and of the broker."""

    def __init__(self, client: Client, container_id: str, fields: dict[str, Any], *, follow: bool) -> None:
        self._client, self._fields, self._follow = client, fields, follow
        self._cursor = ""  # behind what is printed
        self._is_writing = self._is_interrupted = False
        self.container_id = container_id

    def interrupt(self) -> None:
        """KeyboardInterrupt; the first one not between a part's print and the note of it."""
        if self._is_writing and not self._is_interrupted:
            self._is_interrupted = True
        else:
            raise KeyboardInterrupt

    def run(self) -> None:
        """Print to its end; run again after an interrupt, it goes on where it was."""
        client, follow = self._client, self._follow
        row = client.resolve([self.container_id])[0]
        if row["state"] in (State.QUEUED, State.PLACED):
            if not follow:
                why = f"is {row['state']}, it has written nothing yet"
                raise SandbatchError(row["id"], why, "add --follow")
            row = _until_launching(client, row["id"])
        if row["host"] is None:
            return  # cancelled before a host took it
        while True:
            asked = {"container_id": row["id"], "follow": follow, "cursor": self._cursor, **self._fields}
            call = make_call("logs", call_id=new_call_id(), **asked)
            try:
                for reply in converse(client.settings, row["host"], call):
                    self._is_writing = True
                    write(reply)
                    self._cursor = reply.cursor or self._cursor
                    self._is_writing = False
                    if self._is_interrupted:
                        self._is_interrupted = False
                        raise KeyboardInterrupt
                return
            except Lost as lost:
                if not follow:
                    raise
                say(one_line(f"sandbatch: {lost.what}: {lost.why}; the log goes on once it is back"))
                _until_host_lives(client, row["host"])


@app.command("exec", cls=BeforeACommand, epilog="Example: sandbatch exec sb-0123 -- ls -l /tmp")
def exec_(
    container_id: Id,
    args: Annotated[
        list[str] | None, typer.Argument(metavar="CMD [ARG]…", help="The command, after --.")
    ] = None,
    stdin: Annotated[bool, typer.Option("-i", "--interactive", help="Hand our standard input over.")] = False,
    env: Annotated[list[str] | None, typer.Option("-e", "--env", metavar="K=V")] = None,
    cwd: Annotated[str, typer.Option("-w", "--cwd", metavar="DIR", help="If not the sandbox's own.")] = "",
    user: Annotated[
        str, typer.Option("-u", "--user", metavar="USER[:GROUP]", help="Names are those of its image.")
    ] = "",
    timeout: Annotated[
        float | None, typer.Option(metavar="S", help="End it after so many seconds; exit 124.")
    ] = None,
    output_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="End it when it writes more; 0: no limit.")
    ] = OUTPUT_LIMIT,
) -> None:
    """Run one more command in a running sandbox, and exit with its exit code.

    Environment, directory and user are those of the sandbox's own command, but for what is given. No
    terminal: for a shell's script, hand it over with -i. 126 and 127: it cannot be executed, or is not there.
    """
    with errors_for_humans(), pipes():
        client = Client(load_settings())
        row = running(client, container_id)
        fields = {"args": args or [], "cwd": cwd, "user": user, "stdin": stdin, "timeout_s": timeout}
        fields["env"] = dict(parse.pair(one, "--env") for one in env or [])
        fields["output_limit"] = parse.size(output_limit, "--output-limit") or None
        call = make_call("exec", call_id=new_call_id(), container_id=row["id"], **fields)
        answer = run_exec(client.settings, row["host"], call)
        raise typer.Exit(tell_end(row["id"], answer))


def running(client: Client, container_id: str) -> dict[str, Any]:
    """The sandbox, if a command can be run in it.

    Raises:
        SandbatchError: It has ended, or has not started.
    """
    row = client.resolve([container_id])[0]
    if row["state"] in TERMINAL or row["host"] is None:
        why = "has ended" if row["state"] in TERMINAL else "has not started yet"
        raise SandbatchError(row["id"], f"it {why} ({row['state']})", "see sandbatch show")
    return row


def run_exec(settings: Settings, host: str, call: Call) -> dict[str, Any]:
    """Run a command with our own three streams; how it ended."""
    end: dict[str, Any] = {}
    for reply in converse(settings, host, call, feed_from=0):
        if reply.kind == "end":
            end = reply.document()
        else:
            write(reply)
    return end


def tell_end(container_id: str, answer: dict[str, Any]) -> int:
    """Say what there is to say of a command's end; its exit code."""
    if answer.get("words"):
        say(one_line(f"sandbatch: exec in {container_id}: {answer['words']}"))
    return int(answer.get("exit_code", 1))


def converse(settings: Settings, host: str, call: Call, *, feed_from: int | None = None) -> Iterator[Entry]:
    """The replies to a call; a file descriptor is read aside and handed over, if the call wants input."""
    with Conversation(settings, host, call) as talk:
        if isinstance(call, ExecCall) and call.stdin and feed_from is not None:
            feeder = threading.Thread(target=_feed, args=(talk, feed_from), daemon=True)
            feeder.start()
        yield from talk.replies()


def _feed(talk: Conversation, source: int) -> None:
    try:
        while talk.feed(data := os.read(source, CHUNK_BYTES)):
            if not data:
                return
    except (Lost, redis.RedisError, OSError, ValueError):
        return  # the main thread finds out as well, and says so


def write(reply: Entry) -> None:
    """One part of an output to the same stream of ours."""
    if reply.kind == "note":
        say(one_line(f"sandbatch: {reply.data.decode(errors='replace')}"))
    elif reply.kind in STREAMS:
        out = sys.stdout if reply.kind == "stdout" else sys.stderr
        out.flush()
        out.buffer.write(reply.data)
        out.buffer.flush()


@contextmanager
def pipes() -> Iterator[None]:
    """A reader of our output that has gone, such as `head`, ends us without a word."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still has to flush
        raise typer.Exit(PIPE_CLOSED) from None


def _until_launching(client: Client, container_id: str) -> dict[str, Any]:
    """Wait by events until a host has begun with a sandbox."""
    while True:
        mark = client.record.last_event()
        row = client.resolve([container_id])[0]
        if row["state"] not in (State.QUEUED, State.PLACED):
            return row
        list(client.record.follow(mark, FOLLOW_S))


def _until_host_lives(client: Client, host: str) -> None:
    while True:
        time.sleep(LOOK_S)
        try:
            if host in client.record.live_hosts():
                return
        except redis.RedisError:
            continue  # the broker is away as well
