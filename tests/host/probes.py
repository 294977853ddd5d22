"""What a sandbox can reach: a server inside it that tries addresses for the test, and what it tries."""

import contextlib
import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

from tests.host.system import System

PORT, UDP_PORT, OTHER_PORT = 8000, 5353, 8001

# Answers GET / for the ready probe, and POST with a list of targets; echoes what comes by UDP.
INSIDE = """
import http.server, json, socket, threading

def attempt(target):
    protocol, address, port = target
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect((address, port))
            probe.sendall(b"ping")
            return probe.recv(10) == b"ping"
        except OSError:
            return False

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"ready")
    def do_POST(self):
        targets = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        results = [None] * len(targets)
        def work(number):
            results[number] = attempt(targets[number])
        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(targets))]
        [one.start() for one in threads]
        [one.join() for one in threads]
        self.answer(json.dumps(results).encode())
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

ECHO
echo("::", 5353, 8001)
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 8000), Handler).serve_forever()
"""
ECHO = """
import socket, threading

def echo_udp(server):
    while True:
        data, peer = server.recvfrom(100)
        server.sendto(data, peer)

def echo_tcp(server):
    while True:
        client, _ = server.accept()
        with client:
            client.sendall(client.recv(10))

def echo(address, udp_port, *tcp_ports):
    # Bound here, before anybody is told that they are up.
    is_v6 = ":" in address
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, udp_port))
    tcp = [socket.create_server((address, port), family=family, dualstack_ipv6=is_v6) for port in tcp_ports]
    for work, server in [(echo_udp, udp), *((echo_tcp, one) for one in tcp)]:
        threading.Thread(target=work, args=(server,)).start()
"""
OUTSIDE = (
    ECHO
    + """
import sys
echo(sys.argv[1], 5353, 8001, 8002)
print("up", flush=True)
"""
)
COMMAND = ("--ready", f"http:{PORT}/", "--", "python3", "-c", INSIDE.replace("ECHO\n", ECHO))

Target = tuple[str, str, int]


def targets(address: str) -> list[Target]:
    """The two echo servers of a sandbox, of the host, or of a machine outside."""
    return [("tcp", address, OTHER_PORT), ("udp", address, UDP_PORT)]


def reach(ip: str, tried: list[Target]) -> list[bool]:
    """Which of the targets the sandbox at `ip` gets an answer from, as it says itself."""
    host = f"[{ip}]" if ":" in ip else ip
    request = urllib.request.Request(f"http://{host}:{PORT}/", json.dumps(tried).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - http
        found: list[bool] = json.load(answer)
    return found


def echoes(target: Target, source: str | None = None) -> bool:
    """Whether the test, on the host, gets an answer."""
    protocol, address, port = target
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as probe:
        probe.settimeout(1)
        try:
            if source:
                probe.bind((source, 0))
            probe.connect((address, port))
            probe.sendall(b"ping")
            return probe.recv(10) == b"ping"
        except OSError:
            return False


@contextlib.contextmanager
def echo_servers(address: str, *prefix: str) -> Iterator[None]:
    """The echo servers on an address of the host, or, by `prefix`, in a netns."""
    argv = [*prefix, "python3", "-c", OUTSIDE, address]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"up\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def outside(name: str, subnet: str) -> Iterator[str]:
    """A machine behind the host, as the internet is; yields its address."""
    host, other = f"{subnet}.1", f"{subnet}.2"
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", f"{name}0", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "addr", "add", f"{host}/24", "dev", f"{name}0")
        run("ip", "link", "set", f"{name}0", "up")
        run("ip", "-n", name, "addr", "add", f"{other}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "route", "add", "default", "via", host)
        with echo_servers(other, "ip", "netns", "exec", name):
            yield other
    finally:
        run("ip", "netns", "del", name)


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def launch(system: System, *options: str) -> tuple[str, str]:
    """A probing sandbox with these options of `run`; its id and its address."""
    (container_id,) = system.run(*options, "--wait", *COMMAND)
    return container_id, str(system.show(container_id)["ip"])
