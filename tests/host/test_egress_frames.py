"""The rules against frames that no well-behaved sandbox sends, from plain processes in netns of our own.

What escapes the sandbox's kernel can put any frame on its link: the policy is for these, too.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.machine import difference, snapshot
from tests.host.probes import echo_servers, echoes, run, targets
from worker import egress, nft
from worker.egress_rules import Link, load_text, ruleset, unload_text
from worker.errors import BadInput

HELD, OTHER = "sb-00000000000000e1", "sb-00000000000000e2"
BRIDGE, GATEWAY, GATEWAY6 = "sbtframe0", "10.148.0.1", "fd48::1"
IPS = {HELD: ("10.148.0.2", "fd48::2"), OTHER: ("10.148.0.3", "fd48::3")}
HOST_END = {HELD: "sbtframe1", OTHER: "sbtframe2"}

# Sends one UDP datagram in a frame of its own making: MAC and IP of both ends, with a VLAN tag or not.
SEND = """
import socket, struct, sys
to_mac, from_mac, source, target, tag, words = sys.argv[1:]
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
    link.bind(("eth0", 0))
    own = link.getsockname()[4]
    udp = struct.pack("!HHHH", 1111, 7777, 12, 0) + words.encode()
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    ip += socket.inet_aton(source) + socket.inet_aton(target)
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    mac = own if from_mac == "own" else bytes.fromhex(from_mac.replace(":", ""))
    kind = bytes.fromhex("81000005") if tag == "tagged" else b""
    link.send(bytes.fromhex(to_mac.replace(":", "")) + mac + kind + bytes.fromhex("0800") + ip + udp)
"""


@pytest.fixture
def bridge(host_parts: None) -> Iterator[None]:
    """Two netns on a bridge, as CNI makes them, IPv4 and IPv6; nothing of them is left."""
    before = snapshot()
    with contextlib.ExitStack() as stack:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        stack.callback(run, "ip", "link", "del", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        run("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        run("ip", "addr", "add", f"{GATEWAY6}/64", "dev", BRIDGE, "nodad")
        for name, (ip, ip6) in IPS.items():
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name)
            end = HOST_END[name]
            run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(run, "ip", "link", "del", end)  # the netns takes its time
            run("ip", "link", "set", end, "master", BRIDGE, "up")
            run("ip", "-n", name, "addr", "add", f"{ip}/24", "dev", "eth0")
            run("ip", "-n", name, "addr", "add", f"{ip6}/64", "dev", "eth0", "nodad")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "route", "add", "default", "via", GATEWAY)
        yield
    assert difference(before, snapshot()) == {}


@contextlib.contextmanager
def policy(rules: list[str] | None, *, isolate: bool = False) -> Iterator[list[Link]]:
    """The policy of `HELD`, as the stage loads and removes it."""
    links = egress.links_of(HELD)
    made = ruleset(HELD, links, rules, isolate)
    nft.load(load_text(made))
    try:
        yield links
    finally:
        nft.load(unload_text(made))
        nft.drop_empty_tables()


def inside(name: str, script: str, *args: str) -> str:
    return run("ip", "netns", "exec", name, "python3", "-c", script, *args)


def reached(name: str, tried: list[tuple[str, str, int]]) -> list[bool]:
    script = (
        "import ast, sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from tests.host.probes import echoes\n"
        "with ThreadPoolExecutor() as pool: print(list(pool.map(echoes, ast.literal_eval(sys.argv[1]))))"
    )
    argv = ["ip", "netns", "exec", name, "env", f"PYTHONPATH={Path(__file__).parents[2]}"]
    done = run(*argv, sys.executable, "-c", script, repr(tried))
    return [word == "True" for word in done.strip("[]\n").split(", ")]


@contextlib.contextmanager
def listening(*prefix: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Something that waits for one datagram on port 7777 and says what is in it: the first that arrives."""
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 7777)); "
        "print('up', flush=True); print(s.recv(10).decode(), flush=True)"
    )
    process = subprocess.Popen([*prefix, "python3", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def mac_of(link: str, *prefix: str) -> str:
    return str(json.loads(run(*prefix, "ip", "-j", "link", "show", link))[0]["address"])


def frame(
    words: str, to_mac: str, source: str, target: str, *, from_mac: str = "own", tag: str = "plain"
) -> None:
    """Of four letters, so that the one that arrives can be told from the others."""
    inside(HELD, SEND, to_mac, from_mac, source, target, tag, words)


def denied(family: str = "bridge") -> int:
    """How many packets the sandbox's rules have refused in all."""
    text = run("nft", "list", "table", family, "sandbatch")
    lines = [line.split() for line in text.splitlines() if "goto denied" in line]
    return sum(int(words[words.index("packets") + 1]) for words in lines)


def test_the_links_are_those_of_the_kernel(bridge: None) -> None:
    """Not those that a CNI result names."""
    (link,) = egress.links_of(HELD)
    assert (link.name, link.host_end, link.bridge) == ("eth0", HOST_END[HELD], BRIDGE)
    assert {"10.148.0.2/24", "fd48::2/64"} < set(link.addresses)
    assert set(link.neighbours) == {f"{GATEWAY}/24", f"{GATEWAY6}/64"}
    assert link.mac == mac_of("eth0", "ip", "netns", "exec", HELD)


def test_a_frame_under_another_name_does_not_pass(bridge: None) -> None:
    """The host is allowed, but only for who it is; the last frame, an honest one, is what arrives."""
    host = mac_of(BRIDGE)
    with policy([f"{GATEWAY}"]), listening() as host_side:
        frame("as_b", host, IPS[OTHER][0], GATEWAY)
        frame("mac_", host, IPS[HELD][0], GATEWAY, from_mac="02:00:00:00:00:99")
        frame("vlan", host, IPS[HELD][0], GATEWAY, tag="tagged")
        assert denied() >= 3
        frame("good", host, IPS[HELD][0], GATEWAY)
        assert host_side.stdout is not None
        assert host_side.stdout.readline().strip() == b"good"


@pytest.mark.parametrize("last", ["00", "03", "0e"])
def test_a_reserved_multicast_address_is_no_way_past_the_bridge(bridge: None, last: str) -> None:
    """Such frames reach the host's IP stack past every hook of the bridge: the inet table drops them."""
    to_mac = f"01:80:c2:00:00:{last}"
    with listening() as host_side:
        with policy([]):
            frame("held", to_mac, IPS[HELD][0], GATEWAY)
            assert denied("inet") + denied() >= 1
        frame(
            "good", mac_of(BRIDGE), IPS[HELD][0], GATEWAY
        )  # the policy is gone: an honest one arrives, first
        assert host_side.stdout is not None
        assert host_side.stdout.readline().strip() == b"good"


def test_an_acknowledgement_out_of_nothing_is_no_reply(bridge: None) -> None:
    """It opens no connection, but carries data to who never asked."""
    script = SEND.replace(
        'struct.pack("!HHHH", 1111, 7777, 12, 0)',
        'struct.pack("!HHIIBBHHH", 1111, 7777, 1, 1, 0x50, 0x10, 512, 0, 0)',
    ).replace("64, 17, 0", "64, 6, 0")
    assert script.count("0x10") == 1
    with policy([]):
        before = denied()
        inside(HELD, script, mac_of(BRIDGE), "own", IPS[HELD][0], GATEWAY, "plain", "sent")
        assert denied() == before + 1


def test_isolation_holds_through_the_hosts_routing(bridge: None) -> None:
    """A packet for a sibling, sent to the gateway's MAC, would come back out of the bridge."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")  # as the bridge plugin sets it
    gateway, sibling = mac_of(BRIDGE), IPS[OTHER][0]
    with listening("ip", "netns", "exec", OTHER) as there:
        with policy(None, isolate=True):
            frame("held", gateway, IPS[HELD][0], sibling)
            assert denied() >= 1
        frame("good", gateway, IPS[HELD][0], sibling)
        assert there.stdout is not None
        assert there.stdout.readline().strip() == b"good"


def test_ipv6_is_held_as_ipv4_is(bridge: None) -> None:
    """Neighbours are found, what is allowed passes, the rest does not; and replies do."""
    other6 = IPS[OTHER][1]
    with echo_servers(other6, "ip", "netns", "exec", OTHER), echo_servers(GATEWAY6):
        everywhere = [*targets(other6), *targets(GATEWAY6)]
        assert reached(HELD, everywhere) == [True] * 4
        with policy([f"[{other6}]:8001", f"[{GATEWAY6}]:5353/udp"]):
            assert reached(HELD, everywhere) == [True, False, False, True]
        with policy(None, isolate=True):
            assert reached(HELD, everywhere) == [False, False, True, True]
        with policy([]), echo_servers(IPS[HELD][1], "ip", "netns", "exec", HELD):
            assert [echoes(one) for one in targets(IPS[HELD][1])] == [True, True]
            assert reached(OTHER, targets(IPS[HELD][1])) == [True, True]


def test_what_the_bandwidth_plugin_shapes_is_held_too(bridge: None) -> None:
    """Its ifb device brings packets back behind the netdev ingress hook: no policy can be there."""
    run("ip", "link", "add", "sbtframe9", "type", "ifb")
    try:
        run("ip", "link", "set", "sbtframe9", "up")
        run("tc", "qdisc", "add", "dev", HOST_END[HELD], "ingress")
        redirect = "parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev sbtframe9"
        run("tc", "filter", "add", "dev", HOST_END[HELD], *redirect.split())
        with echo_servers(GATEWAY):
            assert reached(HELD, targets(GATEWAY)) == [True, True]
            with policy([f"{GATEWAY}:8001"]):
                assert reached(HELD, targets(GATEWAY)) == [True, False]
    finally:
        run("ip", "link", "del", "sbtframe9")


def test_large_datagrams_pass_in_their_fragments_where_they_are_allowed(bridge: None) -> None:
    """Only the first fragment has a port."""
    large = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)\n"
    large += "s.sendto(b'x' * 4000, (sys.argv[1], 5353))\n"
    large += "try:\n print(len(s.recvfrom(100)[0]))\nexcept TimeoutError:\n print('none')"
    with echo_servers(GATEWAY):
        with policy([f"{GATEWAY}:5353/udp"]):
            assert inside(HELD, large, GATEWAY).strip() == "100"
        with policy([f"{GATEWAY}:5354/udp"]):
            assert inside(HELD, large, GATEWAY).strip() == "none"


def test_a_link_without_an_end_here_is_refused(bridge: None) -> None:
    """The kernel's word, where the plugin's type said nothing."""
    run("ip", "-n", HELD, "link", "add", "eth1", "type", "veth", "peer", "name", "away")
    with pytest.raises(BadInput, match="it has no end on the host"):
        egress.links_of(HELD)


def test_sets_hold_who_has_spoken(bridge: None) -> None:
    """Each for its time: an opened connection, a datagram."""
    with policy([]), echo_servers(IPS[HELD][0], "ip", "netns", "exec", HELD):
        assert [echoes(one) for one in targets(IPS[HELD][0])] == [True, True]
        for kind, words in (("tcp", "8001"), ("udp", "5353")):
            text = run("nft", "list", "set", "bridge", "sandbatch", f"{HELD}-eth0-{kind}")
            assert f"{GATEWAY} . " in text
            assert words in text
