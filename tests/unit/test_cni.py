"""What a CNI plugin sees of us, compared with what it saw of cnitool on the same networks."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.libcni.cases import CASES, CONTAINER_ID, NETNS, RESULT, Case, network, observe
from tests.unit.libcni.doubles import Plugins
from worker.cni import BUSY_PAUSE_S, BUSY_TRIES, Attachment, CniRuntime
from worker.cni_config import Network, find_network, network_from_bytes
from worker.errors import BadInput, BadNetwork, CniPluginError, ProcessTimeout, SandbatchError

RECORDINGS = json.loads((Path(__file__).parent / "libcni/recordings.json").read_text())


def run_ours(case: Case, folder: Path) -> list[dict[str, object]]:
    cache_dir = folder / "cache"
    plugins = case.prepare(folder, cache_dir)
    runtime = CniRuntime((plugins.folder,), cache_dir, folder / "lock", timeout_s=30)
    pairs = [pair.split("=") for pair in case.cni_args.split(";") if pair]
    attachment = Attachment(
        CONTAINER_ID, Path(NETNS), case.if_name, tuple((a, b) for a, b in pairs), case.capability_args
    )
    seen = []
    for step in case.steps:
        failed, result = False, None
        try:
            network = find_network(case.name, [folder / "net.d"])
            if step == "ADD":
                result = runtime.cni_add(network, attachment)
            elif step == "DEL":
                runtime.cni_del(network, attachment)
            elif step == "CHECK":
                runtime.cni_check(network, attachment)
            elif step == "STATUS":
                runtime.cni_status(network)
            elif step == "GC":
                failed = runtime.cni_gc(network, None) != []
        except SandbatchError:
            failed = True
        seen.append(observe(plugins, cache_dir, failed=failed, result=result))
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.about)
def test_the_plugins_see_what_they_saw_of_cnitool(case, tmp_path):
    """Order, environment, stdin, results, the cache: who changes the runtime must not notice."""
    ours = run_ours(case, tmp_path)
    for step, mine, theirs in zip(case.steps, ours, RECORDINGS[case.about], strict=True):
        assert mine == theirs, f"after {step}"


@dataclass
class Lab:
    """A runtime, its plugins and a list of two."""

    folder: Path
    plugins: Plugins

    @property
    def runtime(self) -> CniRuntime:
        return CniRuntime((self.plugins.folder,), self.folder / "cache", self.folder / "lock", timeout_s=5)

    @property
    def attachment(self) -> Attachment:
        return Attachment(CONTAINER_ID, Path(NETNS))

    def network(self, *plugins: object, version: str = "1.0.0") -> Network:
        return network_from_bytes(json.dumps(network(version, *plugins)).encode())

    def script(self, plugin: str, text: str) -> None:
        (self.plugins.folder / plugin).write_text(f"#!/bin/sh\n{text}\n")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    plugins = Plugins(tmp_path / "bin")
    plugins.add("one", "two")
    for name in ("one", "two"):
        plugins.answer(name, "ADD", RESULT)
    return Lab(tmp_path, plugins)


def test_gc_tells_the_plugins_what_is_valid(lab):
    """Under both names: the first edition of the spec had the wrong one (libcni #1101)."""
    network = lab.network(version="1.1.0")
    lab.runtime.cni_add(network, lab.attachment)
    lab.plugins.take_calls()
    assert lab.runtime.cni_gc(network, [lab.attachment]) == []
    calls = lab.plugins.take_calls()
    assert [(call.plugin, call.command) for call in calls] == [("one", "GC"), ("two", "GC")]
    valid = [{"containerID": CONTAINER_ID, "ifname": "eth0"}]
    for call in calls:
        assert call.stdin["cni.dev/valid-attachments"] == call.stdin["cni.dev/attachments"] == valid
        assert {call.env[name] for name in ("CONTAINERID", "NETNS", "IFNAME", "ARGS")} == {""}
    assert lab.runtime.is_attached("net", lab.attachment)


def test_gc_goes_on_after_errors_and_returns_them(lab):
    lab.plugins.answer("one", "GC", {"code": 7, "msg": "first"}, exit_code=1)
    lab.plugins.answer("two", "GC", {"code": 7, "msg": "second"}, exit_code=1)
    errors = lab.runtime.cni_gc(lab.network(version="1.1.0"), [])
    assert [error.msg for error in errors] == ["first", "second"]


def test_gc_waits_for_an_add_and_no_add_begins_meanwhile(lab):
    """An ADD that runs beside GC is not among the valid ones yet: GC would free its address."""
    gate = lab.folder / "gate"
    os.mkfifo(gate)
    lab.script("one", f'cat > /dev/null; [ "$CNI_COMMAND" = GC ] || cat {gate} > /dev/null; echo "{{}}"')
    network = lab.network({"type": "one"}, version="1.1.0")
    with ThreadPoolExecutor() as pool:
        adding = pool.submit(lab.runtime.cni_add, network, lab.attachment)
        with gate.open("w"):  # opens once the plugin reads: ADD is in the middle of its work
            collecting = pool.submit(lab.runtime.cni_gc, network, [lab.attachment])
            with pytest.raises(TimeoutError):
                collecting.result(timeout=0.2)
        assert adding.result(timeout=5)["cniVersion"] == "1.1.0"
        assert collecting.result(timeout=5) == []


def test_two_adds_run_side_by_side(lab):
    gate = lab.folder / "gate"
    os.mkfifo(gate)
    lab.script("one", f'cat > /dev/null; cat {gate} > /dev/null; echo "{{}}"')
    other = Attachment("other", Path(NETNS))
    with ThreadPoolExecutor() as pool:
        adding = pool.submit(lab.runtime.cni_add, lab.network({"type": "one"}), lab.attachment)
        with gate.open("w"):
            lab.runtime.cni_add(lab.network({"type": "two"}), other)
        adding.result(timeout=5)


def test_a_plugin_that_is_being_written_is_tried_again(lab, monkeypatch):
    """An upgrade of the plugins package: the kernel calls such a file busy."""
    writer = (lab.plugins.folder / "one").open("a")
    sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda pause_s: writer.close() if pause_s == BUSY_PAUSE_S else sleep(pause_s)
    )
    assert lab.runtime.cni_add(lab.network(), lab.attachment)["cniVersion"] == "1.0.0"
    assert writer.closed


def test_a_plugin_that_stays_busy_is_an_error_in_the_end(lab, monkeypatch):
    pauses, sleep = [], time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda pause_s: (pauses.append if pause_s == BUSY_PAUSE_S else sleep)(pause_s)
    )
    with (lab.plugins.folder / "one").open("a"), pytest.raises(CniPluginError, match="Text file busy"):
        lab.runtime.cni_add(lab.network(), lab.attachment)
    assert len(pauses) == BUSY_TRIES - 1


def test_a_plugin_that_hangs_is_ended_with_its_children(lab):
    """A delegate such as host-local is a child of the plugin."""
    held = lab.folder / "held"
    os.mkfifo(held)
    lab.script("one", f"exec 3> {held}; sleep 60 & sleep 60")
    runtime = CniRuntime((lab.plugins.folder,), lab.folder / "cache", lab.folder / "lock", timeout_s=0.5)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(held.read_bytes)  # ends with the last process that holds it
        with pytest.raises(ProcessTimeout, match=r"one: no end within 0\.5 s"):
            runtime.cni_add(lab.network(), lab.attachment)
        assert reading.result(timeout=5) == b""


def test_our_settings_do_not_reach_the_plugins(lab, monkeypatch):
    """The broker's address may hold a password; PATH must reach them, since they run iptables."""
    monkeypatch.setenv("SANDBATCH_BROKER_URL", "redis://:secret@x")
    monkeypatch.setenv("CNI_ARGS", "of=ours")
    lab.script("one", 'env > "${0%/*}/env"; echo "{}"')
    lab.runtime.cni_add(lab.network({"type": "one"}), lab.attachment)
    env = dict(line.split("=", 1) for line in (lab.plugins.folder / "env").read_text().splitlines())
    assert not [name for name in env if name.startswith("SANDBATCH")]
    assert env["PATH"] == os.environ["PATH"]
    assert env["CNI_ARGS"] == ""


@pytest.mark.parametrize("container_id", ["", "-a", "a/b", "../a", "a b", "a\n"])
def test_a_container_id_that_is_none_is_refused_before_any_plugin_runs(lab, container_id):
    with pytest.raises(BadInput, match="is no CNI container id"):
        lab.runtime.cni_add(lab.network(), Attachment(container_id, Path(NETNS)))
    assert lab.plugins.take_calls() == []


@pytest.mark.parametrize("if_name", ["", ".", "..", "a/b", "a:b", "a b", "a\n", "e" * 16, "é" * 8])
def test_an_interface_name_that_linux_refuses_is_refused_first(lab, if_name):
    with pytest.raises(BadInput, match="is no name of an interface"):
        lab.runtime.cni_add(lab.network(), Attachment(CONTAINER_ID, Path(NETNS), if_name))
    assert lab.plugins.take_calls() == []


@pytest.mark.parametrize(
    ("answer", "code", "msg"),
    [
        ({"stdout": {"code": 11, "msg": "later", "details": "soon"}}, 11, "later; soon"),
        ({"stdout": {"msg": "no code"}}, 0, "no code"),
        ({"stdout": {"code": 7}, "stderr": "words\n"}, 0, "exit status 1: words"),
        ({"stdout": {"code": "7", "msg": "x"}}, 0, 'exit status 1: {"code": "7", "msg": "x"}'),
        ({"stdout": "garbage\n", "stderr": "a\nlast\n"}, 0, "exit status 1: last"),
        ({"stdout": "garbage\n"}, 0, "exit status 1: garbage"),
        ({}, 0, "exit status 1: it said nothing"),
    ],
)
def test_the_error_of_a_plugin_is_in_its_own_words(lab, answer, code, msg):
    lab.plugins.answer("one", "ADD", exit_code=1, **answer)
    with pytest.raises(CniPluginError) as caught:
        lab.runtime.cni_add(lab.network(), lab.attachment)
    assert (caught.value.code, caught.value.msg) == (code, msg)
    assert caught.value.can_pass is (code == 11)
    assert "CNI ADD by plugin one" in str(caught.value)


def test_a_result_that_is_none_names_the_plugin_and_shows_what_it_printed(lab):
    lab.plugins.answer("two", "ADD", "hello\nworld\n")
    with pytest.raises(CniPluginError, match=r"plugin two .*it printed 'world'"):
        lab.runtime.cni_add(lab.network(), lab.attachment)
    assert not lab.runtime.is_attached("net", lab.attachment)


def test_a_plugin_that_is_missing_says_where_it_was_looked_for(lab):
    (lab.plugins.folder / "three").mkdir()
    network = lab.network({"type": "three", "ipam": {"type": "four"}}, {"type": "one"})
    with pytest.raises(CniPluginError, match=f"not found in {lab.plugins.folder}; run sandbatch setup"):
        lab.runtime.cni_add(network, lab.attachment)
    assert lab.runtime.missing_plugins(network) == ["three", "four"]


def test_check_of_a_list_that_has_none_is_bad_input(lab):
    with pytest.raises(BadNetwork, match=r"CNI 0.3.1 has no CHECK; raise its cniVersion"):
        lab.runtime.cni_check(lab.network(version="0.3.1"), lab.attachment)


def test_version_is_asked_as_old_plugins_want_it(lab):
    lab.plugins.answer("one", "VERSION", {"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]})
    assert lab.runtime.cni_version("one") == ["0.4.0", "1.0.0"]
    (call,) = lab.plugins.take_calls()
    assert call.stdin == {"cniVersion": "1.1.0"}
    assert (call.env["NETNS"], call.env["IFNAME"], call.env["PATH"]) == ("dummy", "dummy", "dummy")


def test_version_of_plugins_that_know_no_version(lab):
    lab.plugins.answer("one", "VERSION", {"code": 4, "msg": "unknown CNI_COMMAND: VERSION"}, exit_code=1)
    lab.plugins.answer("two", "VERSION", {"cniVersion": "0.2.0"})
    assert lab.runtime.cni_version("one") == ["0.1.0"]
    assert lab.runtime.cni_version("two") == ["0.1.0", "0.2.0"]


@pytest.mark.parametrize(
    "answer", ["", "bridge v1", '{"cniVersion": "1.0.0"}', '{"supportedVersions": ["1.0.0"]}']
)
def test_version_of_what_is_no_plugin_is_an_error(lab, answer):
    lab.plugins.answer("one", "VERSION", answer)
    with pytest.raises(CniPluginError, match="no list of versions"):
        lab.runtime.cni_version("one")
