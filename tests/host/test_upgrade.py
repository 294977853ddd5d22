"""A host that is upgraded from release 0.1.0: its journals, its clients, and a message of one to come."""

import json
import os
from pathlib import Path
from typing import Any

from tasks.app import make_app, options
from tasks.connection import connect
from tasks.messages import Order
from tasks.record import Record
from tasks.submit import publish_place
from tests.broker.elder import DATA, Elder
from tests.host.system import System
from worker.settings import Settings

NETWORK = {"networks": [{"name": "bridged", "ips": [], "mac": None, "aliases": []}]}
BEFORE, WANTED = "sb-00000000000000f1", "sb-00000000000000f2"


def write_journal(system: System) -> Path:
    """What release 0.1.0 has left of a running sandbox, on a machine that was rebooted since."""
    folder = system.sandboxes / BEFORE
    folder.mkdir(parents=True, mode=0o700)
    text = (DATA / "journal.jsonl").read_text().replace("@FOLDER@", str(system.folder))
    text = text.replace("@BRIDGE@", system.bridge).replace("@NET@.", system.subnet.removesuffix("0/24"))
    (folder / "journal.jsonl").write_text(text)
    lease = system.folder / "cni" / "networks" / "bridged" / f"{system.subnet.removesuffix('0/24')}11"
    lease.parent.mkdir(parents=True)
    lease.write_text(f"{BEFORE}\r\neth0")
    return lease


def test_an_upgraded_host_goes_on_with_what_the_release_before_has_left(make_system: Any) -> None:
    system = make_system()
    lease = write_journal(system)
    system.start()
    settings = Settings(run_dir=system.run_dir, broker_url="", host="test")
    with connect(settings) as client, make_app(settings, "client") as sender:
        # A client of 0.1.0, and a message of a release to come.
        record = Record(client)
        spec = json.loads((DATA / "words.json").read_text())["spec"]
        spec = json.dumps({**json.loads(spec), "args": ["sleep", "600"], "memory_bytes": None} | NETWORK)
        Elder(client, record).enqueue(WANTED, spec)
        publish_place(sender, [(WANTED, 1, None)])
        order = Order(container_id=WANTED, attempt=1).model_dump()
        sender.send_task("sandbatch.hibernate", kwargs={"message": order}, **options("place", "test"))
        assert system.wait([WANTED], "running") == {WANTED: "running"}
        assert system.wait([BEFORE], "terminal")[BEFORE] in ("exited", "failed")
        assert not lease.exists()
        assert not os.path.exists(f"/var/run/netns/{BEFORE}")
        system.wait_until(lambda: record.live_hosts()["test"]["foreign"] == 1, 15, "word of the message")
    assert "sandbatch.hibernate is not for release" in system.log()
    system.cli("rm", "--all")
    assert system.audit() == []
