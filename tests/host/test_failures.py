"""Each stage made to fail once: `failed`, the right stage and reason in `show`, and nothing left."""

import json

import pytest

from tests.host.system import SERVER, System

RUNSC_GONE = "SANDBATCH_RUNSC"


def failed(system: System, *args: str, timeout_s: float = 90) -> dict[str, str]:
    """Launch one sandbox that must fail; its error."""
    (container_id,) = system.run(*args)
    assert system.wait([container_id], "terminal", timeout_s) == {container_id: "failed"}
    assert system.audit() == []
    assert not (system.sandboxes / container_id).exists()
    error = system.show(container_id)["error"]
    undone = [run for run in system.show(container_id)["stages"] if run["do|undo"] == "undo"]
    assert all(run["state"] == "done" for run in undone)
    return dict(error)


@pytest.mark.parametrize(
    ("mode", "words"),
    [("ADD exit1", "no such moon; it is made of cheese (code 7)"), ("ADD garbage", "'segfault at 0x0'")],
)
def test_a_plugin_that_fails(clean_system: System, mode: str, words: str):
    """The plugin's own words reach the user, and the plugins before it are undone by DEL."""
    clean_system.faulty_plugin(mode)
    clean_system.network("faulty", chain=("faulty",))

    error = failed(clean_system, "--network", "faulty", *SERVER)

    assert error["stage"] == "network"
    assert words in error["message"]
    assert "plugin faulty" in error["message"]
    assert (clean_system.plugins / "calls").read_text().split()[-2:] == ["ADD", "DEL"]


def test_a_plugin_that_hangs(make_system):
    """Its deadline ends it, and it is not waited for again and again."""
    system = make_system(SANDBATCH_CNI_TIMEOUT_S="2")
    system.faulty_plugin("ADD hang")
    system.network("faulty", chain=("faulty",))
    system.start()

    error = failed(system, "--network", "faulty", *SERVER)

    assert error["stage"] == "network"
    assert "no end within 2 s" in error["message"]


def test_a_full_range_of_addresses(make_system):
    """A range of two takes two; the third waits, holds up nothing else, and has the first address freed."""
    system = make_system()
    base = system.subnet.removesuffix(".0/24")
    system.network("small", rangeStart=f"{base}.10", rangeEnd=f"{base}.11")
    system.start()
    ids = system.run("--count", "2", "--network", "small", "--wait", *SERVER)

    (third,) = system.run("--network", "small", *SERVER)

    system.run("--wait", "--", "true")  # the host has looked at what waits, and has room for this
    assert system.show(third)["state"] == "queued"
    address = system.show(ids[0])["ip"]
    system.cli("rm", ids[0])
    assert system.wait([third], "running") == {third: "running"}
    assert system.show(third)["ip"] == address


def test_a_command_that_the_rootfs_lacks(clean_system: System):
    """runsc's own words say what is missing."""
    error = failed(clean_system, "--", "no-such-program")
    assert error["stage"] == "container"
    assert "no-such-program" in error["message"]


def test_a_port_that_never_opens(clean_system: System):
    """The sandbox's last log lines tell why."""
    script = "print('I listen to nobody', flush=True); import time; time.sleep(600)"
    args = ("--ready", "tcp:8000", "--ready-timeout", "2", "--", "python3", "-c", script)
    error = failed(clean_system, *args)
    assert error["stage"] == "ready"
    assert "no answer to tcp:8000 within 2 s" in error["message"]
    assert "I listen to nobody" in error["message"]


def test_a_sandbox_that_ends_before_it_is_ready(clean_system: System):
    """Nobody waits for the deadline of a sandbox that has ended."""
    script = "print('out of paper'); raise SystemExit(3)"
    error = failed(clean_system, "--ready", "tcp:8000", "--", "python3", "-c", script, timeout_s=20)
    assert error["stage"] == "ready"
    assert "exit code 3" in error["message"]
    assert "out of paper" in error["message"]


def test_a_working_directory_that_the_rootfs_lacks(clean_system: System):
    """runsc would make it on the host: refused before anything is made."""
    before = clean_system.ls()
    done = clean_system.cli("run", "--cwd", "/no/such", "--", "true", check=False)
    assert done.returncode == 2
    assert "cwd /no/such" in done.stderr
    assert clean_system.ls() == before


def test_a_runsc_that_is_gone(make_system):
    """Taken away under a running worker: its next launch fails and says so."""
    system = make_system()
    binary = system.folder / "runsc"
    binary.write_text('#!/bin/sh\nexec runsc "$@"\n')
    binary.chmod(0o755)
    system.env[RUNSC_GONE] = str(binary)
    system.start()
    binary.unlink()

    error = failed(system, *SERVER)

    assert error["stage"] == "container"
    assert str(binary) in error["message"]


def test_a_worker_does_not_start_without_a_plugin(make_system):
    """It says what `doctor` says."""
    system = make_system(SANDBATCH_CNI_PATH="/nowhere")
    done = system.cli("up", check=False)
    assert done.returncode == 1
    assert "CNI plugin bridge: not in /nowhere" in done.stderr
    rows = json.loads(system.cli("doctor", "--json", check=False).stdout)
    assert {"CNI plugin bridge", "CNI plugin host-local"} <= {row["name"] for row in rows if not row["ok"]}


def test_a_worker_does_not_start_without_runsc(make_system):
    """A host that cannot run sandboxes takes none."""
    system = make_system(SANDBATCH_RUNSC="/nowhere/runsc")
    done = system.cli("up", check=False)
    assert done.returncode == 1
    assert "/nowhere/runsc: no such program" in done.stderr


def test_a_second_worker_of_a_host_is_refused(clean_system: System):
    """Two workers on the same folders would undo each other's sandboxes."""
    done = clean_system.cli("worker", check=False)
    assert done.returncode == 1
    assert f"another worker (pid {clean_system.worker_pid()}) runs on this machine" in done.stderr


# The first DEL takes the link away and goes no further, as one that is killed there.
CUT_SHORT = """#!/bin/sh
real=$(ls /opt/cni/bin/bridge /usr/lib/cni/bridge 2>/dev/null | head -n 1)
if [ "$CNI_COMMAND" = DEL ] && [ ! -e "$0.cut" ]; then
  touch "$0.cut"
  nsenter --net="$CNI_NETNS" ip link del "$CNI_IFNAME"
  echo '{"cniVersion":"1.0.0","code":11,"msg":"cut short"}'
  exit 1
fi
exec "$real"
"""


def test_a_del_after_a_failed_add_that_was_cut_short_is_repeated_whole(clean_system: System):
    """The bridge plugin finds its rules by the addresses on the link, which is gone by then."""
    clean_system.faulty_plugin("ADD exit1")
    clean_system.network("cut", chain=("faulty",))
    plugin = clean_system.plugins / "bridge"
    plugin.write_text(CUT_SHORT)
    plugin.chmod(0o755)

    (one,) = clean_system.run("--network", "cut", *SERVER)
    assert clean_system.wait([one], "terminal") == {one: "failed"}

    plugin.unlink()
    assert (clean_system.plugins / "bridge.cut").exists()
    assert clean_system.audit() == []
