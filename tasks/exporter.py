"""`/metrics` of a worker's main process: a small HTTP server in threads of its own."""

import ipaddress
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tasks.metrics import make_registry
from worker import outcomes
from worker.errors import HostNotReady
from worker.settings import Settings

log = logging.getLogger("sandbatch")
MOST_AT_ONCE = 8  # who scrapes; others are turned away, a stranger must not fill this process with threads
LOOK_S = 3600.0  # whether it is to stop, which is asked of it by tests alone
REQUEST_S = 10.0  # for one that says nothing, or does not read


def serve(settings: Settings) -> None:
    """Count what ends from now on, and answer at the address of the settings until this process ends.

    Raises:
        HostNotReady: Another program has the port, or the machine not the address. Nothing has been begun.
    """
    registry = make_registry(settings, outcomes.listen)
    address, port = settings.metrics_address, settings.metrics_port
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        server = _Server(address, port, registry)
    except OSError as error:
        todo = "set SANDBATCH_METRICS_PORT (0: none) or SANDBATCH_METRICS_ADDRESS to what is free"
        raise HostNotReady(f"/metrics on {where}", error.strerror or str(error), todo) from None
    threading.Thread(target=server.serve_forever, args=(LOOK_S,), name="metrics", daemon=True).start()
    log.info("metrics: http://%s/metrics", where)
    if not ipaddress.ip_address(address).is_loopback:
        log.warning("metrics: whoever reaches %s reads them, without a password: see to the firewall", where)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.registry = registry
        self._room = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks a name server for this machine's name.
        super(ThreadingHTTPServer, self).server_bind()
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("metrics: an answer to %s failed", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server: _Server
    server_version, sys_version = "sandbatch", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """A line each scrape would fill the log."""
