"""`sandbatch cp`: a tar stream through `exec` of the sandbox's own tar, as kubectl has it."""

import os
import posixpath
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, cast

import redis
import typer

from cli import parse
from cli.calls import CHUNK_BYTES, OUTPUT_LIMIT, converse, pipes, running, write
from cli.client import Client
from cli.output import errors_for_humans, one_line, say
from cli.unpack import Source, unpack
from tasks.caller import Conversation, new_call_id
from worker.calls import Call, make_call
from worker.errors import BadInput, Lost, SandbatchError
from worker.exec import NOT_FOUND
from worker.settings import load_settings

WORDS = 4096  # of what tar says, from its end

app = typer.Typer()


@app.command(epilog="Example: sandbatch cp sb-0123:/tmp/result .")
def cp(
    source: Annotated[str, typer.Argument(metavar="SRC", help="PATH, ID:PATH, or - for a tar.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="ID:PATH, PATH, or - for a tar.")],
    output_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="Most that may come out of the sandbox; 0: no limit.")
    ] = OUTPUT_LIMIT,
) -> None:
    """Copy a file or a folder out of a running sandbox, or into it.

    Into a folder that is there it goes under its own name, else it gets the name DST. The sandbox
    needs `tar`, and for a copy into it a place to write to, such as /tmp. All becomes root's.
    """
    with errors_for_humans(), pipes():
        left, right = _split(source), _split(target)
        if (left is None) == (right is None):
            raise BadInput("cp", "one of SRC and DST is ID:PATH", "for example cp sb-0123:/tmp/out .")
        client = Client(load_settings())
        if left is not None:
            limit = parse.size(output_limit, "--output-limit") or None
            _copy_out(client, running(client, left[0]), left[1], target, limit)
        elif right is not None:
            _copy_in(client, running(client, right[0]), source, right[1])


def _split(text: str) -> tuple[str, str] | None:
    """`ID:PATH` as its parts, the path from the root; None for a path of ours."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name in ("", "."):
        return None
    return name, posixpath.normpath("/" + path)


# -- out -------------------------------------------------------------------------------------------


def _copy_out(client: Client, row: dict[str, Any], path: str, target: str, limit: int | None) -> None:
    folder, base = posixpath.split(path)
    if not base:
        raise BadInput(f"cp {row['id']}:{path}", "a file or folder below it is needed", "name one")
    call = _call(row, ["tar", "-cf", "-", "-C", folder, f"./{base}"], output_limit=limit)
    output = _Output(converse(client.settings, row["host"], call), row["id"], path)
    if target == "-":
        for part in output.parts():
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return
    place = Path(target)
    if place.is_dir():
        place = place / base
    if not place.parent.is_dir():
        raise BadInput(f"cp to {target}", f"{place.parent} is no folder", "make it first")
    left_out = unpack(cast("IO[bytes]", Source(output.parts())), base, place)
    if left_out:
        names = ", ".join(sorted(left_out)[:5])
        say(one_line(f"sandbatch: cp: {len(left_out)} devices, and links that lead out, left out: {names}"))
        raise typer.Exit(1)


class _Output:
    """What a command in the sandbox writes, and an error unless it ends well."""

    def __init__(self, replies: Iterator[Any], container_id: str, path: str) -> None:
        self._replies, self._what = replies, f"cp {container_id}:{path}"
        self._words = b""

    def parts(self) -> Iterator[bytes]:
        for reply in self._replies:
            if reply.kind == "stdout":
                yield reply.data
            elif reply.kind == "stderr":
                self._words = (self._words + reply.data)[-WORDS:]
            elif reply.kind == "end":
                check(self._what, reply.document(), self._words)
            else:
                write(reply)


def check(what: str, end: dict[str, Any], words: bytes) -> None:
    """
    Raises:
        SandbatchError: tar is not there, or did not end well; its own words.
    """
    code = int(end.get("exit_code", 1))
    if code == NOT_FOUND:
        raise SandbatchError(what, "the sandbox has no tar", "take a rootfs that has one, or exec")
    if code or end.get("words"):
        lines = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if "exit status" not in line and "previous errors" not in line]
        why = end.get("words") or (own[-1] if own else f"tar ended with {code}")
        raise SandbatchError(what, str(why), "see what is there: sandbatch exec")


# -- in --------------------------------------------------------------------------------------------


def _copy_in(client: Client, row: dict[str, Any], source: str, path: str) -> None:
    is_folder = _is_folder(client, row, path)
    what = f"cp to {row['id']}:{path}"
    if source == "-":
        if not is_folder:
            raise SandbatchError(what, "it is no folder in the sandbox", "a tar goes into a folder")
        call = _call(row, ["tar", "-xf", "-", "-C", path], stdin=True)
        _send(what, converse(client.settings, row["host"], call, feed_from=0))
        return
    place = Path(source)
    if not os.path.lexists(place):
        raise BadInput(f"cp {source}", "no such file or folder", "name one")
    folder, name = (path, place.resolve().name) if is_folder else posixpath.split(path)
    if not name:
        raise BadInput(f"cp {source}", "it has no name", "name a folder below it")
    call = _call(row, ["tar", "-xf", "-", "-C", folder], stdin=True)
    with Conversation(client.settings, row["host"], call) as talk:
        packing = _Packing(talk, place, name)
        packing.start()
        try:
            _send(what, talk.replies())
        finally:
            if packing.error is not None:
                raise packing.error
    for left in packing.left_out[:5]:
        say(one_line(f"sandbatch: cp: {left} is neither file, folder nor link: left out"))
    if packing.left_out:
        raise typer.Exit(1)


def _send(what: str, replies: Iterator[Any]) -> None:
    words = b""
    for reply in replies:
        if reply.kind == "stderr":
            words = (words + reply.data)[-WORDS:]
        elif reply.kind == "end":
            check(what, reply.document(), words)
        elif reply.kind == "note":
            write(reply)


class _Packing(threading.Thread):
    """Pack a file or folder, and hand it over as the sandbox takes it."""

    def __init__(self, talk: Conversation, place: Path, name: str) -> None:
        super().__init__(name="packing", daemon=True)
        self._talk, self._place, self._name = talk, place, name
        self.error: SandbatchError | None = None
        self.left_out: list[str] = []

    def run(self) -> None:
        try:
            with tarfile.open(fileobj=self, mode="w|", bufsize=CHUNK_BYTES) as tar:  # type: ignore[call-overload]
                tar.add(self._place, arcname=self._name, filter=self._as_roots)
            self._talk.feed(b"")
        except BrokenPipeError:
            return  # the call is over: how it ended says why
        except (Lost, redis.RedisError):
            return  # the main thread finds out as well, and says so
        except OSError as error:
            self.error = SandbatchError(f"cp {self._place}", f"{error.filename}: {error.strerror}", "")
            self._talk.feed(b"")

    def write(self, data: bytes) -> int:
        """As `tarfile` writes."""
        if data and not self._talk.feed(bytes(data)):
            raise BrokenPipeError
        return len(data)

    def _as_roots(self, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            self.left_out.append(member.name)
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member


def _is_folder(client: Client, row: dict[str, Any], path: str) -> bool:
    """Whether there is such a folder inside; asked of tar, which is all that is needed there."""
    call = _call(row, ["tar", "-C", path, "-cf", "/dev/null", "-T", "/dev/null"])
    end: dict[str, Any] = {}
    for reply in converse(client.settings, row["host"], call):
        if reply.kind == "end":
            end = reply.document()
    if end.get("exit_code") == NOT_FOUND:
        check(f"cp to {row['id']}:{path}", end, b"")
    return end.get("exit_code") == 0


def _call(row: dict[str, Any], args: list[str], **fields: Any) -> Call:
    return make_call(
        "exec", call_id=new_call_id(), container_id=row["id"], args=args, cwd="/", user="0:0", **fields
    )
