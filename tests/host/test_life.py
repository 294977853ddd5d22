"""The life of a sandbox through the whole system, on real parts, by the command line."""

import json
import urllib.request
from pathlib import Path

from bench.memory import measure
from tests.host.system import SERVER, System


def test_a_sandbox_of_the_tutorial_runs_answers_and_leaves_nothing(clean_system: System):
    """The promise in small: up, fetched, removed, and the audit finds nothing."""
    ids = clean_system.run("--count", "3", "--wait", *SERVER)

    rows = clean_system.ls()
    pages = [urllib.request.urlopen(f"http://{rows[one]['ip']}:8000/", timeout=5).read() for one in ids]
    assert pages == [b"Hello World!\n"] * 3
    assert clean_system.audit() == []

    clean_system.cli("rm", *ids)
    assert {clean_system.ls()[one]["state"] for one in ids} == {"exited"}
    assert list(clean_system.sandboxes.iterdir()) == []


def test_show_has_the_timeline_of_stages_and_undos(clean_system: System):
    """`show` is where an operator looks first: every stage and undo with its time."""
    (container_id,) = clean_system.run("--label", "team=red", "--wait", *SERVER)
    clean_system.cli("rm", container_id)

    shown = clean_system.show(container_id)
    done = [(run["name"], run["do|undo"], run["state"]) for run in shown["stages"]]
    stages = ["netns", "network", "bundle", "container", "ready"]
    assert done == [
        *((name, "do", "done") for name in stages),
        *((name, "undo", "done") for name in reversed(stages)),
    ]
    assert all(run["duration_s"] >= 0 and run["started_at"].endswith("Z") for run in shown["stages"])
    assert shown["labels"] == {"team": "red"}
    assert shown["created_at"] < shown["running_at"] < shown["ended_at"]


def test_an_id_may_be_shortened_to_a_prefix_that_only_one_has(clean_system: System):
    """People do not type 19 characters."""
    (container_id,) = clean_system.run("--wait", *SERVER)
    assert clean_system.show(container_id[:12])["id"] == container_id
    refused = clean_system.cli("show", "sb-", check=False)
    assert refused.returncode == 2
    assert "sandboxes begin so" in refused.stderr


def test_environment_and_working_directory_reach_the_command(clean_system: System):
    """What the spec says is what the sandbox gets."""
    script = "import http.server, os; os.chdir('/tmp'); open('index.html','w').write(os.environ['COLOUR']); "
    script += "http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
    args = ("--env", "COLOUR=red", "--ready", "http:8000/", "--wait", "--", "python3", "-c", script)
    (container_id,) = clean_system.run(*args)
    ip = clean_system.show(container_id)["ip"]
    assert urllib.request.urlopen(f"http://{ip}:8000/", timeout=5).read() == b"red"


def test_waiting_for_probes_holds_no_launch_slot(clean_system: System):
    """Of 20 sandboxes that answer only after 8 s more than its 4 slots wait at the same time."""
    script = "import time, http.server; time.sleep(8); "
    script += "http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
    ids = clean_system.run("--count", "20", "--ready", "tcp:8000", "--", "python3", "-c", script)

    states = clean_system.wait(ids, "running", 90)

    assert set(states.values()) == {"running"}
    rows = clean_system.ls()
    waits = [run for one in ids for run in rows[one]["stages"] if run["name"] == "ready"]
    began = sorted(run["started_at"] for run in waits)
    ended = sorted(run["ended_at"] for run in waits)
    assert began[3 * 4] < ended[0], "each slot has launched three more before the first had its answer"


def test_removing_what_is_queued_for_a_host_that_is_not_there_cancels_it(clean_system: System):
    """Nobody has taken it, so nothing is to be undone."""
    record = clean_system.cli("run", "--host", "nowhere", "--", "true", check=False)
    assert record.returncode == 2
    assert "known: test" in record.stderr


def test_sandboxes_outlive_a_restart_of_the_worker(clean_system: System):
    """`up` may be stopped and started: sandboxes go on."""
    (container_id,) = clean_system.run("--wait", *SERVER)
    ip = clean_system.show(container_id)["ip"]

    clean_system.stop()
    assert urllib.request.urlopen(f"http://{ip}:8000/", timeout=5).status == 200
    clean_system.start()

    assert clean_system.show(container_id)["state"] == "running"
    assert clean_system.audit() == []
    clean_system.cli("rm", container_id)
    assert clean_system.show(container_id)["state"] == "exited"


def test_the_tutorials_two_files_work_unchanged(clean_system: System):
    """The files of gVisor's "Using CNI", as they are but for the names of bridge and subnet."""
    mynet = {
        "cniVersion": "0.3.1",
        "name": "mynet",
        "type": "bridge",
        "bridge": clean_system.bridge,
        "isGateway": True,
        "ipMasq": True,
        "ipam": {
            "type": "host-local",
            "subnet": clean_system.subnet,
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(clean_system.folder / "cni" / "networks"),
        },
    }
    (clean_system.conf_dir / "10-bridge.conf").write_text(json.dumps(mynet))
    loopback = {"cniVersion": "0.3.1", "name": "lo", "type": "loopback"}
    (clean_system.conf_dir / "99-loopback.conf").write_text(json.dumps(loopback))

    (container_id,) = clean_system.run("--network", "mynet", "--wait", *SERVER)

    ip = clean_system.show(container_id)["ip"]
    assert urllib.request.urlopen(f"http://{ip}:8000/", timeout=5).read() == b"Hello World!\n"
    assert clean_system.audit() == []


def test_the_processes_of_a_worker_share_what_they_have_loaded(clean_system: System):
    """Else each pool process has a copy of its own, and a host with many slots pays for many Pythons."""
    main, *pool = measure(clean_system.worker_pid(), ("worker", "pool"))
    assert {one.kind for one in pool} == {"pool"}
    for one in pool:
        assert one.private < main.rss / 3, f"{one.private >> 20} MiB of {main.rss >> 20} MiB are its own"
    loaded = Path(f"/proc/{main.pid}/maps").read_text()
    assert "tornado" not in loaded, "the command line of Celery comes with all of Flower"
