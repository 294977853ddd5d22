"""The registry, its proxy and the images of these tests do what the tests rely on."""

import subprocess
from pathlib import Path

from tests.images import make, registry
from tests.images.proxy import RegistryProxy
from tests.images.registry import Registry, Request


def fetch(address: str, name: str, target: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    argv = [
        "skopeo",
        "copy",
        "--src-tls-verify=false",
        *flags,
        f"docker://{address}/{name}",
        f"oci:{target}:x",
    ]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def test_the_log_counts_one_pull(hub: Registry, layout: make.Layout, tmp_path: Path):
    assert fetch(hub.address, "team/web:1", tmp_path / "out").returncode == 0
    assert hub.gets("/manifests/") == ["/v2/team/web/manifests/1"]
    assert len(hub.gets("/blobs/")) == len(layout.blobs("web")) + 1, "its layers, and its config"


def test_a_registry_comes_back_on_its_port(hub: Registry, tmp_path: Path):
    hub.stop()
    assert "connection refused" in fetch(hub.address, "team/small:1", tmp_path / "out").stderr
    hub.start()
    assert fetch(hub.address, "team/small:1", tmp_path / "out").returncode == 0


def test_a_registry_with_a_login(storage: Path, tmp_path: Path):
    with registry.serving(Registry(tmp_path / "closed", storage, with_login=True)) as closed:
        assert "unauthorized" in fetch(closed.address, "team/small:1", tmp_path / "out").stderr
        login = f"--src-creds={registry.USER}:{registry.PASSWORD}"
        assert fetch(closed.address, "team/small:1", tmp_path / "out", login).returncode == 0


def test_the_proxy_refuses_breaks_off_and_forges(proxy: RegistryProxy, layout: make.Layout, tmp_path: Path):
    proxy.add("/manifests/", status=403)
    assert "denied" in fetch(proxy.address, "team/big:1", tmp_path / "a").stderr
    assert proxy.asked("/manifests/") == [Request("GET", "/v2/team/big/manifests/1", 403)]

    proxy.clear()
    (_, noise) = layout.blobs("big")
    cut = proxy.add(noise, cut_after=100_000)
    assert fetch(proxy.address, "team/big:1", tmp_path / "b").returncode != 0
    assert cut.reached.is_set()

    proxy.clear()
    proxy.add(noise, content=b"something else")
    assert fetch(proxy.address, "team/big:1", tmp_path / "c").returncode != 0

    proxy.clear()
    assert fetch(proxy.address, "team/big:1", tmp_path / "d").returncode == 0


def test_the_images_are_what_they_say(layout: make.Layout, tmp_path: Path):
    """A real Python runs in a root of its own; whiteouts hide what lies below."""
    for tag in ("python", "web"):
        argv = ["umoci", "raw", "unpack", "--image", f"{layout.folder}:{tag}", str(tmp_path / tag)]
        subprocess.run(argv, check=True, capture_output=True)
    program = [
        "chroot",
        str(tmp_path / "python"),
        "/usr/local/bin/python",
        "-c",
        "import http.server; print(1)",
    ]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "1\n"

    found = {str(path.relative_to(tmp_path / "web")) for path in (tmp_path / "web").rglob("*")}
    assert {"site/index.html", "site/page", "opaque/new"} <= found
    assert not {"site/old.html", "opaque/old"} & found
    assert (tmp_path / "web" / "site" / "page").read_text() == "second"
