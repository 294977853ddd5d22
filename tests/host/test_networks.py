"""Published ports, several networks, addresses and rates as asked for: real plugins, real netstack."""

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

from tests.host.system import SERVER, System
from worker.audit import chain_name

PORT = 28080


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def fetch(address: str, port: int) -> bytes:
    return bytes(urllib.request.urlopen(f"http://{address}:{port}/", timeout=5).read())


def write_network(system: System, name: str, subnet: str, *, bridge: str, more: tuple[str, ...] = ()) -> None:
    """A bridge that takes addresses and MACs, with portmap, bandwidth and `more` behind it."""
    system.network(name, subnet=subnet)
    file = system.conf_dir / f"{name}.conflist"
    document = json.loads(file.read_text())
    document["plugins"][0] |= {"bridge": bridge, "capabilities": {"ips": True, "mac": True}}
    document["plugins"] += [
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        *({"type": one} for one in more),
    ]
    file.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def networks(system: System) -> Iterator[str]:
    """`able` on the system's bridge, `second` on one of its own; how the addresses of the first begin."""
    base = system.subnet.removesuffix(".0/24")
    write_network(system, "able", system.subnet, bridge=system.bridge)
    write_network(system, "second", "10.249.7.0/24", bridge="sbtsecond")
    yield base
    subprocess.run(["ip", "link", "del", "sbtsecond"], check=False, capture_output=True)


@pytest.fixture
def outside(networks: str) -> Iterator[tuple[str, str]]:
    """A netns that is another machine: its name, and the host's address on the link between."""
    sh("ip", "netns", "add", "sbtoutside")
    sh("ip", "link", "add", "sbtout", "type", "veth", "peer", "name", "eth0", "netns", "sbtoutside")
    sh("ip", "addr", "add", "10.249.8.1/24", "dev", "sbtout")
    sh("ip", "link", "set", "sbtout", "up")
    sh("ip", "-n", "sbtoutside", "addr", "add", "10.249.8.2/24", "dev", "eth0")
    sh("ip", "-n", "sbtoutside", "link", "set", "eth0", "up")
    yield "sbtoutside", "10.249.8.1"
    sh("ip", "netns", "del", "sbtoutside")
    with contextlib.suppress(subprocess.CalledProcessError):  # it goes with its other end, a little later
        sh("ip", "link", "del", "sbtout")


def why_failed(system: System, *args: str) -> str:
    """Launch one sandbox that must fail in stage network, with everything undone; the words."""
    (container_id,) = system.run(*args, "--", "sleep", "600")
    assert system.wait([container_id], "terminal") == {container_id: "failed"}
    error = system.show(container_id)["error"]
    assert error["stage"] == "network"
    return str(error["message"])


def test_a_web_server_is_published_and_fetched_through_the_hosts_port(
    clean_system: System, outside: tuple[str, str]
):
    """By the loopback, by an address of the host, and from outside; afterwards nothing of it is left."""
    netns, host_ip = outside
    options = ("--network", "able", "-p", f"{PORT}:8000", "-p", f"{host_ip}:{PORT + 1}:8000", "-p", "8000")
    (container_id,) = clean_system.run(*options, "--wait", *SERVER)

    row = clean_system.show(container_id)
    chosen = row["publish"][2]["host_port"]
    assert 20000 <= chosen <= 29999
    assert row["publish"][:2] == [
        {"host_ip": None, "host_port": PORT, "port": 8000, "protocol": "tcp"},
        {"host_ip": host_ip, "host_port": PORT + 1, "port": 8000, "protocol": "tcp"},
    ]
    pages = [fetch("127.0.0.1", PORT), fetch(host_ip, PORT), fetch(host_ip, PORT + 1), fetch(host_ip, chosen)]
    assert pages == [b"Hello World!\n"] * 4
    curl = ("curl", "-sS", "--max-time", "5", f"http://{host_ip}:{PORT}/")
    assert sh("ip", "netns", "exec", netns, *curl) == "Hello World!\n"
    with pytest.raises(OSError, match="refused"):  # only the address that was named
        fetch("127.0.0.1", PORT + 1)
    assert f"{PORT}->8000/tcp" in clean_system.cli("ls").stdout
    assert f"{chosen}->8000/tcp" in clean_system.cli("show", container_id).stdout
    assert clean_system.audit() == []
    found = json.loads(clean_system.cli("audit", "--deep", "--json").stdout)
    assert {one["problem"] for one in found} == {"expected"}

    clean_system.cli("rm", container_id)
    assert chain_name("able", container_id, "DN-") not in sh("iptables-save", "-t", "nat")
    assert list((clean_system.run_dir / "ports").iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        fetch("127.0.0.1", PORT)


def test_on_two_networks_both_links_work_and_one_leads_out(clean_system: System, networks: str):
    """eth0 has what was asked for and the default route; netstack inside sees it so."""
    wanted, mac = f"{networks}.77", "02:00:00:00:00:07"
    script = "ip -o addr; ip route; exec python3 -m http.server 8000"
    (container_id,) = clean_system.run(
        *("--network", f"able:ip={wanted},mac={mac}", "--network", "second", "--ready", "tcp:8000"),
        *("--cwd", "/var/www/html", "--wait", "--", "sh", "-c", script),
    )

    row = clean_system.show(container_id)
    assert (row["ip"], row["networks"]) == (wanted, ["able", "second"])
    second = row["ips"][1]
    assert [(one["if_name"], one["ips"]) for one in row["links"]] == [("eth0", [wanted]), ("eth1", [second])]
    assert [fetch(address, 8000) for address in (wanted, second)] == [b"Hello World!\n"] * 2
    inside = (clean_system.sandboxes / container_id / "container.log").read_text()
    assert re.findall(r"eth0 +inet (\S+)", inside) == [f"{wanted}/24"]
    assert re.findall(r"eth1 +inet (\S+)", inside) == [f"{second}/24"]
    assert re.findall(r"default via (\S+) dev (\S+)", inside) == [(f"{networks}.1", "eth0")]
    assert mac in sh("ip", "-n", container_id, "link", "show", "eth0")
    assert f"eth1 {second} (second)" in clean_system.cli("show", container_id).stdout
    assert clean_system.audit() == []


def test_a_port_that_is_taken_is_refused_in_words_and_undone(clean_system: System, networks: str):
    """Of two that ask for one port the second fails; nor is it taken from a program of the host."""
    ids = clean_system.run("--count", "2", "--network", "able", "-p", f"{PORT}:8000", *SERVER)
    states = clean_system.wait(ids, "running")
    assert sorted(states.values()) == ["failed", "running"]
    winner, loser = sorted(ids, key=lambda one: states[one], reverse=True)
    error = clean_system.show(loser)["error"]
    assert error["message"].startswith(f"port {PORT}/tcp: is taken by {winner}; ")
    assert fetch("127.0.0.1", PORT) == b"Hello World!\n"

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = why_failed(clean_system, "--network", "able", "-p", f"{port}:80", "-p", "80")
    assert words.startswith(f"port {port}/tcp: is taken by another program of the host; ")
    assert clean_system.audit() == []


def test_an_address_outside_the_range_or_taken_fails_in_the_plugins_words(
    clean_system: System, networks: str
):
    wanted = f"{networks}.78"
    clean_system.run("--network", f"able:ip={wanted}", "--wait", "--", "sleep", "600")
    taken = why_failed(clean_system, "--network", f"able:ip={wanted}", "-p", f"{PORT}:80")
    assert f"requested IP address {wanted} is not available" in taken
    assert "10.1.2.3" in why_failed(clean_system, "--network", "able:ip=10.1.2.3")
    assert clean_system.audit() == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            ("-p", "80"),
            "network bridged: publishes no ports: its list lacks a plugin with the capability port",
        ),
        (("--network", "able", "--network", "bridged:ip=10.0.0.2"), "bridged: takes no address"),
        (("--network", "able", "--network", "nowhere"), "network nowhere: "),
    ],
)
def test_what_no_plugin_advertises_is_refused_before_anything_is_made(
    clean_system: System, networks: str, option: tuple[str, ...], words: str
):
    done = clean_system.cli("run", *option, "--", "true", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_bandwidth_is_limited_both_ways_and_leaves_no_link(clean_system: System, networks: str):
    """What goes out goes through a link of the plugin's own, beside the veth."""
    script = (
        "import socket\nserver = socket.create_server(('0.0.0.0', 9000))\n"
        "server.accept()\n"  # the probe
        "server.accept()[0].sendall(bytes(2_500_000))\nserver.accept()"  # netstack goes with its program
    )
    options = ("--network", "able", "--bandwidth", "in=20m,out=10m", "--ready", "tcp:9000", "--wait")
    (container_id,) = clean_system.run(*options, "--", "python3", "-c", script)

    shapers = [line for line in sh("tc", "qdisc").splitlines() if "tbf" in line]
    assert [re.findall(r"dev (veth|bwp)\w+ .* rate (\w+)", one)[0] for one in shapers] == [
        ("veth", "20Mbit"),
        ("bwp", "10Mbit"),
    ]
    began = time.monotonic()
    with socket.create_connection((clean_system.show(container_id)["ip"], 9000), timeout=10) as one:
        received = 0
        while received < 2_500_000:
            received += len(one.recv(65536))
    took_s = time.monotonic() - began
    assert 1.5 < took_s < 10, "20 Mbit at 10 Mbit/s are 2 s"
    assert clean_system.audit() == []

    clean_system.cli("rm", container_id)
    assert "bwp" not in sh("ip", "link")


def test_a_second_network_that_fails_takes_the_first_with_it(clean_system: System, networks: str):
    """DEL of both, last to first, each with the configuration of its own ADD."""
    clean_system.faulty_plugin("ADD exit1")
    write_network(clean_system, "faulty", "10.249.7.0/24", bridge="sbtsecond", more=("faulty",))
    options = ("--network", "able", "--network", "faulty", "-p", f"{PORT}:80", "--bandwidth", "out=10m")
    assert "no such moon" in why_failed(clean_system, *options)
    assert (clean_system.plugins / "calls").read_text().split()[-2:] == ["ADD", "DEL"]
    assert clean_system.audit() == []
    assert "bwp" not in sh("ip", "link")


def test_rm_leaves_nothing_where_everything_was_taken_away_before(clean_system: System, networks: str):
    """As after a reboot: rules, links, reservations and netns are gone, leases not."""
    options = (
        "--network",
        "able",
        "--network",
        "second",
        "-p",
        f"{PORT}:80",
        "--bandwidth",
        "in=10m,out=10m",
    )
    (container_id,) = clean_system.run(*options, "--wait", "--", "sleep", "600")
    sh("ip", "netns", "del", container_id)
    for link in re.findall(r"(bwp\w+)", sh("ip", "-o", "link", "show", "type", "ifb")):
        sh("ip", "link", "del", link)
    for path in (clean_system.run_dir / "ports").iterdir():
        path.unlink()
    found = " ".join(clean_system.audit())
    assert all(f"missing {kind}" in found for kind in ("netns", "ifb", "port"))
    subprocess.run("iptables -t nat -F && iptables -t nat -X", shell=True, check=True)  # noqa: S602

    clean_system.cli("rm", container_id)
    assert clean_system.show(container_id)["state"] == "exited"


def test_a_published_sandbox_whose_journal_is_lost_is_undone(make_system):
    """Each part of it is found without a journal, and removed."""
    system = make_system()
    write_network(system, "able", system.subnet, bridge=system.bridge)
    system.start()
    options = ("--network", "able", "-p", f"{PORT}:80", "--bandwidth", "out=10m")
    (container_id,) = system.run(*options, "--wait", "--", "sleep", "600")
    system.stop()
    (system.sandboxes / container_id / "journal.jsonl").unlink()

    outcomes = json.loads(system.cli("audit", "--mend", "--json").stdout)

    assert {"port", "ifb", "nat chain", "lease", "cni cache"} <= {one["kind"] for one in outcomes}
    assert all(one["mended"] for one in outcomes), outcomes
    assert chain_name("able", container_id, "DN-") in {one["name"] for one in outcomes}
    assert system.audit() == []


@pytest.mark.parametrize(
    "point",
    ["journal.facts.before", "cni.portmap.ADD.after", "cni.portmap.DEL.before"],
)
def test_killed_in_the_middle(make_system, point: str):
    """kill -9 of the worker: the next one takes the sandbox up or ends it, and its port is its own."""
    system = make_system(SANDBATCH_ALLOW_FAULTS="1", SANDBATCH_FAULTS=f"{point}:kill")
    write_network(system, "able", system.subnet, bridge=system.bridge)
    system.start()
    options = ("--network", "able", "-p", f"{PORT}:8000", "--bandwidth", "out=10m")
    (container_id,) = system.run(*options, *SERVER)
    if "DEL" in point:
        system.wait([container_id], "running")
        system.cli("rm", "--no-wait", container_id)
    system.wait_for_end()
    system.env["SANDBATCH_FAULTS"] = ""
    system.start()
    if "DEL" in point:
        assert system.wait([container_id], "terminal") == {container_id: "exited"}
    else:
        assert system.wait([container_id], "running") == {container_id: "running"}
        assert fetch("127.0.0.1", PORT) == b"Hello World!\n"
        assert system.audit() == []
        system.cli("rm", container_id)
    assert system.audit() == []
    assert list((system.run_dir / "ports").iterdir()) == []


def test_names_are_those_of_the_network_and_the_spec(clean_system: System, networks: str):
    """A name server on the bridge's own address answers a sandbox's libc; hosts has what the spec names."""
    file = clean_system.conf_dir / "named.conflist"
    document = json.loads((clean_system.conf_dir / "second.conflist").read_text()) | {"name": "named"}
    document["plugins"][0]["dns"] = {"nameservers": ["10.249.7.1"], "search": ["sbt.example"]}
    file.write_text(json.dumps(document))
    script = "getent hosts $(hostname) extra; while ! getent hosts there; do sleep 0.1; done; exec sleep 600"
    (container_id,) = clean_system.run(
        *("--network", "named", "--add-host", "extra:192.0.2.9", "--wait", "--", "sh", "-c", script)
    )
    log = clean_system.sandboxes / container_id / "container.log"
    with answering("10.249.7.1", "there.sbt.example", "192.0.2.53"):
        clean_system.wait_until(lambda: "192.0.2.53" in log.read_text(), 20, "answer from inside")
    row = clean_system.show(container_id)
    lines = [line.split(" F ")[1].split() for line in log.read_text().splitlines() if " F " in line]
    assert [row["ip"], container_id] in lines
    assert ["192.0.2.9", "extra"] in lines


@contextlib.contextmanager
def answering(address: str, name: str, ip: str) -> Iterator[None]:
    """A name server for one name, until the block ends."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))

        def serve() -> None:
            while True:
                query, client = server.recvfrom(512)
                if query == b"stop":
                    return
                end = query.index(b"\0", 12) + 1
                is_known = query[12:end] == question and query[end : end + 2] == b"\0\1"  # an A record
                body = query[:2] + (b"\x81\x80" if is_known else b"\x81\x83") + b"\0\1"
                body += bytes([0, int(is_known), 0, 0, 0, 0]) + query[12 : end + 4]
                if is_known:
                    body += b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(ip)
                server.sendto(body, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stop:
                stop.sendto(b"stop", (address, 53))
            thread.join()
