"""What the recordings of cnitool are made of, and what both sides of the comparison share."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.unit.libcni.doubles import Plugins

NETNS = "/nowhere/netns"  # doubles need none, and what does not exist nobody mends
CONTAINER_ID = f"cnitool-{hashlib.sha512(NETNS.encode()).hexdigest()[:20]}"  # as cnitool makes it
PLUGINS = ("one", "two", "three")

IP = {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1}
INTERFACES = [
    {"name": "br0", "mac": "aa:bb:cc:00:00:01"},
    {"name": "eth0", "mac": "aa:bb:cc:00:00:02", "sandbox": NETNS},
]
ROUTE = {"dst": "0.0.0.0/0", "gw": "10.1.0.1"}
RESULT = {"interfaces": INTERFACES, "ips": [IP], "routes": [ROUTE]}
IP_04 = {"version": "4", **IP}
RESULT_04 = {**RESULT, "ips": [IP_04]}


def network(version: str | None = "1.0.0", *plugins: object, **keys: object) -> dict[str, object]:
    """A list of that version; without plugins, one of two."""
    head = {} if version is None else {"cniVersion": version}
    return {**head, "name": "net", "plugins": list(plugins or [{"type": "one"}, {"type": "two"}]), **keys}


@dataclass(frozen=True)
class Answer:
    """What a plugin prints, and how it ends."""

    stdout: object = ""
    exit_code: int = 0
    stderr: str = ""


@dataclass(frozen=True)
class Case:
    """Files of a configuration folder, what the plugins answer, and commands in their order."""

    about: str
    files: dict[str, object]  # path in the folder -> text, or what is written as JSON
    answers: dict[str, Answer] = field(default_factory=dict)  # "PLUGIN.COMMAND" -> answer
    steps: tuple[str, ...] = ("ADD", "CHECK", "DEL")
    name: str = "net"
    if_name: str = "eth0"
    cni_args: str = ""
    capability_args: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, object] = field(default_factory=dict)  # entries that are there before

    def prepare(self, folder: Path, cache_dir: Path) -> Plugins:
        """Write everything; the configuration is then in `folder`/net.d."""
        plugins = Plugins(folder / "bin")
        plugins.add(*PLUGINS)
        for one in PLUGINS:
            plugins.answer(one, "ADD", {})
        for key, answer in self.answers.items():
            plugin, command = key.split(".")
            plugins.answer(plugin, command, answer.stdout, exit_code=answer.exit_code, stderr=answer.stderr)
        write_all(folder / "net.d", self.files)
        write_all(cache_dir / "results", self.cache)
        return plugins


def write_all(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (folder / name).write_text(text)


def observe(plugins: Plugins, cache_dir: Path, *, failed: bool, result: object) -> dict[str, object]:
    """What one command has done, without the paths of this run."""
    calls = []
    for call in plugins.take_calls():
        env = {**call.env, "PATH": call.env["PATH"].replace(str(plugins.folder), "BIN")}
        stdin = {key: value for key, value in call.stdin.items() if key != "capabilities"}
        calls.append({"plugin": call.plugin, "env": env, "stdin": stdin})
    entries = {}
    for path in sorted((cache_dir / "results").glob("*")):
        entries[path.name] = _readable(path.read_text())
    return {"failed": failed, "result": result, "calls": calls, "cache": entries}


def _readable(text: str) -> object:
    try:
        entry = json.loads(text)
    except ValueError:
        return text
    if isinstance(entry, dict) and isinstance(entry.get("config"), str):
        entry["config"] = base64.b64decode(entry["config"]).decode()
    return entry


def stale_entry(container_id: str, result: object = None, **keys: object) -> dict[str, object]:
    """A cache entry of an attachment that nobody counts as valid."""
    return {
        "kind": "cniCacheV1",
        "containerId": container_id,
        "config": base64.b64encode(json.dumps(network()).encode()).decode(),
        "ifName": "eth0",
        "networkName": "net",
        "netns": "/nowhere/other",
        "result": result or {"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.9/16"}]},
        **keys,
    }


def _answers(**stdout: object) -> dict[str, Answer]:
    return {key.replace("_", "."): Answer(value) for key, value in stdout.items()}


def _of_one(**keys: object) -> dict[str, object]:
    return network("1.0.0", {"type": "one", **keys}, name="x")


FAILS = Answer({"code": 11, "msg": "later", "details": "soon"}, exit_code=1)
EVERYTHING = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {
            "name": "eth0",
            "mac": "aa:bb:cc:00:00:02",
            "mtu": 1400,
            "sandbox": NETNS,
            "socketPath": "/s",
            "pciID": "0000:01",
        },
        {"name": "", "mtu": 0, "unknown": 1},
    ],
    "ips": [
        {"address": "10.1.0.5/16", "interface": 0},
        {"address": "FD00:0::00a5/64", "gateway": "fd00:0:0:0::1"},
    ],
    "routes": [
        {"dst": "10.9.0.7/8", "gw": "", "mtu": 1300, "advmss": 1200, "priority": 7, "table": 0, "scope": 253},
        {"dst": "::/0", "priority": 0},
    ],
    "dns": {"nameservers": ["10.1.0.1"], "domain": "", "search": ["a", "b"], "options": []},
    "unknown": {"a": 1},
}
OLD_RESULT = {
    "cniVersion": "0.2.0",
    "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
    "ip6": {"ip": "fd00::5/64"},
    "dns": {"domain": "a"},
}

CASES = [
    *(
        Case(
            f"a chain of two, CNI {version}",
            {"10-net.conflist": network(version, {"type": "one", "kept": {"a": [1, None]}}, {"type": "two"})},
            _answers(one_ADD=result, two_ADD=result),
            steps=("STATUS", "ADD", "CHECK", "GC", "ADD", "DEL", "DEL"),
        )
        for version, result in [
            ("0.3.1", RESULT_04),
            ("0.4.0", RESULT_04),
            ("1.0.0", RESULT),
            ("1.1.0", RESULT),
        ]
    ),
    *(
        Case(
            f"a single plugin in a .conf, CNI {version}",
            {"net.conf": {"cniVersion": version, "name": "net", "type": "one", "z": 1, "a": "<&>é"}},
            _answers(one_ADD=RESULT if version[0] == "1" else RESULT_04),
            steps=("ADD", "CHECK", "DEL"),
        )
        for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
    ),
    Case("a result of every field", {"n.conflist": network()}, _answers(one_ADD=EVERYTHING)),
    Case(
        "a result of every field for a list of an older version",
        {"n.conflist": network("0.4.0")},
        _answers(one_ADD=EVERYTHING, two_ADD=EVERYTHING),
    ),
    Case(
        "results of the first two versions in a newer list",
        {"n.conflist": network("1.1.0", {"type": "one"}, {"type": "two"})},
        _answers(one_ADD=OLD_RESULT, two_ADD=OLD_RESULT),
    ),
    Case(
        "a result of CNI 0.1.0 in a list of 0.4.0",
        {"n.conflist": network("0.4.0", {"type": "one"})},
        _answers(one_ADD={**OLD_RESULT, "cniVersion": "0.1.0", "ip6": None}),
    ),
    Case("a result without anything", {"n.conflist": network()}, _answers(one_ADD="{}", two_ADD="null")),
    Case("an empty result of CNI 0.3", {"n.conflist": network("0.3.1")}, _answers(one_ADD="null")),
    Case(
        "a result whose version is no text",
        {"n.conflist": network()},
        _answers(one_ADD={"cniVersion": 7}, two_ADD={"cniVersion": ""}),
    ),
    *(
        Case(f"an ADD that prints {name}", {"n.conflist": network()}, {"one.ADD": Answer(text)})
        for name, text in [
            ("nothing", ""),
            ("garbage", "hello\n"),
            ("a list", "[]"),
            ("a newer result", '{"cniVersion": "9.0.0"}'),
            ("an address without prefix length", '{"ips": [{"address": "10.0.0.1"}]}'),
            ("a number for an address", '{"ips": [{"address": 1}]}'),
            ("a gateway that is none", '{"ips": [{"address": "10.0.0.2/8", "gateway": "x"}]}'),
            ("an interface number that is a text", '{"ips": [{"address": "10.0.0.2/8", "interface": "0"}]}'),
            ("interfaces that are no list", '{"interfaces": {}}'),
            ("two results", "{}{}"),
            ("NaN", '{"ips": [], "x": NaN}'),
        ]
    ),
    Case(
        "an ADD of the second that fails, and its DEL",
        {"n.conflist": network("1.0.0", {"type": "one"}, {"type": "two"}, {"type": "three"})},
        {"one.ADD": Answer(RESULT), "two.ADD": FAILS},
        steps=("ADD", "DEL"),
    ),
    Case(
        "a DEL that fails, and again",
        {"n.conflist": network("1.0.0", {"type": "one"}, {"type": "two"}, {"type": "three"})},
        {"two.DEL": FAILS},
        steps=("ADD", "DEL", "DEL"),
    ),
    Case(
        "an error on stderr only", {"n.conflist": network()}, {"one.ADD": Answer(exit_code=3, stderr="oh\n")}
    ),
    Case("a CHECK that fails", {"n.conflist": network()}, {"one.CHECK": FAILS}),
    Case(
        "a plugin that is not there",
        {"n.conflist": network("1.0.0", {"type": "one"}, {"type": "four"})},
        steps=("ADD", "DEL", "CHECK"),
    ),
    Case("CHECK, GC and DEL without an ADD", {"n.conflist": network()}, steps=("CHECK", "GC", "DEL")),
    Case(
        "a STATUS that fails, and a GC whose first plugin fails",
        {"n.conflist": network("1.1.0")},
        {"one.STATUS": FAILS, "one.GC": FAILS},
        steps=("STATUS", "GC"),
    ),
    *(
        Case(
            f"GC of a list of CNI {version} with stale entries",
            {"n.conflist": network(version, {"type": "one", "capabilities": {"ips": True}}, {"type": "two"})},
            steps=("ADD", "GC"),
            cache={
                "net-old-eth0": stale_entry(
                    "old", cniArgs=[["A", "b"], ["C", "d"]], capabilityArgs={"ips": ["10.1.0.9"], "mac": "x"}
                ),
                "net-odd-eth0": {"kind": "cniCacheV1", "containerId": "odd", "ifName": "eth0"},
                "net-bare-eth0": {
                    "kind": "cniCacheV1",
                    "containerId": "bare",
                    "ifName": "e1",
                    "networkName": "net",
                },
                "net2-old-eth0": stale_entry("old", networkName="net2"),
                "net-torn-eth0": '{"kind": "cniCa',
            },
        )
        for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
    ),
    Case(
        "a GC that cannot DEL one of the stale ones",
        {"n.conflist": network("1.1.0", {"type": "one"})},
        {"one.DEL": FAILS},
        steps=("GC",),
        cache={"net-a-eth0": stale_entry("a"), "net-b-eth0": stale_entry("b")},
    ),
    Case(
        "no GC and no CHECK by wish of the list",
        {"n.conflist": network("1.1.0", disableGC="True", disableCheck=True)},
        steps=("ADD", "CHECK", "GC", "STATUS", "DEL"),
        cache={"net-old-eth0": stale_entry("old")},
    ),
    *(
        Case(
            f"a cache entry that holds {name}",
            {"n.conflist": network("1.0.0")},
            steps=("CHECK", "DEL"),
            cache={f"net-{CONTAINER_ID}-eth0": entry},
        )
        for name, entry in [
            ("the bare result of an old libcni", {"cniVersion": "0.4.0", **RESULT_04}),
            ("another kind", {"kind": "cniCacheV2", "result": RESULT}),
            ("no result", {"kind": "cniCacheV1", "containerId": CONTAINER_ID}),
            ("garbage", "garbage"),
            ("a result of another version", stale_entry(CONTAINER_ID, {"cniVersion": "0.3.1", **RESULT_04})),
            ("a result of no version", stale_entry(CONTAINER_ID, {"ips": [IP]})),
            (
                "a key of a wrong type, for which libcni takes all of it for a result",
                stale_entry(CONTAINER_ID, netns=7, cniVersion="1.0.0", ips=[{"address": "10.1.0.7/16"}]),
            ),
            ("a result of an unknown version", stale_entry(CONTAINER_ID, {"cniVersion": "0.9.0"})),
        ]
    ),
    Case(
        "a DEL that fails, CNI 0.3.1, beside a cache entry without a result",
        {"n.conflist": network("0.3.1")},
        {"two.DEL": FAILS},
        steps=("DEL",),
        cache={f"net-{CONTAINER_ID}-eth0": stale_entry(CONTAINER_ID, {"cniVersion": "0.9.0"})},
    ),
    Case(
        "a DEL that fails, CNI 0.4.0, beside a cache entry without a result",
        {"n.conflist": network("0.4.0")},
        {"two.DEL": FAILS},
        steps=("DEL",),
        cache={f"net-{CONTAINER_ID}-eth0": stale_entry(CONTAINER_ID, {"cniVersion": "0.9.0"})},
    ),
    Case(
        "arguments, capabilities and another interface",
        {
            "n.conflist": network(
                "1.0.0",
                {"type": "one", "capabilities": {"portMappings": True, "ips": False, "mac": True}},
                {"type": "two", "capabilities": {"ips": True, "none": None}, "runtimeConfig": {"own": 1}},
                {"type": "three", "runtimeConfig": {"own": 1}, "args": {"cni": {"a": 1}}},
            )
        },
        if_name="net1.2",
        cni_args="IgnoreUnknown=1;K8S_POD=a b",
        capability_args={"portMappings": [{"hostPort": 1}], "ips": ["10.1.0.9/16"], "other": None},
    ),
    Case(
        "numbers, which Go writes without a needless fraction",
        {"n.conf": {"cniVersion": "1.0.0", "name": "net", "type": "one", "mtu": 1500.0, "x": [1e10, 0.5]}},
    ),
    Case(
        "characters that Go writes in its own way",
        {"n.conf": {"cniVersion": "1.0.0", "name": "net", "type": "one", "x": '<&> \u2028 é "/\\ \x01'}},
        steps=("ADD",),
    ),
    Case(
        "GC of entries that lack a key or have one of a wrong type",
        {"n.conflist": network("1.0.0", {"type": "one"})},
        steps=("GC",),
        cache={
            "net-1": stale_entry("", containerId=None),
            "net-2": stale_entry("a", netns=7),
            "net-3": stale_entry("b", ifName=""),
            "net-4": stale_entry("c", capabilityArgs="x"),
            "net-5": stale_entry("d", networkName=["net"]),
            "net-6": [],
        },
    ),
    Case(
        "capability arguments go to the plugins that mark them true, and to no other",
        {
            "n.conflist": network(
                "1.0.0",
                {"type": "one", "capabilities": {"ips": True, "mac": True, "portMappings": False}},
                {"type": "two", "capabilities": {"portMappings": True}, "runtimeConfig": {"mine": 1}},
                {"type": "three", "capabilities": {"bandwidth": True, "aliases": True, "mac": True}},
            )
        },
        _answers(one_ADD=RESULT, two_ADD=RESULT, three_ADD=RESULT),
        capability_args={
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
            ],
            "bandwidth": {"ingressRate": 8000000, "ingressBurst": 800000},
            "ips": ["10.1.0.5", "fd00::5/64"],
            "mac": "02:00:00:00:00:01",
            "aliases": ["db", "www"],
            "infinibandGUID": "nobody asks for it",
        },
    ),
    Case("an interface with a long name", {"n.conflist": network()}, if_name="e" * 16),
    Case("an interface with a colon", {"n.conflist": network()}, if_name="eth0:1"),
    Case("an interface called ..", {"n.conflist": network()}, if_name=".."),
    Case("an interface with 15 characters", {"n.conflist": network()}, if_name="e" * 15),
    Case(
        "a plugin object with keys of its own for name, version and prevResult",
        {
            "n.conflist": network(
                "0.4.0",
                {"type": "one", "name": "x", "cniVersion": "9", "prevResult": {"cniVersion": "0.4.0"}},
                {"type": "two", "prevResult": {}},
            )
        },
    ),
    *(
        Case(f"versions {versions} besides {one}", {"n.conflist": network(one, cniVersions=versions)})
        for one, versions in [
            ("0.4.0", ["0.3.1", "1.0.0"]),
            ("1.0.0", ["0.3.1", "0.4.0"]),
            ("1.2.0", ["1.0.0", "0.4.0", "7.0"]),
            ("0.3.1", []),
            (None, ["1.1.0", "2.0.0"]),
        ]
    ),
    Case(
        "plugins of the folder behind those of the list",
        {
            "n.conflist": network("1.0.0", {"type": "one"}),
            "net/20.conf": {"type": "three", "name": "b"},
            "net/10.conf": {"type": "two", "x": 1},
            "net/30.conflist": "not read",
            "net/40.json": "not read",
            "net/sub.conf/x": "not read",
        },
        steps=("ADD", "CHECK", "GC", "DEL"),
    ),
    Case(
        "plugins of the folder only",
        {"n.conflist": {"cniVersion": "1.1.0", "name": "net"}, "net/1.conf": {"type": "one"}},
        steps=("ADD", "STATUS", "DEL"),
    ),
    Case(
        "plugins of the folder, not wanted",
        {"n.conflist": network(loadOnlyInlinedPlugins="TRUE"), "net/1.conf": {"type": "three"}},
    ),
    Case("no plugins and no folder", {"n.conflist": {"cniVersion": "1.0.0", "name": "net"}}),
    Case("a file where the folder of plugins may be", {"n.conflist": network(), "net": "a file"}),
    Case("a broken plugin in the folder", {"n.conflist": network(), "net/1.conf": '{"name": "x"}'}),
    Case(
        "the first list of the name, lists before single plugins, by the name inside",
        {
            "00-net.conf": {"cniVersion": "1.0.0", "name": "net", "type": "three"},
            "10-other.conflist": network("0.2.0", {"type": "three"}, name="other"),
            "20-a.conflist": network("1.0.0", {"type": "one"}),
            "30-b.conflist": network("1.0.0", {"type": "two"}),
            "net.conflist": network("1.0.0", {"type": "two"}, name="other2"),
        },
    ),
    Case(
        "a .json and a .conf by name, and files that are none",
        {
            "B.json": {"cniVersion": "1.0.0", "name": "net", "type": "two"},
            "a.conf": {"cniVersion": "1.0.0", "name": "net", "type": "one"},
            "0.txt": "no",
            "1.conf.bak": "no",
            "2conf": "no",
            "dir.conf/x": "no",
            "dir.conflist/x": "no",
        },
    ),
    Case("files whose name is all suffix", {".conflist": network("1.0.0", {"type": "two"})}),
    Case(
        "strange networks before the one that is wanted",
        {
            "0.conflist": {"name": "of an old version", "plugins": [{"type": "one"}]},
            "1.conflist": network("9.9.9", {"type": "../x"}, name="no name!"),
            "2.conflist": network("x", {"type": "one"}, name=""),
            "3.conflist": network("1.0.0", {"type": "one"}),
        },
    ),
    Case(
        "single plugins without name and version before the one that is wanted",
        {"0.conf": {"type": "two"}, "1.conf": {"type": "one", "name": "net", "cniVersion": "1.0.0"}},
    ),
    Case("no such network", {"n.conflist": network(), "n.conf": {"type": "one", "name": "x"}}, name="y"),
    Case("an empty folder", {}),
    Case("a broken file behind the match", {"a.conflist": network(), "b.conflist": "{", "c.conf": "{"}),
    *(
        Case(f"a file before the match with {name}", {"a.conflist": content, "b.conflist": network()})
        for name, content in [
            ("a syntax error", '{\n "name": "x",\n "plugins": [}'),
            ("a trailing comma", '{"name": "x", "plugins": [{"type": "one"},]}'),
            ("a byte order mark", "\ufeff" + json.dumps(network(name="x"))),
            ("NaN", '{"name": "x", "a": NaN, "plugins": [{"type": "one"}]}'),
            ("a number without end", '{"name": "x", "a": 1e999, "plugins": [{"type": "one"}]}'),
            ("a list at the top", "[]"),
            ("nothing in it", ""),
            ("a name that is no text", {**network(), "name": 7}),
            ("no name", {"cniVersion": "1.0.0", "plugins": [{"type": "one"}]}),
            ("a version that is no text", network(name="x") | {"cniVersion": 1.0}),
            ("a version that is null", network(name="x") | {"cniVersion": None}),
            ("versions that are no list", network(name="x", cniVersions="1.0.0")),
            ("versions that are null", network(name="x", cniVersions=None)),
            ("a version that is no version", network(name="x", cniVersions=["1.x"])),
            ("disableCheck that is a number", network(name="x", disableCheck=1)),
            ("disableGC that is a strange text", network(name="x", disableGC="yes")),
            ("no plugins at all", network(name="x") | {"plugins": []}),
            ("plugins that are null", network(name="x") | {"plugins": None}),
            ("a plugin without a type", network("1.0.0", {"bridge": "x"}, name="x")),
            ("a plugin that is a text", network("1.0.0", "one", name="x")),
            ("a type that is a number", network("1.0.0", {"type": 1}, name="x")),
            ("ipam that is a text", _of_one(ipam="host-local")),
            ("an ipam type that is a number", _of_one(ipam={"type": 1})),
            ("a capability that is a text", _of_one(capabilities={"a": "b"})),
            ("a name server that is a number", _of_one(dns={"nameservers": [1]})),
        ]
    ),
    *(
        Case(
            f"a single plugin before the match with {name}",
            {"a.conf": content, "b.conf": {"type": "one", "name": "net", "cniVersion": "1.0.0"}},
        )
        for name, content in [
            ("a list in it", network(name="x")),
            ("a name that is a number", {"type": "one", "name": 1}),
            ("a version that is a list", {"type": "one", "cniVersion": []}),
            ("null for most", {"type": "one", "name": None, "ipam": None, "dns": None, "capabilities": None}),
        ]
    ),
]
