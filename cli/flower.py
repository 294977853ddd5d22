"""The command line of Flower, and what must be so before it starts."""

import ipaddress
import os
import socket
import sys

from worker.errors import BadInput

PORT, ADDRESS = 5555, "127.0.0.1"
FIXED = (
    "--conf=/dev/null",  # else it runs flowerconfig.py of the folder where it is started
    "--unix_socket=",
    "--read_only=true",  # else it starts tasks, and it has no key to sign them with
    "--debug=false",  # which shows tracebacks and settings, and loads changed code
    "--persistent=false",  # unpickles a file of the folder where it is started; the record is the memory
    "--enable_events=true",
    "--logging=warning",
)
# Where the environment says nothing. The arguments are `stage · sandbox · host`, the uuid leads to the task.
OURS = {
    "tasks_columns": "args,state,exception,received,runtime,uuid",
    "purge_offline_workers": "3600",
    "max_tasks": "50000",  # 4.4 KB each
}
OPENS = {
    "FLOWER_UNIX_SOCKET": "every user of this machine could open it",
    "FLOWER_UNAUTHENTICATED_API": "every page that a browser of this machine shows could read it",
    "FLOWER_CONF": "it is a program, and could open the page",
}


def flower_argv(port: int, address: str) -> list[str]:
    """Flower's command line; its other settings come from FLOWER_* in the environment.

    Raises:
        BadInput: It would be open to others without a password, or cannot listen there.
    """
    for name, why in OPENS.items():
        if os.environ.get(name):
            raise BadInput(name, why, "unset it; FLOWER_BASIC_AUTH=USER:PASSWORD opens page and API")
    if not _has_password() and not is_loopback(address):
        raise BadInput(f"--address {address}", "others could reach it", "set FLOWER_BASIC_AUTH=USER:PASSWORD")
    _listen_once(port, address)
    ours = [f"--{name}={value}" for name, value in OURS.items() if f"FLOWER_{name.upper()}" not in os.environ]
    celery = [sys.executable, "-m", "celery", "-A", "tasks.flower"]
    return [*celery, "flower", f"--port={port}", f"--address={address}", *ours, *FIXED]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches it; an empty address is all of them."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _has_password() -> bool:
    """Whether every pair of FLOWER_BASIC_AUTH has both its parts: Flower would take `:` for a password."""
    given = os.environ.get("FLOWER_BASIC_AUTH")
    if given is None:
        return False
    for pair in given.split(","):
        user, _, password = pair.partition(":")
        if not user or not password or not pair.isascii():
            todo = "USER:PASSWORD in ASCII; several with commas between"
            raise BadInput("FLOWER_BASIC_AUTH", "a user or a password is missing, or not ASCII", todo)
    return True


def _listen_once(port: int, address: str) -> None:
    """Listen where Flower will: what hinders it is told before anything starts."""
    try:
        found = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
                probe.listen(1)
    except OSError as error:
        why = f"Flower cannot listen there: {error.strerror}"
        raise BadInput(f"{address or 'any address'}, port {port}", why, "choose another --port") from None
