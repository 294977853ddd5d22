"""Keeps what comes by a link away from the host's loopback, once a port has been published here.

The kernel itself drops a packet for 127.0.0.0/8 that comes by a link, until portmap sets route_localnet on
the bridge, so that the host's own loopback reaches a published port. portmap never resets it. From then on
every sandbox there, without any capability, could send to what listens on 127.0.0.1 of the host: a datagram
of a socket that is bound to eth0 (CVE-2020-8558 of Kubernetes). So a rule says again what the kernel said,
ahead of conntrack: what portmap forwards has no such address on a link. It stays, as route_localnet does,
until the machine is booted. IPv6 needs none: the kernel takes ::1 from no link whatever is set.
"""

from worker import nft
from worker.errors import HostNotReady
from worker.settings import Settings

FAMILY, TABLE, CHAIN = "ip", "sandbatch-loopback", "from_links"
RULES = tuple(f'iifname != "lo" ip {way} 127.0.0.0/8 counter drop' for way in ("daddr", "saddr"))
TEXT = "\n".join(
    [
        f"add table {FAMILY} {TABLE}",
        f"add chain {FAMILY} {TABLE} {CHAIN} {{ type filter hook prerouting priority -310; }}",
        f"flush chain {FAMILY} {TABLE} {CHAIN}",
        *(f"add rule {FAMILY} {TABLE} {CHAIN} {rule}" for rule in RULES),
        "",
    ]
)


def check_possible() -> None:
    """Refuse to publish a port on a host that cannot do so without opening its loopback.

    Raises:
        HostNotReady: nft is missing.
    """
    if not nft.is_here():
        why = "nft is not on the PATH of this host, and a published port opens its loopback to sandboxes"
        raise HostNotReady("publish", why, "run sandbatch setup, or install nftables")


def close() -> None:
    """Load the rule, in one transaction. Safe to repeat."""
    nft.load(TEXT)


def is_open(settings: Settings) -> bool:
    """A port has been published here since the boot, and the rule is not there (any more)."""
    # Like route_localnet the folder goes with a reboot, and never before.
    return settings.ports_dir.is_dir() and nft.rules_in(FAMILY, TABLE, CHAIN) != len(RULES)
