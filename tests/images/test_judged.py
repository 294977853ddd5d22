"""What images promise, through the command line, with a real registry and real sandboxes."""

import base64
import json
import urllib.request
from pathlib import Path

import pytest

from tests.host.system import System
from tests.images import make, registry
from tests.images.conftest import store_of
from tests.images.proxy import RegistryProxy
from tests.images.registry import Registry, registries_conf

SOON_S = 30.0
SLEEP = ("--", "sleep", "300")


def stages(system: System, ids: list[str]) -> set[str]:
    return {system.show(one)["stage"] for one in ids}


def running(system: System) -> list[str]:
    return [one for one, row in system.ls().items() if row["state"] == "running"]


def failure(system: System, container_id: str) -> str:
    """Why it has failed, in the stage that gets the image."""
    assert system.wait([container_id], "terminal", SOON_S) == {container_id: "failed"}, system.log()
    error = system.show(container_id)["error"]
    assert error["stage"] == "image"
    assert store_of(system).all() == []
    return str(error["message"])


@pytest.mark.timeout(300)
def test_fifty_sandboxes_of_one_cold_image_cause_one_pull(host: System, hub: Registry, layout: make.Layout):
    ids = host.run("--image", f"{hub.address}/team/small:1", "--count", "50")
    states = host.wait(ids, "running", 150)

    assert states == dict.fromkeys(ids, "running"), host.log()
    digest = hub.digest("team/small", "1")
    hub_saw = [path for path in hub.gets("/team/small/") if "blobs" in path]
    assert len(hub_saw) == len(set(hub_saw)) == len(layout.blobs("small")) + 1, "each layer, and the config"
    manifests = hub.gets("/team/small/manifests/")
    assert sorted(manifests) == sorted(f"/v2/team/small/manifests/{one}" for one in ("1", digest))
    (image,) = store_of(host).all()
    assert image.digest == digest
    assert sorted(store_of(host).users()[digest]) == sorted(ids)
    rows = host.ls()
    assert {rows[one]["image_digest"] for one in ids} == {digest}


def test_the_tutorial_with_an_image_of_python(host: System, hub: Registry):
    python = ("--", "python", "-m", "http.server")
    (one,) = host.run("--image", f"{hub.address}/team/python:1", "--ready", "http:8000/", "--wait", *python)
    with urllib.request.urlopen(f"http://{host.show(one)['ip']}:8000/", timeout=10) as page:
        assert page.read() == b"Hello World!\n"


def test_an_image_says_how_it_is_run(host: System, hub: Registry):
    """Entrypoint, Cmd, Env, WorkingDir, User, ExposedPorts and Labels, without a word on the command line."""
    (one,) = host.run("--image", f"{hub.address}/team/web:1", "--wait")
    shown = host.show(one)

    with urllib.request.urlopen(f"http://{shown['ip']}:8000/", timeout=10) as page:
        assert page.read() == b"Hello World!\n"
    inside = host.cli(
        "exec", one, "--", "sh", "-c", "pwd; id -u; id -g; echo $GREETING; ls /opaque; cat page"
    )
    assert inside.stdout.splitlines() == ["/site", "1000", "2000", "hello from the image", "new", "second"]
    assert shown["image_labels"] == {"org.example.team": "web"}


def test_the_registry_is_stopped_in_the_middle_and_comes_back(
    host: System, hub: Registry, proxy: RegistryProxy, layout: make.Layout
):
    rule = proxy.add(layout.blobs("big")[1], rate=8 * 2**20)
    ids = host.run("--image", f"{proxy.address}/team/big:1", "--count", "3", *SLEEP)
    assert rule.reached.wait(SOON_S)
    hub.stop()
    host.wait_until(lambda: len(proxy.asked("/v2/")) > 3, SOON_S, "a second try")
    assert stages(host, ids) == {"image"}
    rule.release()
    hub.start()

    assert host.wait(ids, "running", 60) == dict.fromkeys(ids, "running"), host.log()


def test_the_registry_is_stopped_in_the_middle_and_stays_away(
    host: System, hub: Registry, proxy: RegistryProxy, layout: make.Layout
):
    """After a few tries they fail, with words, and nothing of the half that came is left."""
    rule = proxy.add(layout.blobs("big")[1], rate=8 * 2**20)
    (one, two) = host.run("--image", f"{proxy.address}/team/big:1", "--count", "2", *SLEEP)
    assert rule.reached.wait(SOON_S)
    hub.stop()

    assert "5 tries" in failure(host, one)
    assert "5 tries" in failure(host, two)
    assert host.audit() == []


def test_a_wrong_digest(host: System, hub: Registry, proxy: RegistryProxy, layout: make.Layout):
    """Unknown to the registry, or what comes is something else: the manifest, or a layer."""
    (unknown,) = host.run("--image", f"{hub.address}/team/small@sha256:{'0' * 64}", *SLEEP)
    assert "does not know this tag or digest" in failure(host, unknown)
    assert len([one for one in hub.requests() if "/manifests/" in one.path]) == 1, "it cannot pass"

    digest = hub.digest("team/small", "1")
    proxy.add("/manifests/", content=b'{"schemaVersion": 2, "layers": []}')
    (forged,) = host.run("--image", f"{proxy.address}/team/small@{digest}", *SLEEP)
    assert "nothing of it is used" in failure(host, forged)

    proxy.clear()
    proxy.add(layout.blobs("small")[0], content=b"something else")
    (evil,) = host.run("--image", f"{proxy.address}/team/small:1", *SLEEP)
    assert "what came is not what its digest says" in failure(host, evil)
    assert len(proxy.asked(layout.blobs("small")[0])) == 1, "it cannot pass"


def test_denied(host: System, storage: Path, proxy: RegistryProxy, tmp_path: Path):
    """Without a login, with a wrong one, by a registry that answers 403; with the right one it runs."""
    with registry.serving(Registry(tmp_path / "closed", storage, with_login=True)) as closed:
        registries_conf(host.folder / "registries.conf", closed.address, proxy.address)
        reference = f"{closed.address}/team/small:1"
        auth_file = host.folder / "auth.json"

        for login in (None, f"{registry.USER}:wrong"):
            if login:
                write_login(auth_file, closed.address, login)
            closed.forget()
            (one,) = host.run("--image", reference, *SLEEP)
            assert "denies it" in failure(host, one)
            assert len([one for one in closed.requests() if "/manifests/" in one.path]) <= 1, "it cannot pass"

        write_login(auth_file, closed.address, f"{registry.USER}:{registry.PASSWORD}")
        (one,) = host.run("--image", reference, *SLEEP)
        assert host.wait([one], "running", SOON_S) == {one: "running"}, host.log()
        host.cli("rm", one)
        store_of(host).prune(0)
        auth_file.unlink()

    proxy.add("/manifests/", status=403)
    (one,) = host.run("--image", f"{proxy.address}/team/small:1", *SLEEP)
    assert "denies it" in failure(host, one)
    assert len(proxy.asked("/manifests/")) == 1


def write_login(file: Path, address: str, login: str) -> None:
    token = base64.b64encode(login.encode()).decode()
    file.write_text(json.dumps({"auths": {address: {"auth": token}}}))


def test_a_tag_that_is_moved_during_a_batch(host: System, hub: Registry, layout: make.Layout, tmp_path: Path):
    """All of the batch run what its first sandbox ran; a later one that always asks gets the new image."""
    reference = hub.push(layout.folder, "small", "team/moved:1")
    old = hub.digest("team/moved", "1")
    waves = {"waves": [1, 3], "defaults": {"image": reference, "pull": "always"}}
    specs = [
        {"command": ["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.2; done"]},
        *[{"command": "true"}] * 3,
    ]
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"name": "moved", **waves, "specs": specs}))

    host.cli("batch", str(file))
    host.wait_until(lambda: running(host), SOON_S, "the first wave")
    (first,) = running(host)
    hub.push(layout.folder, "other", "team/moved:1")
    new = hub.digest("team/moved", "1")
    host.cli("exec", first, "--", "touch", "/tmp/go")
    host.cli("wait", "--batch", "moved", "--timeout", "60")

    mine = [row for row in host.ls().values() if row["batch"] == "moved"]
    assert [row["image_digest"] for row in mine] == [old] * 4
    (later,) = host.run("--image", reference, "--pull", "always", *SLEEP)
    assert host.wait([later], "running", SOON_S) == {later: "running"}
    assert host.show(later)["image_digest"] == new != old


def test_pull_policies(host: System, hub: Registry):
    """`never` asks nobody, `missing` only once, `always` for the manifest and then for nothing it has."""
    reference = f"{hub.address}/team/small:1"
    (never,) = host.run("--image", reference, "--pull", "never", *SLEEP)
    assert "not on this host" in failure(host, never)
    assert hub.requests() == []

    host.run("--image", reference, "--wait", *SLEEP)
    hub.forget()
    host.run("--image", reference, "--wait", *SLEEP)
    host.run("--image", reference, "--pull", "never", "--wait", *SLEEP)
    assert hub.requests() == []

    host.run("--image", reference, "--pull", "always", "--wait", *SLEEP)
    assert hub.gets("/team/") == ["/v2/team/small/manifests/1"]


def test_a_short_name_comes_from_the_mirror(host: System, hub: Registry):
    (one,) = host.run("--image", "small", *SLEEP)
    assert host.wait([one], "running", SOON_S) == {one: "running"}, host.log()
    assert hub.gets("/library/small/manifests/latest")
    assert host.show(one)["image"] == "docker.io/library/small:latest"


def test_what_can_pass_is_tried_again_and_what_cannot_is_not(
    host: System, proxy: RegistryProxy, layout: make.Layout
):
    (blob,) = layout.blobs("small")
    proxy.add(blob, status=500, times=1)
    proxy.add(blob, cut_after=1000, times=1)
    (one,) = host.run("--image", f"{proxy.address}/team/small:1", *SLEEP)
    assert host.wait([one], "running", SOON_S) == {one: "running"}, host.log()
    assert [request.status for request in proxy.asked(blob)] == [500, 200, 200]

    host.cli("rm", one)
    store_of(host).prune(0)
    proxy.clear()
    (one,) = host.run("--image", f"{proxy.address}/team/nothing:1", *SLEEP)
    assert "does not know" in failure(host, one)
    assert len(proxy.asked("/manifests/")) == 1


def test_a_registry_that_hangs_holds_up_nothing_else(host: System, hub: Registry, proxy: RegistryProxy):
    """More sandboxes wait for it than the host has launch slots."""
    manifest = proxy.add("/team/small/manifests/", holds=True)
    waiting = host.run("--image", f"{proxy.address}/team/small:1", "--count", "5", *SLEEP)
    assert manifest.reached.wait(SOON_S)
    others = host.run("--image", f"{hub.address}/team/other:1", "--wait", *SLEEP)
    others += host.run("--wait", *SLEEP)

    assert stages(host, waiting) == {"image"}
    assert {host.ls()[one]["state"] for one in others} == {"running"}
    manifest.release()
    assert host.wait(waiting, "running", SOON_S) == dict.fromkeys(waiting, "running"), host.log()


def test_the_last_that_waits_for_a_pull_is_removed(host: System, proxy: RegistryProxy, layout: make.Layout):
    """Its pull ends at once, though the registry says nothing more."""
    rule = proxy.add(layout.blobs("small")[0], holds=True)
    (one,) = host.run("--image", f"{proxy.address}/team/small:1", *SLEEP)
    assert rule.reached.wait(SOON_S)
    host.cli("rm", one)
    images = host.folder / "state" / "images"
    host.wait_until(lambda: not list(images.glob(".pulling-*")), 10, "the end of the pull")
    assert store_of(host).all() == []
