"""What an image's config says is what its sandbox does, and the command line's word counts before it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.host.system import System
from tests.images.make import Layout, busybox
from worker.image_entry import FILE, fingerprint

# It ends by INT alone, and says who it is.
SERVER = """
echo "$(id -u):$(id -g):$(id -G) $HOME $PWD $GREETING"
touch /home/app/mine /tmp/mine && echo wrote
touch /etc/mine || echo refused
trap 'echo interrupted; exit 3' INT
trap '' TERM
sleep 600 & wait
"""
CONFIG = {
    "entrypoint": ["/bin/sh"],
    "cmd": ["/server"],
    "env": ["PATH=/bin", "GREETING=hello from the image"],
    "user": ["app"],
    "workingdir": ["/srv/work"],
    "stopsignal": ["SIGINT"],
    "label": ["org.example.team=web"],
}
WHO = 'echo "$(id -u):$(id -g):$(id -G) $HOME $PWD $GREETING"'


@pytest.fixture(scope="module")
def image(system: System) -> str:
    """A reference of an image that this host has not seen."""
    layout = Layout(system.folder / "layout")
    layout.make("server", [busybox().file("server", SERVER).folder("srv/work", uid=1000)], CONFIG)
    return f"oci:{layout.folder}:server"


def stored(system: System) -> Path:
    (entry,) = (system.folder / "state" / "images").glob("sha256-*/rootfs")
    return entry


def dry_run(system: System, image: str, *options: str) -> Any:
    done = system.cli("run", "--dry-run", "--json", "--image", image, *options, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done


def test_the_images_word_counts_where_the_command_line_is_silent(clean_system: System, image: str):
    unknown = dry_run(clean_system, image)
    assert (unknown.returncode, "sandbatch pull" in unknown.stderr) == (1, True)

    (one,) = clean_system.run("--image", image)
    assert clean_system.wait([one], "running") == {one: "running"}, clean_system.log()
    row = clean_system.show(one)
    assert (row["image"], row["args"]) == (image, ["/bin/sh", "/server"])
    assert row["image_labels"] == {"org.example.team": "web"}
    assert stored(clean_system).parent.name == row["image_digest"].replace(":", "-")
    assert " /bin/sh /server" in clean_system.cli("ls").stdout

    said = dry_run(clean_system, image)["config"]
    made = json.loads((clean_system.sandboxes / one / "bundle" / "config.json").read_text())
    for name in ("args", "user", "cwd", "capabilities"):
        assert said["process"][name] == made["process"][name]
    assert said["root"] == made["root"]

    who = "1000:1000:1000 2000 /home/app /srv/work hello from the image\n"
    own = clean_system.cli("exec", one, "--", "sh", "-c", f"{WHO}; touch mine && echo wrote")
    assert own.stdout == f"{who}wrote\n"
    root = clean_system.cli("exec", "--user", "root", one, "--", "sh", "-c", f"{WHO}; touch /root/mine")
    assert root.stdout == "0:0:0 /root /srv/work hello from the image\n"
    begun = time.monotonic()
    clean_system.cli("stop", one)
    assert time.monotonic() - begun < 9  # before the grace is over
    assert clean_system.show(one)["exit_code"] == 3
    assert clean_system.cli("logs", one).stdout.startswith(f"{who}wrote\nrefused\n")


def test_the_command_line_counts_before_the_image_and_nobody_writes_to_it(clean_system: System, image: str):
    script = f"{WHO}; touch /mine || echo refused; touch /tmp/mine /run/mine /var/tmp/mine && echo wrote"
    options = ["--user", "root:logs", "-e", "GREETING=mine", "--cwd", "/", "--read-only"]
    done = clean_system.cli(
        "run", "--attach", "--image", image, "--entrypoint", "/bin/sh", *options, "--", "-c", script
    )
    assert done.stdout == "0:2000:2000 /root / mine\nrefused\nwrote\n"
    done = clean_system.cli("run", "--attach", "--image", image, "--", "-c", "touch /tmp/b; ls /tmp")
    assert done.stdout == "b\n"
    root = stored(clean_system)
    assert fingerprint(root) == json.loads((root.parent / FILE).read_text())["fingerprint"]
