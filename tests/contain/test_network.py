"""What a hostile program in a sandbox reaches on the network, and what it can see or pretend there.

All sandboxes are on one network with IPv4 and IPv6, beside a neighbour that publishes a port, which opens the
host's loopback to links (route_localnet). Beyond the host is another machine, on a bridge of its own, that
has the metadata service's addresses, too.
"""

import contextlib
import json
import selectors
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.host.probes import COMMAND, echo_servers, echoes, run, targets
from tests.host.system import System
from tests.host.test_egress_frames import SEND, mac_of
from worker import loopback

SECRET, HEARD = 7777, 7778  # ports of the host: on its loopback alone, and where everybody may send
PUBLISHED = 28731
ABSTRACT = "sandbatch-contain"
BEYOND, BEYOND_BRIDGE = "sbtbeyond", "sbtbeyond0"
# Of the bridge to the machine beyond; that machine; and the metadata service, which it is as well.
BEYOND_HOST, BEYOND_HOST6 = "198.51.102.1", "fd78:102::1"
BEYOND_IP, BEYOND_IP6 = "198.51.102.2", "fd78:102::2"
METADATA, METADATA6 = "169.254.169.254", "fd00:ec2::254"
# The IDs of users inside: root, who has some capabilities, and somebody who has none.
USERS = ("0:0", "1000:1000")

HOLD_ABSTRACT = f"""
import socket
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0{ABSTRACT}-inside")  # of the neighbour
abstract.listen(100)
"""

# Begins every script: `GIVEN` is what the test hands over.
BEGIN = """
import fcntl, glob, json, os, socket, struct, sys, time
from concurrent.futures import ThreadPoolExecutor
GIVEN = json.loads(sys.argv[1])
def attempt(act):
    try:
        return act() or "done"
    except OSError as error:
        return f"refused: {error.strerror or error}"
def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET
def say(found):
    print(json.dumps(found))
"""

# Which of GIVEN["places"], (protocol, address, port), answer.
REACH = """
LIMIT_S = 2
def answers(place):
    protocol, address, port = place
    icmp = socket.IPPROTO_ICMPV6 if ":" in address else socket.IPPROTO_ICMP
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family(address), kind, icmp if protocol == "ping" else 0) as probe:
        probe.settimeout(LIMIT_S)
        try:
            probe.connect((address, port))
            echo = bytes([128 if ":" in address else 8]) + bytes(7)
            probe.sendall(echo + b"ping" if protocol == "ping" else b"ping")
            return probe.recv(100).endswith(b"ping")
        except OSError:
            return False
with ThreadPoolExecutor(50) as pool:
    say([place for place, is_up in zip(GIVEN["places"], pool.map(answers, GIVEN["places"])) if is_up])
"""

# Sends to a port of the host's loopback by every way there is, and at last, honestly, to GIVEN["control"].
KNOCK = """
BY_DEVICE, PKTINFO, PKTINFO6 = 25, 8, 50
def device(probe):
    probe.setsockopt(socket.SOL_SOCKET, BY_DEVICE, b"eth0\\0")
def own(probe):
    probe.bind((GIVEN["own6" if probe.family == socket.AF_INET6 else "own"], 0))
def device_and_own(probe):
    device(probe)
    own(probe)
def plain(probe):
    pass
def ancillary(address):
    link = socket.if_nametoindex("eth0")
    if ":" in address:
        return [(socket.IPPROTO_IPV6, PKTINFO6, bytes(16) + struct.pack("I", link))]
    return [(socket.IPPROTO_IP, PKTINFO, struct.pack("I", link) + bytes(8))]
def knock(kind, address, way, more=(), port=GIVEN["port"]):
    with socket.socket(family(address), kind) as probe:
        probe.settimeout(1)
        way(probe)
        word = f"{kind.name} {address} {way.__name__} {len(more)}".encode()
        if kind == socket.SOCK_DGRAM:
            probe.sendmsg([word], more, 0, (address, port))
        else:
            probe.connect((address, port))
            probe.sendall(word)
        return "sent"
tries = []
for address in GIVEN["addresses"]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        tries += [(kind, address, way) for way in (plain, device, own, device_and_own)]
    tries.append((socket.SOCK_DGRAM, address, plain, ancillary(address)))
with ThreadPoolExecutor(50) as pool:
    found = list(pool.map(lambda one: attempt(lambda: knock(*one)), tries))
address, port = GIVEN["control"]
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    knock(kind, address, device, (), port)
say(found.count("sent"))
"""

# What only who rules a network may do. In a netns, by root of the host, each attempt is done.
RULE = """
LINK, NEIGHBOUR, OTHER_MAC = socket.if_nametoindex("eth0"), GIVEN["neighbour"], b"\\2\\0\\0\\0\\0\\x99"
ip = socket.inet_aton
OTHER = ip(NEIGHBOUR)
def ask(kind, body, flags=0x405):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(5)
        netlink.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        answer = netlink.recv(65536)
        code = -struct.unpack_from("i", answer, 16)[0]
        if code:
            raise OSError(code, os.strerror(code))
def attr(kind, value):
    raw = struct.pack("HH", 4 + len(value), kind) + value
    return raw + bytes(-len(raw) % 4)
def link(number, *more, flags=0, change=0):
    return struct.pack("BxHiII", 0, 0, number, flags, change) + b"".join(more)
def request(command, value):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, command, b"eth0".ljust(16, b"\\0") + value.ljust(24, b"\\0"))
def opened(*words):
    socket.socket(*words).close()
def promiscuous():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as probe:
        probe.setsockopt(263, 1, struct.pack("iHH8s", LINK, 1, 0, b""))
def as_another(option, address, level=socket.IPPROTO_IP):
    with socket.socket(family(address), socket.SOCK_DGRAM) as probe:
        probe.setsockopt(level, option, 1)
        probe.bind((address, 0))
RTM = {
    "NEWADDR": (20, struct.pack("BBBBI", 2, 24, 0, 0, LINK) + attr(2, OTHER) + attr(1, OTHER)),
    "NEWLINK": (16, link(0, attr(3, b"more0\\0"), attr(18, attr(1, b"bridge\\0")))),
    "a MAC": (16, link(LINK, attr(1, OTHER_MAC))),
    "promiscuous": (16, link(LINK, flags=0x100, change=0x100)),
    "NEWROUTE": (24, struct.pack("8BI", 2, 32, 0, 0, 254, 3, 253, 1, 0) + attr(1, ip("203.0.113.9"))
                 + attr(4, struct.pack("I", LINK))),
    "NEWNEIGH": (28, struct.pack("BxHiHBB", 2, 0, LINK, 0x80, 0, 0) + attr(1, OTHER) + attr(2, OTHER_MAC)),
    "NEWRULE": (32, struct.pack("8BI", 2, 0, 0, 0, 254, 0, 0, 1, 0)),
}
ACTS = {
    "AF_PACKET": lambda: opened(socket.AF_PACKET, socket.SOCK_RAW, 3),
    "AF_PACKET, datagrams": lambda: opened(socket.AF_PACKET, socket.SOCK_DGRAM, 3),
    "raw IPv4": lambda: opened(socket.AF_INET, socket.SOCK_RAW, 255),
    "raw ICMP": lambda: opened(socket.AF_INET, socket.SOCK_RAW, 1),
    "raw IPv6": lambda: opened(socket.AF_INET6, socket.SOCK_RAW, 58),
    "PACKET_ADD_MEMBERSHIP": promiscuous,
    "SIOCSIFFLAGS": lambda: request(0x8914, struct.pack("H", 0x1143)),
    "SIOCSIFHWADDR": lambda: request(0x8924, struct.pack("H6s", 1, OTHER_MAC)),
    "SIOCSIFADDR": lambda: request(0x8916, struct.pack("HH4s", 2, 0, ip("203.0.113.8"))),
    "IP_FREEBIND": lambda: as_another(15, NEIGHBOUR),
    "IP_TRANSPARENT": lambda: as_another(19, NEIGHBOUR),
    "IPV6_FREEBIND": lambda: as_another(78, GIVEN["neighbour6"], socket.IPPROTO_IPV6),
    "IPV6_TRANSPARENT": lambda: as_another(75, GIVEN["neighbour6"], socket.IPPROTO_IPV6),
    **{f"RTM {name}": lambda words=words: ask(*words) for name, words in RTM.items()},
}
found = {name: attempt(act) for name, act in ACTS.items()}
if "host" in GIVEN:
    # A source that is another's is not taken, or not used: the test looks at who sent.
    for address, other in ((GIVEN["host"], NEIGHBOUR), (GIVEN["host6"], GIVEN["neighbour6"])):
        raw = socket.inet_pton(family(other), other)
        info = (41, 50, raw + bytes(4)) if ":" in other else (0, 8, bytes(4) + raw + bytes(4))
        with socket.socket(family(address), socket.SOCK_DGRAM) as probe:
            attempt(lambda: probe.sendmsg([b"as another"], [info], 0, (address, GIVEN["port"])))
            probe.sendto(b"as itself", (address, GIVEN["port"]))
    def tap():
        fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))
    found["TUNSETIFF"] = attempt(tap)
say(found)
"""

# Families that lead past the network, and what the kernel tells about devices.
BESIDES = """
def opened(*words):
    socket.socket(*words).close()
def told(protocol):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.bind((0, 0xFFFFFFFF))
def connected(name):
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        probe.connect("\\0" + name)
say({
    **{name: attempt(lambda: connected(name)) for name in GIVEN["abstract"]},
    "uevents": attempt(lambda: told(15)),
    "changes of links": attempt(lambda: told(0)),
    "vsock": attempt(lambda: opened(socket.AF_VSOCK, socket.SOCK_STREAM)),
    **{f"netlink {one}": attempt(lambda: opened(16, socket.SOCK_RAW, one)) for one in (4, 6, 9, 11, 12)},
})
"""

# All that it can know of its network: the files, and the dumps of netlink.
OVERLOOK = """
def dump(kind, length):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(5)
        netlink.send(struct.pack("IHHII", 16 + length, kind, 0x301, 1, 0) + bytes(length))
        rows = []
        while True:
            data = netlink.recv(1 << 20)
            while data:
                size, kind = struct.unpack_from("IH", data)
                if kind in (2, 3):
                    return rows
                rows.append(data[16:size])
                data = data[(size + 3) & ~3:]
def attrs(raw):
    found = {}
    while len(raw) >= 4:
        size, kind = struct.unpack_from("HH", raw)
        found[kind] = raw[4:size]
        raw = raw[(size + 3) & ~3:]
    return found
def ip(raw):
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
def read(path):
    with open(path, errors="replace") as file:
        return file.read()
links = [attrs(one[16:]) for one in dump(18, 16)]
say({
    "links": sorted(one[3].rstrip(b"\\0").decode() for one in links),
    "macs": sorted(one[1].hex(":") for one in links),
    "addresses": sorted(ip(attrs(one[8:])[1]) for one in dump(22, 8)),
    "gateways": sorted(ip(raw) for raw in {attrs(one[12:]).get(5) for one in dump(26, 12)} if raw),
    "neighbours": [ip(attrs(one[12:])[1]) for one in dump(30, 12)],
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "files": {path: read(path) for path in glob.glob("/proc/net/*") if os.path.isfile(path)},
})
"""

RECEIVED = """
rows = [line.split(":") for line in open("/proc/net/dev") if ":" in line]
say({name.strip(): int(words.split()[0]) for name, words in rows}["eth0"])
"""

SPRAY = """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    for _ in range(GIVEN["count"]):
        probe.sendto(bytes(GIVEN["size"]), (GIVEN["target"], GIVEN["port"]))
say("sent")
"""

Place = tuple[str, str, int]


@dataclass
class Sandbox:
    """One of the ground's sandboxes."""

    system: System
    container_id: str
    ip: str
    ip6: str

    def tell(self, script: str, *, user: str = USERS[0], **given: Any) -> Any:
        """What a script says that is run inside."""
        argv = ("--", "python3", "-c", BEGIN + script, json.dumps(given))
        return json.loads(self.system.cli("exec", "--user", user, self.container_id, *argv).stdout)


@dataclass
class Ground:
    """Sandboxes, each with other options, and what is around them."""

    system: System
    host: str  # its addresses on the sandboxes' bridge
    host6: str
    free: Sandbox  # no option of its own
    denied: Sandbox
    listed: Sandbox
    isolated: Sandbox
    neighbour: Sandbox  # publishes a port

    def places(self, *addresses: str) -> list[Place]:
        return [one for ip in addresses for one in (*targets(ip), ("ping", ip, 0))]


class Ear:
    """Notes what comes to addresses of this machine, by TCP and by UDP: (words, who sent)."""

    def __init__(self, port: int, *addresses: str) -> None:
        self.heard: list[tuple[str, str]] = []
        self._selector = selectors.DefaultSelector()
        self._end, theirs = socket.socketpair()
        self._sockets = [self._end, theirs]
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            udp = socket.socket(family, socket.SOCK_DGRAM)
            self._sockets += [udp, socket.create_server((address, port), family=family)]
            udp.bind((address, port))
        for one in self._sockets[1:]:
            self._selector.register(one, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, args=(theirs,))
        self._thread.start()

    def words(self) -> set[str]:
        return {words for words, _ in self.heard}

    def __enter__(self) -> "Ear":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.send(b"end")
        self._thread.join()
        self._selector.close()
        for one in self._sockets:
            one.close()

    def _listen(self, end: socket.socket) -> None:
        while True:
            for key, _ in self._selector.select():
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is end:
                    return
                if one.type == socket.SOCK_DGRAM:
                    raw, peer = one.recvfrom(1000)
                else:
                    client, peer = one.accept()
                    with client, contextlib.suppress(OSError):
                        client.settimeout(5)
                        self.heard.append((f"connected from {peer[0]}", peer[0]))
                        raw = client.recv(1000)
                self.heard.append((raw.decode(), peer[0]))


@pytest.fixture(scope="module")
def beyond(contained: System) -> Iterator[None]:
    """Another network of the host, and a machine on it that answers by all of its addresses."""
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", BEYOND)
        stack.callback(run, "ip", "netns", "del", BEYOND)
        run("ip", "link", "add", BEYOND_BRIDGE, "type", "bridge")
        stack.callback(run, "ip", "link", "del", BEYOND_BRIDGE)
        run("ip", "link", "add", f"{BEYOND}1", "type", "veth", "peer", "name", "eth0", "netns", BEYOND)
        stack.callback(run, "ip", "link", "del", f"{BEYOND}1")  # the netns takes its time
        run("ip", "link", "set", f"{BEYOND}1", "master", BEYOND_BRIDGE, "up")
        run("ip", "link", "set", BEYOND_BRIDGE, "up")
        run("ip", "-n", BEYOND, "link", "set", "lo", "up")
        run("ip", "-n", BEYOND, "link", "set", "eth0", "up")
        for host, *others in ((BEYOND_HOST, BEYOND_IP, METADATA), (BEYOND_HOST6, BEYOND_IP6, METADATA6)):
            more, width = (("nodad",), 64) if ":" in host else ((), 24)
            run("ip", "addr", "add", f"{host}/{width}", "dev", BEYOND_BRIDGE, *more)
            run("ip", "-n", BEYOND, "addr", "add", f"{others[0]}/{width}", "dev", "eth0", *more)
            run("ip", "-n", BEYOND, "addr", "add", others[1], "dev", "lo", *more)
            run("ip", "-n", BEYOND, "route", "add", "default", "via", host)
            run("ip", "route", "add", others[1], "via", others[0], "dev", BEYOND_BRIDGE)
            for address in others:
                stack.enter_context(echo_servers(address, "ip", "netns", "exec", BEYOND))
        yield


@pytest.fixture(scope="module")
def ground(contained: System, beyond: None) -> Iterator[Ground]:
    base, number = contained.subnet.removesuffix(".0/24"), contained.subnet.split(".")[1]
    host, host6 = f"{base}.1", f"fd77:{number}::1"
    _write_network(contained, f"fd77:{number}::/64")
    options = {
        "free": (),
        "denied": ("--egress", "deny"),
        "listed": ("--egress", f"{BEYOND_IP}:8001,[{BEYOND_IP6}]:8001"),
        "isolated": ("--isolate",),
        "neighbour": ("-p", f"127.0.0.1:{PUBLISHED}:8000"),
    }
    with ThreadPoolExecutor() as pool:
        ids = {}
        for name, words in options.items():
            script = HOLD_ABSTRACT + COMMAND[-1] if name == "neighbour" else COMMAND[-1]
            argv = ("--network", "both", *words, *COMMAND[:-1], script)
            ids[name] = pool.submit(contained.run, *argv)
    known = {name: one.result()[0] for name, one in ids.items()}
    states = contained.wait(list(known.values()), "running")
    assert set(states.values()) == {"running"}, contained.log()
    rows = contained.ls()
    made = {name: Sandbox(contained, one, *rows[one]["ips"]) for name, one in known.items()}
    with echo_servers(host), echo_servers(host6):
        yield Ground(contained, host, host6, **made)
    contained.clear()


def _write_network(system: System, subnet6: str) -> None:
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    system.network("both", ranges=[[{"subnet": system.subnet}], [{"subnet": subnet6}]], routes=routes)
    file = system.conf_dir / "both.conflist"
    document = json.loads(file.read_text())
    del document["plugins"][0]["ipam"]["subnet"]
    document["plugins"].append({"type": "portmap", "capabilities": {"portMappings": True}})
    file.write_text(json.dumps(document))


# -- the host's loopback -----------------------------------------------------------------------------


@pytest.mark.parametrize("user", USERS)
def test_no_socket_reaches_the_hosts_loopback(ground: Ground, user: str):
    """By none of the host's addresses, and by no way to name the link; a published port changes nothing."""
    localnet = Path(f"/proc/sys/net/ipv4/conf/{ground.system.bridge}/route_localnet")
    assert localnet.read_text() == "1\n", "else the kernel itself would drop it"
    own = {"own": ground.free.ip, "own6": ground.free.ip6}
    names = ["127.0.0.1", "127.0.0.2", "localhost", "0.0.0.0", "::1", "::ffff:127.0.0.1"]
    names += [ground.host, ground.host6, BEYOND_HOST, BEYOND_HOST6]
    with Ear(SECRET, "127.0.0.1", "127.0.0.2", "::1") as secret, Ear(HEARD, ground.host) as control:
        given = {"addresses": names, "port": SECRET, "control": (ground.host, HEARD), **own}
        sent = ground.free.tell(KNOCK, user=user, **given)
        assert sent >= 20, "datagrams leave without a word"
        due = {f"{kind} {ground.host} device 0" for kind in ("SOCK_DGRAM", "SOCK_STREAM")}
        ground.system.wait_until(lambda: due <= control.words(), 60, "honest words, sent last")
        assert secret.heard == []


def test_no_frame_reaches_the_hosts_loopback(ground: Ground):
    """What escapes the sandbox's kernel can send any. A rule that somebody took away comes back."""

    def send(words: str, source: str, target: str) -> None:
        to_mac = mac_of(ground.system.bridge)
        argv = ("python3", "-c", SEND, to_mac, "own", source, target, "plain", words)
        run("ip", "netns", "exec", ground.free.container_id, *argv)

    def reached_without_the_rule() -> bool:
        subprocess.run(["nft", "delete", "table", loopback.FAMILY, loopback.TABLE], check=False)
        send("open", ground.free.ip, "127.0.0.1")
        return "open" in secret.words()

    with Ear(SECRET, "127.0.0.1", ground.host) as secret:
        # The worker may be quicker.
        ground.system.wait_until(reached_without_the_rule, 60, "frame that arrives where no rule is")
        ground.system.wait_until(lambda: ground.system.audit() == [], 60, "rule that is loaded again")
        secret.heard.clear()
        send("evil", ground.free.ip, "127.0.0.1")
        send("evil", "127.0.0.5", "127.0.0.1")
        send("evil", "127.0.0.5", ground.host)  # who takes it for the host's own word
        send("good", ground.free.ip, ground.host)
        ground.system.wait_until(lambda: "good" in secret.words(), 60, "honest frame, sent last")
        assert secret.heard == [("good", ground.free.ip)]


def test_a_lost_rule_of_the_loopback_is_missing_and_mended(ground: Ground):
    """By the audit, too; the worker's look may come first."""
    table = f"table {loopback.FAMILY} {loopback.TABLE}"

    def is_told() -> bool:
        subprocess.run(["nft", "delete", *table.split()], check=False)
        return ground.system.audit() == [f"missing egress {table}"]

    ground.system.wait_until(is_told, 40, "finding of the audit")
    ground.system.cli("audit", "--mend", check=False)
    assert ground.system.audit() == []
    assert table in run("nft", "list", "tables")


def test_a_port_of_the_hosts_loopback_alone_is_the_hosts_alone(ground: Ground):
    """`-p 127.0.0.1:…`; the program behind it answers the host."""
    assert echoes_http("127.0.0.1", PUBLISHED)
    names = ("127.0.0.1", "localhost", ground.host, BEYOND_HOST, f"::ffff:{ground.host}")
    assert ground.free.tell(REACH, places=[("tcp", name, PUBLISHED) for name in names]) == []


def echoes_http(address: str, port: int) -> bool:
    with socket.create_connection((address, port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return client.recv(100).startswith(b"HTTP/1.0 200")


# -- other networks, other sandboxes, the metadata service -------------------------------------------


def test_whom_each_sandbox_reaches(ground: Ground):
    """TCP, UDP and ping, IPv4 and IPv6: the host, a machine beyond it, the metadata service, the others."""
    neighbour = ground.places(ground.neighbour.ip, ground.neighbour.ip6)
    host = ground.places(ground.host, ground.host6)
    machine = ground.places(BEYOND_IP, BEYOND_IP6)
    metadata = ground.places(METADATA, METADATA6)
    apart = ground.places(ground.isolated.ip, ground.isolated.ip6)
    answering = ground.places(ground.denied.ip, ground.denied.ip6)
    everybody = [*neighbour, *host, *machine, *metadata]

    def reached(one: Sandbox) -> list[Place]:
        places = [*everybody, *apart, *answering] if one is ground.free else everybody
        return [(name, ip, port) for name, ip, port in one.tell(REACH, places=places)]

    with ThreadPoolExecutor() as pool:
        free, denied, listed, isolated = pool.map(
            reached, (ground.free, ground.denied, ground.listed, ground.isolated)
        )
    assert free == [*everybody, *answering], "all but who is apart; who may send nothing answers"
    assert denied == []
    assert listed == [("tcp", BEYOND_IP, 8001), ("tcp", BEYOND_IP6, 8001)]
    assert isolated == [*host, *machine, *metadata]


# -- another's name, another's traffic ---------------------------------------------------------------


@pytest.fixture(scope="module")
def rulers(beyond: None) -> dict[str, str]:
    """What the attempts of RULE come to where one may do all of it: root of the host, in a netns."""
    name = "sbtruler"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        given = json.dumps({"neighbour": "203.0.113.7", "neighbour6": "2001:db8::7"})
        found: dict[str, str] = json.loads(
            run("ip", "netns", "exec", name, "python3", "-c", BEGIN + RULE, given)
        )
        return found
    finally:
        run("ip", "netns", "del", name)


@pytest.mark.parametrize("user", USERS)
def test_nobody_takes_anothers_address_or_listens_to_all(ground: Ground, rulers: dict[str, str], user: str):
    """Each attempt is refused inside, and done by who may."""
    assert {name for name, result in rulers.items() if result != "done"} == set(), rulers
    shown = run("ip", "netns", "exec", ground.free.container_id, "ip", "-j", "-d", "addr", "show", "eth0")
    others = {"neighbour": ground.neighbour.ip, "neighbour6": ground.neighbour.ip6}
    with Ear(HEARD, ground.host, ground.host6) as control:
        given = {"host": ground.host, "host6": ground.host6, "port": HEARD}
        found = ground.free.tell(RULE, user=user, **others, **given)
        ground.system.wait_until(
            lambda: sum(words == "as itself" for words, _ in control.heard) == 2, 60, "honest words"
        )
        assert {source for _, source in control.heard} == {ground.free.ip, ground.free.ip6}
    assert set(found) == {*rulers, "TUNSETIFF"}
    assert {name: result for name, result in found.items() if not result.startswith("refused: ")} == {}
    assert (
        run("ip", "netns", "exec", ground.free.container_id, "ip", "-j", "-d", "addr", "show", "eth0")
        == shown
    )
    neighbour = [*targets(ground.neighbour.ip), *targets(ground.neighbour.ip6)]
    assert [echoes(one) for one in neighbour] == [True] * 4


def test_others_traffic_does_not_come_by(ground: Ground):
    """Counted by the sandbox's own link: what others send each other, and what is sent to itself."""
    count, size = 60, 1000

    def send(target: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _ in range(count):
                probe.sendto(bytes(size), (target, HEARD))

    assert all(echoes(targets(one.ip)[0]) for one in (ground.neighbour, ground.denied)), (
        "the bridge knows them"
    )
    counts = [ground.free.tell(RECEIVED)]
    send(ground.neighbour.ip)
    ground.neighbour.tell(SPRAY, target=ground.denied.ip, port=HEARD, count=count, size=size)
    counts.append(ground.free.tell(RECEIVED))
    send(ground.free.ip)
    counts.append(ground.free.tell(RECEIVED))
    assert counts[1] - counts[0] < count * size / 2
    assert counts[2] - counts[1] >= count * size


# -- beside the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", USERS)
def test_neither_abstract_sockets_nor_other_families_lead_out(ground: Ground, user: str):
    """An abstract socket is its own sandbox's: the host's is not there, nor that of a neighbour."""
    here, there = f"{ABSTRACT}-host", f"{ABSTRACT}-inside"
    theirs = ground.neighbour.tell(BESIDES, abstract=[there, here])
    assert theirs[there] == "done", "the neighbour has one"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as client:
        abstract.bind(f"\0{here}")
        abstract.listen(10)
        client.connect(f"\0{here}")  # the host has one
        hidden = ground.free.tell(BESIDES, user=user, abstract=[here, there])
    assert {name: result for name, result in hidden.items() if not result.startswith("refused: ")} == {}


def test_inside_sees_its_own_links_alone(ground: Ground):
    """The gateway is all that it knows of the host; by no file, by no dump of netlink."""
    seen = ground.free.tell(OVERLOOK)
    assert seen["links"] == seen["interfaces"] == ["eth0", "lo"]
    mac = mac_of("eth0", "ip", "netns", "exec", ground.free.container_id)
    assert seen["macs"] == sorted(["00:00:00:00:00:00", mac])
    own = {"127.0.0.1", "::1", ground.free.ip, ground.free.ip6}
    assert {one for one in seen["addresses"] if not one.startswith("fe80:")} == own
    assert seen["gateways"] == sorted([ground.host, ground.host6])
    assert set(seen["neighbours"]) <= {ground.host, ground.host6, ground.neighbour.ip, ground.neighbour.ip6}
    words = [*_names_of_the_host(), *_written(ground.neighbour.ip), *_written(BEYOND_HOST)]
    words += [*_written(ground.neighbour.ip6), *_written(BEYOND_HOST6)]
    shown = {path: text.lower() for path, text in seen["files"].items()}
    assert {(path, word) for path, text in shown.items() for word in words if word in text} == set()
    assert _written(ground.host)[1] in shown["/proc/net/route"], "so it would be written"


def _names_of_the_host() -> list[str]:
    """Its links but those whose names a sandbox has as well, with their MACs."""
    links = [one for one in json.loads(run("ip", "-j", "link")) if one["ifname"] not in ("lo", "eth0")]
    macs = [one["address"] for one in json.loads(run("ip", "-j", "link")) if one["ifname"] != "lo"]
    return [*(one["ifname"].lower() for one in links), *macs]


def _written(address: str) -> list[str]:
    """As people write it, and as /proc/net does."""
    if ":" in address:
        return [address, socket.inet_pton(socket.AF_INET6, address).hex()]
    return [address, socket.inet_aton(address)[::-1].hex()]
