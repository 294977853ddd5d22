"""A proxy before a broker: it cuts the line, and loses, doubles or holds back messages that are published.

A message is lost by renaming the list of its LPUSH, doubled by pushing it twice, held back in a list
beside its own until `release`: so every reply is the broker's own, also within a pipeline.
"""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

import redis

QUEUES = b"sandbatch:mq:"
Command = list[bytes]


class Proxy:
    """Listens on a port of the loopback; `mangle` may change each command on its way to the broker."""

    def __init__(
        self, broker_port: int, mangle: Callable[[Command], Command] = lambda command: command
    ) -> None:
        self._broker_port, self.mangle = broker_port, mangle
        self._is_cut = False
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection, and refuse new ones."""
        self._is_cut = True
        self._close_all()

    def join(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _close_all(self) -> None:
        for one in list(self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its other side has just ended

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            if self._is_cut:
                client.close()
                continue
            try:
                broker = socket.create_connection(("127.0.0.1", self._broker_port))
            except ConnectionRefusedError:  # it is being restarted
                client.close()
                continue
            self._open |= {client, broker}
            for target, args in ((self._commands, (client, broker)), (self._replies, (broker, client))):
                threading.Thread(target=target, args=args, daemon=True).start()

    def _commands(self, client: socket.socket, broker: socket.socket) -> None:
        with client.makefile("rb") as stream:
            try:
                for command in read_commands(stream):
                    broker.sendall(encode(self.mangle(command)))
            except OSError:
                pass  # cut
        self._end(client, broker)

    def _replies(self, broker: socket.socket, client: socket.socket) -> None:
        try:
            while part := broker.recv(65536):
                client.sendall(part)
        except OSError:
            pass  # cut
        self._end(client, broker)

    def _end(self, *sockets: socket.socket) -> None:
        for one in sockets:
            self._open.discard(one)
            # A close alone tells the other side nothing while a thread still reads from the socket.
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def read_commands(stream: BinaryIO) -> Iterator[Command]:
    """The commands of a client: arrays of bulk strings."""
    while head := stream.readline():
        command = []
        for _ in range(int(head[1:])):
            length = int(stream.readline()[1:])
            command.append(stream.read(length))
            stream.read(2)
        yield command


def encode(command: Command) -> bytes:
    parts = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in command)
    return b"*%d\r\n%s" % (len(command), parts)


class Chaos:
    """Loses, doubles and holds back messages; a share of them each, by a seed. Counts what it did."""

    def __init__(self, seed: int, share: float) -> None:
        self._random, self._share = random.Random(seed), share  # noqa: S311 - no secret
        self._lock = threading.Lock()
        self.counts = {"lost": 0, "doubled": 0, "held": 0, "passed": 0}
        self.is_on = True

    def __call__(self, command: Command) -> Command:
        if command[0] != b"LPUSH" or not command[1].startswith(QUEUES) or not self.is_on:
            return command
        with self._lock:
            what = self._random.choices(
                ("lost", "doubled", "held", "passed"), (*(self._share,) * 3, 1 - 3 * self._share)
            )[0]
            self.counts[what] += 1
        if what == "lost":
            return [command[0], b"graveyard:" + command[1], *command[2:]]
        if what == "doubled":
            return [*command, *command[2:]]
        if what == "held":
            return [command[0], b"limbo:" + command[1], *command[2:]]
        return command


def release(broker: "redis.Redis") -> int:
    """Send what was held back, last first: late and out of order."""
    moved = 0
    for key in broker.scan_iter(match="limbo:*"):
        while (message := broker.lpop(key)) is not None:
            broker.lpush(key[len("limbo:") :], message)
            moved += 1
    return moved
