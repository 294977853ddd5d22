"""A proxy before a registry that is slow, breaks off, refuses, or sends something else, as it is told."""

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.images.registry import Request

PART = 65536
WORDS = {401: "UNAUTHORIZED", 403: "DENIED", 404: "MANIFEST_UNKNOWN", 429: "TOOMANYREQUESTS"}
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
ALWAYS = 1_000_000


@dataclass
class Rule:
    """What happens to GETs with `part` in their path, `times` times; `reached` is set by the first."""

    part: str
    status: int = 0  # answer with it instead, and with the words that registries have for it
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1  # break the connection after so many bytes of the body
    content: bytes | None = None  # send it as the body instead
    rate: int = 0  # bytes a second
    holds: bool = False  # send nothing before `release`
    times: int = ALWAYS
    used: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        self.times = 0
        self.released.set()


class RegistryProxy:
    """Listens on a port of the loopback; without rules it passes everything on."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.rules: list[Rule] = []
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, part: str, **what: Any) -> Rule:
        self.rules.append(Rule(part, **what))
        return self.rules[-1]

    def clear(self) -> None:
        """No more rules, and what they hold goes on; what was asked is forgotten."""
        for rule in self.rules:
            rule.release()
        self.rules, self.requests = [], []

    def asked(self, part: str) -> list[Request]:
        return [one for one in self.requests if part in one.path and one.method == "GET"]

    def close(self) -> None:
        self.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def rule_for(self, path: str) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if rule.part in path and rule.used < rule.times:
                    rule.used += 1
                    return rule
        return None


class _Handler(BaseHTTPRequestHandler):
    proxy: RegistryProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self._pass_on()
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # one of the two sides has ended

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the tests look at `requests`

    def _pass_on(self) -> None:
        rule = self.proxy.rule_for(self.path) if self.command == "GET" else None
        if rule is not None:
            rule.reached.set()
            if rule.holds:
                rule.released.wait()
            if rule.status:
                code = WORDS.get(rule.status, "UNKNOWN")
                body = json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode()
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                self._answer(rule.status, {**headers, **rule.headers})
                self.wfile.write(body)
                return
        server = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # some come more than once: Accept
                if name.lower() not in HOP:
                    server.putheader(name, value)
            server.endheaders()
            answer = server.getresponse()
            sent = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
            content = rule.content if rule else None
            if content is not None:
                sent["Content-Length"] = str(len(content))
            self._answer(answer.status, sent)
            self._send(answer.read if content is None else _reader(content), rule)
        finally:
            server.close()

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.proxy.requests.append(Request(self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _send(self, read: Callable[[int], bytes], rule: Rule | None) -> None:
        sent = 0
        limit = rule.cut_after if rule else -1
        while part := read(PART if limit < 0 else min(PART, limit - sent)):
            self.wfile.write(part)
            sent += len(part)
            if rule and rule.rate and rule.times:
                rule.released.wait(len(part) / rule.rate)
        if limit >= 0:
            self.close_connection = True


def _reader(content: bytes) -> Callable[[int], bytes]:
    rest = memoryview(content)

    def read(size: int) -> bytes:
        nonlocal rest
        part, rest = rest[:size], rest[size:]
        return bytes(part)

    return read
