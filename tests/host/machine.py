"""What sandboxes could leave on a machine, listed: two lists are compared, before and after."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COUNTERS = re.compile(r"\[\d+:\d+\]|counter packets \d+ bytes \d+|^#.*$", re.MULTILINE)
# The kernel's own tables and chains come with the first rule, and stay.
EMPTY_TABLE = re.compile(r"[*}]|COMMIT|table |type |chain [A-Z]|:(INPUT|OUTPUT|FORWARD|(PRE|POST)ROUTING) ")
# portmap's shared chains, and the jumps to them, come with the first published port, and stay by its design;
# so does our rule that keeps the loopback closed (worker/loopback.py).
SHARED = re.compile(
    r":CNI-HOSTPORT-|-A CNI-HOSTPORT-(SETMARK|MASQ) |-A .* -j CNI-HOSTPORT-(DNAT|MASQ)$"
    r"|chain CNI-HOSTPORT-|(fib daddr type local )?\s*jump CNI-HOSTPORT-(DNAT|MASQ)$|meta mark .*0x0*2000\b"
    r'|chain from_links \{$|iifname != "lo" ip [sd]addr 127\.0\.0\.0/8 '
)
KERNELS_LINKS = ("ifb0", "ifb1")  # they come with the module, when the first rate is limited
OURS = re.compile(r"sb-[0-9a-f]{16}|runsc|gvisor")  # a machine's other cgroups come and go
BENCH = "sandbatch-bench"  # a bench may run beside the tests


def snapshot() -> dict[str, list[str]]:
    """Firewall rules, links, leases and cache, netns, cgroups, mounts and the processes of sandboxes."""
    return {
        "iptables": [line for line in _lines("iptables-save") if not _may_stay(line)],
        "nftables": [line for line in _lines("nft", "list", "ruleset") if not _may_stay(line)],
        "links": sorted(set(_links()) - set(KERNELS_LINKS)),
        "addresses": sorted(f"{one['ifname']} {one['addr_info']}" for one in _addresses()),
        "cni": _tree(Path("/var/lib/cni")),
        "netns": sorted(os.listdir("/var/run/netns")) if Path("/var/run/netns").is_dir() else [],
        "cgroups": sorted(folder for folder, _, _ in os.walk("/sys/fs/cgroup") if OURS.search(folder)),
        "mounts": sorted(
            line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ),
        "processes": _processes(),
    }


@contextmanager
def unchanged() -> Iterator[None]:
    """After the block the machine is as before."""
    before = snapshot()
    yield
    assert difference(before, snapshot()) == {}


def difference(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    """What came and what went; empty where nothing did. `last_reserved_ip` is host-local's own memory."""
    found: dict[str, list[str]] = {}
    for kind, old in before.items():
        new = after[kind]
        came = [f"+ {one}" for one in new if one not in old]
        went = [f"- {one}" for one in old if one not in new]
        if came or went:
            found[kind] = came + went
    return found


def _links() -> list[str]:
    return [str(link["ifname"]) for link in json.loads(_output("ip", "-j", "link"))]


def _may_stay(rule: str) -> bool:
    return bool(EMPTY_TABLE.match(rule) or SHARED.match(rule))


def _addresses() -> list[dict[str, object]]:
    shown = json.loads(_output("ip", "-j", "-4", "addr"))
    return [{"ifname": one["ifname"], "addr_info": [a["local"] for a in one["addr_info"]]} for one in shown]


def _processes() -> list[str]:
    """Command lines of whatever is left of a sandbox: its own processes and conmon."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if BENCH in words:
            continue
        if re.search(r"\b(runsc|runsc-\w+|conmon|exe) ", words) and "sb-" in words:
            found.append(f"{name} {words[:200]}")
    return sorted(found)


def _tree(folder: Path) -> list[str]:
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and not path.name.startswith("last_reserved_ip")
    )


def _lines(*argv: str) -> list[str]:
    text = COUNTERS.sub("", _output(*argv))
    return [line.strip() for line in text.splitlines() if line.strip()]


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def copy_program(name: str, root: Path) -> None:
    """A root with one program and its libraries, and nothing else."""
    program = subprocess.run(["which", name], check=True, capture_output=True, text=True).stdout.strip()
    lines = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
    for path in (program, *(word for word in lines if word.startswith("/"))):
        target = root / ("bin/" + name if path == program else path.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(path).read_bytes())
        target.chmod(0o755)
