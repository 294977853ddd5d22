"""Ports of the host: taken by one sandbox at a time, and never from a program that listens."""

import os
import socket
import threading

import pytest

from worker import ports
from worker.errors import SandbatchError
from worker.settings import Settings
from worker.spec_parts import Publish

ONE, TWO = "sb-1111111111111111", "sb-2222222222222222"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(run_dir=tmp_path / "run", publish_ports="29000-29003")


def asked(port: int = 80, **fields: object) -> Publish:
    return Publish(port=port, **fields)


def test_what_is_reserved_is_returned_as_show_has_it(settings):
    got = ports.reserve(
        settings, ONE, [asked(80, host_port=28080), asked(53, host_port=28053, protocol="udp")]
    )
    assert got == [
        {"host_ip": None, "host_port": 28080, "port": 80, "protocol": "tcp"},
        {"host_ip": None, "host_port": 28053, "port": 53, "protocol": "udp"},
    ]
    assert ports.reserved(settings) == dict.fromkeys(ports.reservations(settings, got), ONE)


@pytest.mark.parametrize(
    ("first", "second", "is_taken"),
    [
        (None, None, True),
        (None, "127.0.0.1", True),
        ("127.0.0.1", None, True),
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "::1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "::", False),
        ("127.0.0.1", "::1", False),
    ],
)
def test_addresses_overlap_as_the_rules_would(settings, first, second, is_taken):
    """Every address of the host includes each of them; a family is not the other."""
    ports.reserve(settings, ONE, [asked(host_port=28080, host_ip=first)])
    if not is_taken:
        ports.reserve(settings, TWO, [asked(host_port=28080, host_ip=second)])
        return
    with pytest.raises(SandbatchError, match=f"port 28080/tcp.*: is taken by {ONE}"):
        ports.reserve(settings, TWO, [asked(host_port=28080, host_ip=second)])


def test_one_protocols_port_is_not_the_others(settings):
    ports.reserve(settings, ONE, [asked(host_port=28080)])
    ports.reserve(settings, TWO, [asked(host_port=28080, protocol="udp")])


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
@pytest.mark.parametrize("ip", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_a_program_has_is_taken(settings, kind, protocol, ip):
    """portmap's rule would take its traffic away, on the loopback, too."""
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind((ip, 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            SandbatchError, match=f"port {port}/{protocol}: is taken by another program of the"
        ):
            ports.reserve(settings, ONE, [asked(host_port=port, protocol=protocol)])
    assert ports.reserved(settings) == {}


SAVED = """*nat
:CNI-DN-0123456789abcdef01234 - [0:0]
-A CNI-DN-0123456789abcdef01234 -s 10.88.0.0/16 -p tcp -m tcp --dport 28080 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-0123456789abcdef01234 -p tcp -m tcp --dport 28080 -j DNAT --to-destination 10.88.0.9:80
-A NETAVARK-DN-1 -d 127.0.0.1/32 -p udp -m udp --dport 28053 -j DNAT --to-destination 10.89.0.9:53
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 28080,28081 -j CNI-DN-0123456789abcdef01234
COMMIT
"""


@pytest.mark.parametrize(
    ("wanted", "chain"),
    [
        ({"host_port": 28080}, "CNI-DN-0123456789abcdef01234"),
        ({"host_port": 28080, "host_ip": "127.0.0.1"}, "CNI-DN-0123456789abcdef01234"),
        ({"host_port": 28053, "protocol": "udp"}, "NETAVARK-DN-1"),
        ({"host_port": 28053, "protocol": "udp", "host_ip": "0.0.0.0"}, "NETAVARK-DN-1"),
        ({"host_port": 28053, "protocol": "udp", "host_ip": "::1"}, None),
        ({"host_port": 28053}, None),
        ({"host_port": 28081}, None),
    ],
)
def test_a_port_that_another_runtime_forwards_is_taken(settings, monkeypatch, tmp_path, wanted, chain):
    """podman's rule is no listener; of two rules the last would win."""
    (tmp_path / "saved").write_text(SAVED)
    (tmp_path / "iptables-save").write_text(f"#!/bin/sh\ncat {tmp_path}/saved\n")
    (tmp_path / "iptables-save").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if chain is None:
        ports.reserve(settings, ONE, [asked(**wanted)])
        return
    with pytest.raises(SandbatchError, match=rf"is taken by a rule of the host's iptables \(chain {chain}\)"):
        ports.reserve(settings, ONE, [asked(**wanted)])


def test_an_address_that_the_host_has_not_is_named(settings):
    with pytest.raises(
        SandbatchError, match=r"port 28080/tcp on 192\.0\.2\.1: this host has no such address"
    ):
        ports.reserve(settings, ONE, [asked(host_port=28080, host_ip="192.0.2.1")])


def test_without_a_host_port_a_free_one_of_the_range_is_chosen(settings):
    """Reserved ones and those of programs are passed over; when none is left, the setting is named."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 29001))
        other.listen()
        got = [ports.reserve(settings, f"sb-{n:016x}", [asked()])[0]["host_port"] for n in range(3)]
        assert sorted(got) == [29000, 29002, 29003]
        with pytest.raises(SandbatchError, match="none of 29000-29003 is free for tcp; set SANDBATCH_"):
            ports.reserve(settings, TWO, [asked()])


def test_what_is_named_is_taken_before_what_is_chosen(settings):
    """Else the choice could fall on a port that the same spec names."""
    got = ports.reserve(settings, ONE, [*[asked(n) for n in (1, 2, 3)], asked(4, host_port=29002)])
    assert sorted(one["host_port"] for one in got) == [29000, 29001, 29002, 29003]
    assert got[3]["host_port"] == 29002


def test_a_sandbox_that_is_started_anew_keeps_its_ports_where_it_can(settings):
    before = ports.reserve(settings, ONE, [asked(80), asked(81)])
    for _ in range(5):
        ports.release(settings, ONE)
        assert ports.reserve(settings, ONE, [asked(80), asked(81)], before) == before
    ports.release(settings, ONE)
    ports.reserve(settings, TWO, [asked(80, host_port=before[0]["host_port"])])
    after = ports.reserve(settings, ONE, [asked(80), asked(81)], before)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_what_a_killed_attempt_has_reserved_is_its_own(settings):
    """The same sandbox comes again, and does not find itself in the way."""
    ports.reserve(settings, ONE, [asked(host_port=28080), asked(host_port=28081)])
    ports.reserve(settings, ONE, [asked(host_port=28080)])
    assert [os.path.basename(path) for path in ports.reserved(settings)] == ["tcp-*-28080"]


def test_release_takes_only_ones_own_and_may_be_repeated(settings):
    ports.release(settings, ONE)  # nothing was ever reserved here
    ports.reserve(settings, ONE, [asked(host_port=28080)])
    ports.reserve(settings, TWO, [asked(host_port=28081)])
    for _ in range(2):
        ports.release(settings, ONE)
        assert list(ports.reserved(settings).values()) == [TWO]


def test_of_many_at_once_each_port_goes_to_one(settings):
    """As sandboxes launched at a time do: a lock, since overlaps are no file names."""
    got: list[int] = []

    def take(number: int) -> None:
        try:
            got.append(ports.reserve(settings, f"sb-{number:016x}", [asked()])[0]["host_port"])
        except SandbatchError:
            got.append(0)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(got) == [0] * 8 + [29000, 29001, 29002, 29003]
