"""GC at a worker's start: only on networks that are wholly ours, and only of what is dead there."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.libcni.doubles import Call, Plugins
from worker import cni, cni_cache, gc, journal, mend
from worker.cni_config import find_network
from worker.errors import CniPluginError, SandbatchError
from worker.settings import Settings
from worker.spec import make_spec

LIVING, STALE, OTHER = "sb-" + "1" * 16, "sb-" + "2" * 16, "sb-" + "3" * 16
IPS = {LIVING: "10.0.0.2", STALE: "10.0.0.3", OTHER: "10.0.0.4", "podman0": "10.0.0.5"}


@dataclass
class Lab:
    """A host with two plugins that are doubles; leases are files, as host-local's."""

    folder: Path
    plugins: Plugins

    @property
    def settings(self) -> Settings:
        return Settings(
            state_dir=self.folder / "state",
            run_dir=self.folder / "run",
            cni_conf_dir=self.folder / "net.d",
            cni_cache_dir=self.folder / "cni",
            cni_path=str(self.plugins.folder),
        )

    @property
    def leases(self) -> Path:
        return self.folder / "leases" / "net"

    def network(self, version: str = "1.1.0", ipam: str = "host-local", **more: object) -> None:
        one = {"type": "one", "ipam": {"type": ipam, "dataDir": str(self.folder / "leases")}}
        document = {"cniVersion": version, "name": "net", "plugins": [one, {"type": "two"}], **more}
        (self.folder / "net.d").mkdir(exist_ok=True)
        (self.folder / "net.d" / "net.conflist").write_text(json.dumps(document))

    def attach(self, container_id: str, *, entry: bool = True, lease: bool = True) -> None:
        """What an ADD leaves."""
        network = find_network("net", [self.folder / "net.d"])
        if lease:
            self.leases.mkdir(parents=True, exist_ok=True)
            (self.leases / IPS[container_id]).write_text(f"{container_id}\r\neth0")
        if entry:
            cni_cache.save(
                self.folder / "cni",
                network=network.name,
                container_id=container_id,
                if_name="eth0",
                netns=f"/var/run/netns/{container_id}",
                config=network.raw,
                cni_args=(),
                capability_args={},
                result={"cniVersion": network.cni_version, "ips": [{"address": f"{IPS[container_id]}/24"}]},
            )

    def journal(self, container_id: str, *, begun: bool = True) -> journal.Journal:
        spec = make_spec(args=["true"], network="net")
        known = journal.create(self.settings.sandboxes_dir, container_id, attempt=1, batch="b", spec=spec)
        if begun:
            known.mark_begun("network", {"config": ""})
        return known

    def collect(self) -> tuple[list[Call], list[SandbatchError]]:
        errors = gc.collect(self.settings)
        return self.plugins.take_calls(), errors


@pytest.fixture(autouse=True)
def _no_netns(monkeypatch):
    """DEL's work in a netns has its own tests; these need no root."""
    monkeypatch.setattr(cni, "world_put_back", lambda *_: nullcontext())


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    plugins = Plugins(tmp_path / "bin")
    plugins.add("one", "two")
    made = Lab(tmp_path, plugins)
    made.network()
    return made


def said(calls: list[Call]) -> list[tuple[str, str, str]]:
    return [(call.command, call.plugin, call.env["CONTAINERID"]) for call in calls]


def test_what_no_journal_has_is_detached_and_the_plugins_are_told_what_is_valid(lab):
    lab.attach(LIVING)
    lab.journal(LIVING)
    lab.attach(STALE)

    calls, errors = lab.collect()

    assert errors == []
    assert said(calls) == [("DEL", "two", STALE), ("DEL", "one", STALE), ("GC", "one", ""), ("GC", "two", "")]
    for call in calls[2:]:
        assert call.stdin["cni.dev/valid-attachments"] == [{"containerID": LIVING, "ifname": "eth0"}]
    assert [one.container_id for one in cni_cache.list_entries(lab.folder / "cni")] == [LIVING]


def test_below_1_1_0_the_plugins_have_no_gc(lab):
    lab.network("1.0.0")
    lab.attach(STALE)
    assert said(lab.collect()[0]) == [("DEL", "two", STALE), ("DEL", "one", STALE)]


def test_del_has_the_configuration_of_its_add(lab):
    """The file of today may name other plugins."""
    lab.attach(STALE)
    lab.network(plugins=[{"type": "one", "ipam": {"type": "host-local", "dataDir": str(lab.leases.parent)}}])
    calls, _ = lab.collect()
    assert said(calls) == [("DEL", "two", STALE), ("DEL", "one", STALE), ("GC", "one", "")]


@pytest.mark.parametrize(("entry", "lease"), [(True, False), (False, True)], ids=["a cache entry", "a lease"])
def test_a_network_that_another_runtime_is_on_is_left_alone(lab, entry, lease):
    """Its attachments are valid, and we do not know all of them."""
    lab.attach(STALE)
    lab.attach("podman0", entry=entry, lease=lease)
    assert lab.collect() == ([], [])


def test_a_network_that_another_sandbatch_is_on_is_left_alone(lab, monkeypatch):
    """Its ids have our pattern; its journals are elsewhere."""
    lab.attach(STALE)
    lab.attach(OTHER)
    monkeypatch.setattr(gc, "others", lambda settings: {OTHER: "process 1 has it"})
    assert lab.collect() == ([], [])


def test_an_entry_that_cannot_be_read_may_be_anybodys(lab):
    lab.attach(STALE)
    (lab.folder / "cni" / "results" / "net-x-eth0").write_text("{")
    assert lab.collect() == ([], [])


def test_without_leases_to_look_at_a_users_network_is_left_alone(lab):
    """Of dhcp, say: another runtime with another cache may be on it, and nobody tells."""
    lab.network(ipam="dhcp")
    lab.attach(STALE)
    assert lab.collect() == ([], [])


def test_a_network_that_disables_gc_is_left_alone(lab):
    lab.network(disableGC=True)
    lab.attach(STALE)
    assert lab.collect() == ([], [])


@pytest.mark.parametrize("is_set_aside", [False, True])
def test_of_a_journal_that_cannot_be_read_nothing_is_claimed(lab, is_set_aside):
    """Its sandbox may run: it keeps its network until the operator mends it."""
    lab.attach(STALE)
    known = lab.journal(STALE)
    (known.folder / journal.FILE).write_text("")
    if is_set_aside:
        journal.set_aside(known.folder)
    calls, _ = lab.collect()
    assert said(calls) == [("GC", "one", ""), ("GC", "two", "")]
    assert calls[0].stdin["cni.dev/valid-attachments"] == [{"containerID": STALE, "ifname": "eth0"}]


def test_a_journal_whose_network_is_not_begun_holds_nothing_there(lab):
    """It was undone; what is there came from nowhere."""
    lab.attach(STALE)
    lab.journal(STALE, begun=False)
    assert said(lab.collect()[0])[:2] == [("DEL", "two", STALE), ("DEL", "one", STALE)]


def test_a_netns_in_which_somebody_lives_keeps_its_network(lab, monkeypatch):
    lab.attach(STALE)
    monkeypatch.setattr(gc, "inhabitants", lambda path: [77] if path.name == STALE else [])
    calls, _ = lab.collect()
    assert said(calls) == [("GC", "one", ""), ("GC", "two", "")]
    assert calls[0].stdin["cni.dev/attachments"] == [{"containerID": STALE, "ifname": "eth0"}]


def test_an_address_that_is_anothers_by_now_is_not_given_to_del(lab, monkeypatch):
    """A plugin that goes by addresses would undo the rules of the living one."""
    monkeypatch.setitem(IPS, STALE, IPS[LIVING])
    lab.attach(LIVING)
    lab.journal(LIVING)
    lab.attach(STALE, lease=False)
    assert said(lab.collect()[0]) == [("GC", "one", ""), ("GC", "two", "")]
    assert [one.container_id for one in cni_cache.list_entries(lab.folder / "cni")] == [LIVING]


def test_errors_are_collected_and_the_next_network_is_collected(lab):
    """They never keep a worker from its work."""
    lab.attach(STALE)
    text = (lab.folder / "net.d" / "net.conflist").read_text()
    (lab.folder / "net.d" / "b.conflist").write_text(text.replace('"net"', '"zzz"'))
    lab.plugins.answer("two", "DEL", {"code": 7, "msg": "no such moon"}, exit_code=1)
    calls, errors = lab.collect()
    assert [type(error) for error in errors] == [CniPluginError]
    assert "no such moon" in str(errors[0])
    assert [(call.command, call.stdin["name"]) for call in calls] == [
        ("DEL", "net"),
        *[("GC", "net")] * 2,
        *[("GC", "zzz")] * 2,
    ]
    # It is told as valid: its DEL is still due, and frees more than GC.
    assert calls[1].stdin["cni.dev/valid-attachments"] == [{"containerID": STALE, "ifname": "eth0"}]


def test_it_is_bounded_in_time(lab, monkeypatch):
    """A worker that starts does not wait for ever; the rest is for the next start."""
    monkeypatch.setattr(gc, "LONGEST_S", -1)
    lab.attach(STALE)
    calls, errors = lab.collect()
    assert calls == []
    assert "goes on when the worker starts again" in str(errors[0])


def test_a_host_without_anything_has_nothing_to_collect(tmp_path):
    settings = Settings(state_dir=tmp_path / "a", run_dir=tmp_path / "b", cni_conf_dir=tmp_path / "c")
    settings = settings.model_copy(update={"cni_cache_dir": tmp_path / "d"})
    assert gc.collect(settings) == []


def test_a_path_of_an_entry_that_is_not_the_sandboxs_own_netns_is_not_given_to_del(lab):
    """It may be the netns of a living one."""
    lab.attach(STALE)
    entry = cni_cache.list_entries(lab.folder / "cni")[0]
    entry.path.write_text(
        entry.path.read_text().replace(f"/var/run/netns/{STALE}", f"/var/run/netns/{LIVING}")
    )
    calls, _ = lab.collect()
    assert [call.env["NETNS"] for call in calls if call.command == "DEL"] == ["", ""]


def test_an_id_that_is_another_sandbatchs_is_named_with_its_reason(tmp_path):
    """Only what has our runsc root is ours."""
    settings = Settings(state_dir=tmp_path, run_dir=tmp_path / "run")
    code = "print(flush=True); input()"
    for root, is_other in ((settings.runsc_root, False), ("/elsewhere/runsc", True)):
        argv = [sys.executable, "-c", code, f"--root={root}", "boot", OTHER]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert (OTHER in mend.others(settings)) is is_other
            process.communicate(b"\n")


def test_the_same_address_on_another_network_is_another_address(lab, monkeypatch):
    """Two networks of one host may have the same private range."""
    monkeypatch.setitem(IPS, STALE, IPS[LIVING])
    lab.attach(STALE)
    lab.attach(LIVING, lease=False)
    lab.journal(LIVING)
    entry = next(one for one in cni_cache.list_entries(lab.folder / "cni") if one.container_id == LIVING)
    text = entry.path.read_text().replace('"networkName":"net"', '"networkName":"zzz"')
    entry.path.unlink()
    entry.path.with_name(f"zzz-{LIVING}-eth0").write_text(text)
    assert said(lab.collect()[0])[:2] == [("DEL", "two", STALE), ("DEL", "one", STALE)]
