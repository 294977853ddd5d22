"""What a killed pull leaves on a real host: seen by the audit, removed by a worker's start and by --mend."""

import json
from pathlib import Path

from tests.host.system import System
from tests.layers import blobs_of, digest_of, file, layout

DIGEST = "sha256:" + "d" * 64


def leave(system: System) -> Path:
    place = system.folder / "state" / "images" / f".pulling-{DIGEST.removeprefix('sha256:')}"
    (place / "rootfs/etc").mkdir(parents=True)
    (place / "rootfs/etc/shadow").write_text("half of it")
    place.parent.chmod(0o700)
    return place


def test_what_a_killed_pull_left_goes(system: System) -> None:
    place = leave(system)
    (found,) = json.loads(system.cli("audit", "--json", check=False).stdout)
    assert (found["kind"], found["name"], found["problem"]) == ("image", str(place), "extra")
    (mended,) = json.loads(system.cli("audit", "--mend", "--json").stdout)
    assert mended["mended"]
    assert not place.exists()
    place = leave(system)
    system.kill_worker()
    system.start()
    system.wait_until(lambda: not place.exists(), 10, "removal of what the killed one left")
    assert system.audit() == []


def test_the_deep_audit_compares_images(system: System, tmp_path: Path) -> None:
    """And an image that was changed by hand is named, whoever uses it."""
    image = blobs_of([[file("etc/version", b"1")]])
    ref = f"oci:{layout(tmp_path / 'one', {'v1': image})}"
    system.cli("pull", ref)
    folder = system.folder / "state" / "images" / digest_of(image[0]).replace(":", "-")
    (folder / "rootfs/etc/version").write_text("2")
    done = system.cli("audit", "--deep", "--json", check=False)
    (found,) = json.loads(done.stdout)
    assert (done.returncode, found["kind"], found["name"], found["problem"]) == (
        1,
        "image",
        str(folder),
        "changed",
    )
    system.cli("image", "rm", ref)
