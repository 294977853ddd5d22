"""`audit --mend` removes what is ours and provably dead, by the command line, and nothing else."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.host.machine import difference, snapshot
from tests.host.system import SERVER, System
from worker import netns, procs
from worker.audit import chain_name, ifb_name
from worker.journal import FILE

ORPHAN = "sb-00000000000000bb"
OTHER = "sb-00000000000000cc"  # of our pattern, but of somebody else


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def mend(system: System) -> list[dict[str, object]]:
    """The outcomes; the exit says whether all is clean."""
    done = system.cli("audit", "--mend", "--json", check=False)
    rows: list[dict[str, object]] = json.loads(done.stdout)
    assert done.returncode == (0 if all(row["mended"] for row in rows) else 1), done.stderr
    return rows


def whole(system: System) -> dict[str, object]:
    """The machine and the system's own folders, with the bytes of their files."""
    places = [system.sandboxes, system.folder / "cni", system.run_dir / "exits", system.run_dir / "runsc"]
    files = {
        str(path): path.read_bytes() if path.is_file() else path.lstat().st_mode
        for place in places
        for path in place.rglob("*")
        if path.name != "lock" and not path.is_socket()
    }
    return {**snapshot(), "files": files}


@pytest.fixture
def sandbox(clean_system: System) -> str:
    """A running sandbox: whatever is mended beside it, it stays as it is, byte for byte."""
    (container_id,) = clean_system.run("--wait", *SERVER)
    assert clean_system.audit() == []
    return container_id


# -- what an id holds ------------------------------------------------------------------------------


def add_netns(system: System) -> None:
    sh("ip", "netns", "add", ORPHAN)


def add_half_made_netns(system: System) -> None:
    netns.netns_path(ORPHAN).touch()


def add_link_to_a_netns(system: System) -> None:
    """By hand only; through it the netns of the running sandbox would be taken away."""
    (container_id,) = [name for name in os.listdir(system.sandboxes) if name != ORPHAN]
    netns.netns_path(ORPHAN).symlink_to(netns.netns_path(container_id))


def add_lease(system: System) -> None:
    folder = system.folder / "cni" / "networks" / "bridged"
    (folder / f"{system.subnet.removesuffix('.0/24')}.77").write_text(f"{ORPHAN}\r\neth0")


def chain_with_rules(comment_id: str) -> str:
    chain = chain_name("bridged", comment_id)
    comment = f'name: "bridged" id: "{comment_id}"'
    nat = ("iptables", "--wait", "-t", "nat")
    sh(*nat, "-N", chain)
    sh(*nat, "-A", chain, "-d", "10.0.0.0/24", "-m", "comment", "--comment", comment, "-j", "ACCEPT")
    sh(*nat, "-A", "POSTROUTING", "-s", "10.0.0.77", "-m", "comment", "--comment", comment, "-j", chain)
    return chain


def add_chain(system: System) -> None:
    chain_with_rules(ORPHAN)


def add_empty_chain(system: System) -> None:
    """Its name alone tells no id; that of the netns beside it does."""
    sh("ip", "netns", "add", ORPHAN)
    sh("iptables", "--wait", "-t", "nat", "-N", chain_name("bridged", ORPHAN))


def add_forward_chain(system: System) -> None:
    """portmap's: only the jump has a comment, and its shared chains stay for the others."""
    chain, comment = chain_name("bridged", ORPHAN, "DN-"), f'dnat name: "bridged" id: "{ORPHAN}"'
    match = (
        "-p",
        "tcp",
        "-m",
        "comment",
        "--comment",
        comment,
        "-m",
        "multiport",
        "--destination-ports",
        "81",
    )
    nat = ("iptables", "--wait", "-t", "nat")
    subprocess.run([*nat, "-N", "CNI-HOSTPORT-DNAT"], check=False, capture_output=True)
    sh(*nat, "-N", chain)
    sh(*nat, "-A", chain, "-p", "tcp", "--dport", "81", "-j", "DNAT", "--to-destination", "10.0.0.77:80")
    sh(*nat, "-A", "CNI-HOSTPORT-DNAT", *match, "-j", chain)


def add_port(system: System) -> None:
    (system.run_dir / "ports").mkdir(exist_ok=True)
    (system.run_dir / "ports" / "tcp-*-28081").symlink_to(ORPHAN)


def add_ifb(system: System) -> None:
    """Its name alone tells no id; that of the port beside it does."""
    add_port(system)
    sh("ip", "link", "add", ifb_name("bridged", ORPHAN), "type", "ifb")


def add_cache_entry(system: System) -> None:
    """A copy of a living one's: its address is in use."""
    entry = next((system.folder / "cni" / "results").iterdir())
    old = entry.name.removeprefix("bridged-").removesuffix("-eth0")
    entry.with_name(f"bridged-{ORPHAN}-eth0").write_text(entry.read_text().replace(old, ORPHAN))


def add_torn_cache_entry(system: System) -> None:
    (system.folder / "cni" / "results" / f"bridged-{ORPHAN}-eth0").write_text('{"kind":"cniC')


def add_half_written_cache_entry(system: System) -> None:
    (system.folder / "cni" / f".bridged-{ORPHAN}-eth0.sandbatch").write_text('{"kind":"cniC')


def add_folder(system: System) -> None:
    """As a launch leaves it whose journal is lost."""
    folder = system.sandboxes / ORPHAN
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "config.json").write_text("{}")
    (folder / "bundle" / "away").symlink_to(system.sandboxes)
    (folder / "container.log").write_text("x")
    (folder / f".{FILE}.77").write_text("x")


def add_exit_file(system: System) -> None:
    (system.run_dir / "exits" / ORPHAN).write_text("0")


def add_runsc_state(system: System) -> None:
    (system.run_dir / "runsc" / f"{ORPHAN}_sandbox:{ORPHAN}.state").write_text("{}")


def add_mount(system: System) -> None:
    place = system.run_dir / "runsc" / f"{ORPHAN}.mnt"
    place.touch()
    sh("mount", "--bind", "/etc/hostname", str(place))


@pytest.mark.parametrize(
    ("add", "kinds"),
    [
        (add_netns, {"netns"}),
        (add_half_made_netns, {"netns"}),
        (add_link_to_a_netns, {"netns"}),
        (add_lease, {"lease"}),
        (add_chain, {"nat chain"}),
        (add_empty_chain, {"nat chain", "netns"}),
        (add_forward_chain, {"nat chain"}),
        (add_port, {"port"}),
        (add_ifb, {"ifb", "port"}),
        (add_cache_entry, {"cni cache"}),
        (add_torn_cache_entry, {"cni cache"}),
        (add_half_written_cache_entry, {"cni cache"}),
        (add_folder, {"folder"}),
        (add_exit_file, {"exit file"}),
        (add_runsc_state, {"runsc state"}),
        (add_mount, {"mount", "runsc state"}),
    ],
)
def test_what_an_orphan_holds_is_removed(
    clean_system: System, sandbox: str, add: Callable[[System], None], kinds: set[str]
):
    """Each by itself, as a crash may leave any part; the sandbox beside it does not notice."""
    before = whole(clean_system)
    add(clean_system)

    outcomes = mend(clean_system)

    assert {row["kind"] for row in outcomes} == kinds
    assert all(row["mended"] for row in outcomes), outcomes
    assert whole(clean_system) == before
    assert mend(clean_system) == []


def test_the_processes_of_an_orphan_are_ended(clean_system: System, sandbox: str):
    """By its root and its id on the command line, through a pidfd that its start time proves."""
    words = [f"--root={clean_system.run_dir}/runsc", "boot", ORPHAN]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words]) as process:
        clean_system.wait_until(
            lambda: procs.identify(process.pid, clean_system.run_dir / "runsc"), 10, "its command line"
        )
        assert [row["kind"] for row in mend(clean_system)] == ["process"]
        assert process.wait(10) == -signal.SIGKILL
    assert clean_system.ls()[sandbox]["state"] == "running"
    assert clean_system.audit() == []


def test_a_whole_sandbox_whose_journal_is_lost_is_undone(make_system):
    """Processes, netns, link, lease, rules, cache entry: CNI DEL has the entry's own configuration."""
    system = make_system()
    system.start()
    lost, kept = system.run("--count", "2", "--wait", *SERVER)
    (system.sandboxes / lost / FILE).unlink()
    (system.conf_dir / "bridged.conflist").unlink()  # DEL does not need today's files

    outcomes = mend(system)

    kinds = {row["kind"] for row in outcomes if row["container_id"] == lost}
    assert {"netns", "cni cache", "lease", "nat chain", "process", "runsc state", "folder"} <= kinds
    assert all(row["mended"] for row in outcomes), outcomes
    assert not (system.sandboxes / lost).exists()
    assert system.ls()[kept]["state"] == "running"
    assert system.audit() == []
    system.network("bridged")


def test_an_orphan_s_link_on_our_own_bridge_is_removed(make_system: Callable[..., System]):
    """An ADD that was killed before its result was kept; on any other bridge it may be anybody's."""
    system = make_system(SANDBATCH_NETWORK="sandbatch")
    system.start()
    (container_id,) = system.run("--wait", *SERVER)
    bridge = system.own_bridge()
    sh("ip", "link", "add", "vethdeadbee1", "type", "veth", "peer", "name", "sbtpeer1")
    sh("ip", "link", "add", "vethdeadbee2", "type", "veth", "peer", "name", "sbtpeer2")
    sh("ip", "link", "add", "vethdeadbee3", "type", "veth", "peer", "name", "sbtpeer3")
    sh("ip", "link", "add", "sbtbr2", "type", "bridge")
    sh("ip", "netns", "add", "sbt-other")
    try:
        sh("ip", "link", "set", "vethdeadbee1", "master", bridge)
        sh("ip", "link", "set", "sbtpeer3", "netns", "sbt-other")
        sh("ip", "link", "set", "vethdeadbee3", "master", bridge)
        sh("ip", "link", "set", "vethdeadbee2", "nomaster")
        links = sh("ip", "-o", "link")

        outcomes = {row["name"]: row for row in mend(system)}

        assert {name: row["mended"] for name, row in outcomes.items()} == {
            "vethdeadbee1": True,
            "vethdeadbee2": False,
            "vethdeadbee3": False,
        }
        assert "its other end is in /var/run/netns/sbt-other" in str(outcomes["vethdeadbee3"]["why"])
        assert "not on the bridge of our own network" in str(outcomes["vethdeadbee2"]["why"])
        gone = {line.split(": ")[1].split("@")[0] for line in links.splitlines()} - {
            line.split(": ")[1].split("@")[0] for line in sh("ip", "-o", "link").splitlines()
        }
        assert gone == {"vethdeadbee1", "sbtpeer1"}
        assert system.ls()[container_id]["state"] == "running"
    finally:
        for name in ("vethdeadbee1", "vethdeadbee2", "vethdeadbee3", "sbtbr2"):
            subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        sh("ip", "netns", "del", "sbt-other")
        system.cli("rm", "--all")
        sh("ip", "link", "del", bridge)


# -- what is not touched ---------------------------------------------------------------------------


def test_things_of_others_stay_byte_for_byte(clean_system: System, sandbox: str):
    """Names that are near ours; another runtime's attachment on the same network; its chain."""
    results, leases = clean_system.folder / "cni" / "results", clean_system.folder / "cni/networks/bridged"
    other = f"my-{ORPHAN}"
    chain = chain_with_rules(other)
    sh("ip", "netns", "add", f"{ORPHAN}0")
    entry = json.loads(next(results.iterdir()).read_text())
    entry |= {"containerId": other, "result": {**entry["result"], "ips": []}}
    (results / f"bridged-{other}-eth0").write_text(json.dumps(entry))
    (leases / f"{clean_system.subnet.removesuffix('.0/24')}.78").write_text(f"{other}\r\neth0")
    try:
        before = whole(clean_system)
        sh("ip", "netns", "add", ORPHAN)
        rows = mend(clean_system)
        assert [row["name"] for row in rows if row["mended"]] == [ORPHAN]
        assert whole(clean_system) == before
    finally:
        sh("ip", "netns", "del", f"{ORPHAN}0")
        jump = next(
            one for one in sh("iptables-save", "-t", "nat").splitlines() if one.endswith(f"-j {chain}")
        )
        subprocess.run(f"iptables --wait -t nat -D {jump[3:]}", shell=True, check=True)  # noqa: S602 - its own quoting
        sh("iptables", "--wait", "-t", "nat", "-F", chain)
        sh("iptables", "--wait", "-t", "nat", "-X", chain)
        (results / f"bridged-{other}-eth0").unlink()
        (leases / f"{clean_system.subnet.removesuffix('.0/24')}.78").unlink()


def test_an_empty_chain_of_nobody_is_left(clean_system: System, sandbox: str):
    """It may be another runtime's ADD, which has made its chain and not yet its rules."""
    chain = chain_name("bridged", ORPHAN)
    sh("iptables", "--wait", "-t", "nat", "-N", chain)
    try:
        (row,) = mend(clean_system)
        assert (row["name"], row["mended"]) == (chain, False)
        assert "nothing proves whose it is" in str(row["why"])
    finally:
        sh("iptables", "--wait", "-t", "nat", "-X", chain)


def test_a_netns_in_which_somebody_lives_is_left(clean_system: System, sandbox: str):
    """Its name is ours, the process in it is not: it is not dead."""
    sh("ip", "netns", "add", ORPHAN)
    argv = ["ip", "netns", "exec", ORPHAN, sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (row,) = mend(clean_system)
        assert not row["mended"]
        assert f"process {process.pid} lives in it" in str(row["why"])
        assert netns.netns_exists(ORPHAN)
        process.communicate(b"\n")
    assert [row["mended"] for row in mend(clean_system)] == [True]


def test_a_netns_of_another_mount_namespace_is_left(clean_system: System, sandbox: str):
    """From a container that only shares the folder, its name looks half-made."""
    script = f"ip netns add {ORPHAN} && echo done && read line"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not netns.netns_exists(ORPHAN)
        (row,) = mend(clean_system)
        assert not row["mended"]
        assert "another mount namespace" in str(row["why"])
        assert netns.netns_path(ORPHAN).exists()
        process.communicate(b"\n")
    assert [row["mended"] for row in mend(clean_system)] == [True]


def test_the_sandbox_of_another_sandbatch_is_left(clean_system: System, sandbox: str):
    """It has folders of its own, so no journal here; its process has another runsc root."""
    sh("ip", "netns", "add", OTHER)
    argv = [sys.executable, "-c", "print(flush=True); input()", "--root=/elsewhere/runsc", "boot", OTHER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (row,) = mend(clean_system)
        assert not row["mended"]
        assert "of another runsc root" in str(row["why"])
        process.communicate(b"\n")
    sh("ip", "netns", "del", OTHER)


def test_what_another_sandbatch_launches_at_the_moment_is_left(
    clean_system: System, sandbox: str, make_system: Callable[..., System]
):
    """Before its sandbox has a process, its worker's journals speak for it."""
    other = make_system()
    other.start()
    folder = other.sandboxes / OTHER
    folder.mkdir(parents=True)
    (folder / FILE).write_text("whatever it says")
    sh("ip", "netns", "add", OTHER)
    try:
        (row,) = mend(clean_system)
        assert not row["mended"]
        assert f"it is in {other.sandboxes}" in str(row["why"])
    finally:
        sh("ip", "netns", "del", OTHER)
        shutil.rmtree(folder)


def test_what_somebody_works_on_is_left(clean_system: System, sandbox: str):
    """The lock of a sandbox's folder is its own: who has it is about to begin a stage."""
    folder = clean_system.sandboxes / ORPHAN
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (row,) = mend(clean_system)
        assert not row["mended"]
        assert "somebody works on it" in str(row["why"])
    finally:
        os.close(handle)
    assert [row["mended"] for row in mend(clean_system)] == [True]


def test_strange_files_in_a_folder_are_left(clean_system: System, sandbox: str):
    folder = clean_system.sandboxes / ORPHAN
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    (folder / "container.log").touch()
    (row,) = mend(clean_system)
    assert not row["mended"]
    assert "thesis.tex in it is none of ours" in str(row["why"])
    assert os.listdir(folder) == ["thesis.tex"]
    shutil.rmtree(folder)


def test_what_is_missing_cannot_be_mended(clean_system: System, sandbox: str):
    """To make it anew would be a second ADD."""
    lease = clean_system.folder / "cni/networks/bridged" / clean_system.show(sandbox)["ip"]
    lease.unlink()
    (row,) = mend(clean_system)
    assert (row["problem"], row["mended"]) == ("missing", False)
    assert "sandbatch rm" in str(row["why"])


def test_launches_while_it_mends_all_run(clean_system: System):
    """Whatever stage a launch is in, its journal was there before its objects."""
    sh("ip", "netns", "add", ORPHAN)
    ids = clean_system.run("--count", "6", *SERVER)
    for _ in range(4):
        mend(clean_system)
    assert set(clean_system.wait(ids, "running").values()) == {"running"}
    assert clean_system.audit() == []


# -- undos that are due ----------------------------------------------------------------------------


def test_a_stuck_sandbox_is_undone_once_it_can_be_and_no_worker_runs(make_system):
    """The worker goes on trying by itself; without one, mend does what is due."""
    system = make_system()
    system.faulty_plugin("DEL exit1")
    system.network("faulty", chain=("faulty",))
    system.start()
    (container_id,) = system.run("--network", "faulty", "--wait", *SERVER)
    system.cli("rm", container_id, check=False)
    (row,) = [row for row in mend(system) if row["problem"] == "stuck"]
    assert not row["mended"]
    assert "the worker goes on trying" in str(row["why"])
    system.stop()

    (row,) = [row for row in mend(system) if row["problem"] == "stuck"]
    assert not row["mended"]
    assert "no such moon" in str(row["why"])

    (system.plugins / "mode").write_text("")
    assert mend(system) == []
    assert system.audit() == []
    system.start()
    assert system.wait([container_id], "terminal") == {container_id: "exited"}


# -- journals that cannot be read ------------------------------------------------------------------


@contextlib.contextmanager
def stopped(system: System) -> Iterator[None]:
    system.stop()
    yield
    system.start()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda text: "", "empty"),
        (lambda text: text[: len(text) // 2] + "\n" + text[len(text) // 2 :], "torn"),
        (lambda text: '{"apiVersion": "v1", "kind": "Pod"}\n', "foreign"),
        (lambda text: text.replace("journal/v1", "journal/v7"), "release-journal_v7"),
    ],
    ids=["empty", "torn", "foreign", "release"],
)
def test_a_journal_that_cannot_be_read_is_set_aside_and_its_sandbox_mended(make_system, spoil, kind):
    """The rest goes on; audit names it; mend undoes what it held and keeps the file for the operator."""
    system = make_system()
    system.start()
    bad, good = system.run("--count", "2", "--wait", *SERVER)
    path = system.sandboxes / bad / FILE
    with stopped(system):
        spoiled = spoil(path.read_text())
        path.write_text(spoiled)

    (aside,) = (system.sandboxes / bad).glob(f"{FILE}.*")
    assert aside.name.startswith(f"{FILE}.{kind}-")
    assert f"unreadable journal {aside}" in system.audit()
    assert system.ls()[good]["state"] == "running"
    assert len(system.run("--wait", *SERVER)) == 1

    outcomes = mend(system)

    assert all(row["mended"] for row in outcomes), outcomes
    assert {row["container_id"] for row in outcomes} <= {bad, ""}
    assert not (system.sandboxes / bad).exists()
    kept = system.folder / "state" / "set-aside" / f"{bad}.{aside.name}"
    assert kept.read_text() == spoiled
    assert system.audit() == []
    assert system.ls()[good]["state"] == "running"


def test_a_journal_that_breaks_under_a_running_worker_is_mended_too(clean_system: System, sandbox: str):
    """The worker can do nothing with it any more; it need not be started again."""
    (clean_system.sandboxes / sandbox / FILE).write_text("")
    assert f"unreadable journal {clean_system.sandboxes / sandbox / FILE}" in clean_system.audit()
    assert all(row["mended"] for row in mend(clean_system))
    assert clean_system.audit() == []


def test_misuse_and_a_clean_host(clean_system: System):
    """A clean host says so in one line, to people and to programs."""
    assert clean_system.cli("audit", "--mend", "--deep", check=False).returncode == 2
    done = clean_system.cli("audit", "--mend")
    assert (done.stdout, done.stderr) == ("", "audit: clean\n")
    sh("ip", "netns", "add", ORPHAN)
    done = clean_system.cli("audit", "--mend")
    assert "removed" in done.stdout
    assert ORPHAN in done.stdout
    assert done.stderr == "audit: 1 mended, 0 left\n"


# -- audit --deep ----------------------------------------------------------------------------------


def deep(system: System) -> tuple[int, list[dict[str, str]]]:
    done = system.cli("audit", "--deep", "--json", check=False)
    return done.returncode, json.loads(done.stdout)


def test_check_finds_no_fault_with_a_sandbox_that_runs_and_says_what_netstack_explains(
    clean_system: System, sandbox: str
):
    """netstack has taken the addresses off the interface: the bridge plugin misses them, rightly."""
    before = whole(clean_system)
    code, (row,) = deep(clean_system)
    assert code == 0
    assert (row["kind"], row["problem"], row["container_id"]) == ("check", "expected", sandbox)
    assert row["name"] == "bridged/eth0/bridge"
    assert row["detail"].startswith("expected: gVisor's netstack holds the addresses (Failed to match addr")
    assert whole(clean_system) == before


def test_check_finds_what_is_changed(clean_system: System, sandbox: str):
    """Without its link on the bridge the sandbox is cut off: no netstack explains that."""
    peer = sh("ip", "-n", sandbox, "-o", "link", "show", "eth0").split("@if")[1].split(":")[0]
    names = {
        line.split(": ")[0]: line.split(": ")[1].split("@")[0] for line in sh("ip", "-o", "link").splitlines()
    }
    sh("ip", "link", "del", names[peer])
    code, rows = deep(clean_system)
    assert code == 1
    assert [row["problem"] for row in rows if row["kind"] == "check"] == ["changed"]


def test_check_asks_each_plugin_of_a_list(clean_system: System):
    """An expected complaint of the first does not hide that of the next."""
    clean_system.faulty_plugin("CHECK exit1")
    clean_system.network("faulty", chain=("faulty",))
    clean_system.run("--network", "faulty", "--wait", *SERVER)
    code, rows = deep(clean_system)
    assert code == 1
    assert [(row["name"], row["problem"]) for row in rows] == [
        ("faulty/eth0/bridge", "expected"),
        ("faulty/eth0/faulty", "changed"),
    ]
    assert "no such moon" in rows[1]["detail"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"cniVersion": "0.3.1"}, "CNI 0.3.1 has no CHECK"), ({"disableCheck": True}, "disables CHECK")],
)
def test_lists_without_check_are_skipped_and_said_so(clean_system: System, change, words):
    clean_system.network("unchecked")
    file = clean_system.conf_dir / "unchecked.conflist"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    clean_system.run("--network", "unchecked", "--wait", *SERVER)
    code, (row,) = deep(clean_system)
    assert (code, row["problem"]) == (0, "skipped")
    assert words in row["detail"]


def test_nothing_of_all_this_is_left(clean_system: System):
    """What the tests above add by hand and mend takes away leaves the machine as it was."""
    before = snapshot()
    add_netns(clean_system)
    add_chain(clean_system)
    mend(clean_system)
    assert difference(before, snapshot()) == {}
