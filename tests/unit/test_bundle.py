"""What a sandbox's config.json says, and how bundles come and go."""

import json
import os
from pathlib import Path

import pytest

from worker.bundle import make_config, remove_bundle, write_bundle
from worker.errors import BadInput
from worker.settings import Settings
from worker.spec import make_spec

CONTAINER_ID = "sb-00000000000000b1"
NETNS = Path("/var/run/netns") / CONTAINER_ID


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "allowed").mkdir()
    return Settings(
        state_dir=tmp_path / "state", run_dir=tmp_path / "run", rootfs_allow=(tmp_path / "allowed",)
    )


def test_config_names_the_netns_and_has_a_read_only_root(settings):
    config = make_config(make_spec(args=["true"]), CONTAINER_ID, NETNS, settings)
    assert {"type": "network", "path": str(NETNS)} in config["linux"]["namespaces"]
    assert {space["type"] for space in config["linux"]["namespaces"]} == {
        "pid",
        "ipc",
        "uts",
        "mount",
        "network",
    }
    assert config["root"]["readonly"] is True
    assert config["hostname"] == CONTAINER_ID
    assert "cgroupsPath" not in config["linux"]


def test_command_env_and_cwd_are_those_of_the_spec(settings):
    spec = make_spec(args=["python3", "-m", "http.server"], env={"A": "1", "HOME": "/x"}, cwd="/var/www/html")
    process = make_config(spec, CONTAINER_ID, NETNS, settings)["process"]
    assert process["args"] == ["python3", "-m", "http.server"]
    assert process["cwd"] == "/var/www/html"
    assert process["terminal"] is False
    assert {"A=1", "HOME=/x"} <= set(process["env"])
    assert process["env"][0].startswith("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


def test_a_sandbox_cannot_gain_privileges(settings):
    process = make_config(make_spec(args=["true"]), CONTAINER_ID, NETNS, settings)["process"]
    assert process["noNewPrivileges"] is True
    for held in process["capabilities"].values():
        assert not {"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_PTRACE"} & set(held)
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}


def test_every_bind_is_read_only(settings):
    mounts = make_config(make_spec(args=["true"]), CONTAINER_ID, NETNS, settings)["mounts"]
    binds = [mount for mount in mounts if mount["type"] == "bind"]
    assert "/usr" in {mount["destination"] for mount in binds}
    assert all("ro" in mount["options"] for mount in binds)


def test_a_rootfs_of_the_user_gets_no_bind(settings, tmp_path):
    """runsc makes the mount point of a bind in the rootfs, on the host: the folder is not ours to write."""
    (tmp_path / "allowed/r").mkdir()
    config = make_config(
        make_spec(args=["true"], rootfs=str(tmp_path / "allowed/r")), CONTAINER_ID, NETNS, settings
    )
    assert config["root"]["path"] == str(tmp_path / "allowed/r")
    assert all(mount["type"] != "bind" for mount in config["mounts"])
    assert os.listdir(tmp_path / "allowed/r") == []


@pytest.mark.parametrize("cwd", ["/nowhere", "/usr/bin/env", "/var/www/html/index.html", "/tmp/x"])
def test_a_working_directory_that_the_rootfs_lacks_is_refused(settings, cwd):
    """runsc would make it in the shared rootfs."""
    with pytest.raises(BadInput, match=f"cwd {cwd}"):
        make_config(make_spec(args=["true"], cwd=cwd), CONTAINER_ID, NETNS, settings)


@pytest.mark.parametrize("cwd", ["/", "/tmp", "/usr/bin", "/bin", "/var/www/html", "/var/tmp"])
def test_a_working_directory_may_lie_behind_symlinks_and_binds(settings, cwd):
    assert (
        make_config(make_spec(args=["true"], cwd=cwd), CONTAINER_ID, NETNS, settings)["process"]["cwd"] == cwd
    )


def test_write_bundle_is_safe_to_repeat(tmp_path):
    write_bundle(tmp_path / "b", {"a": 1})
    write_bundle(tmp_path / "b", {"a": 2})
    assert json.loads((tmp_path / "b/config.json").read_text()) == {"a": 2}
    assert os.listdir(tmp_path / "b") == ["config.json"]


def test_remove_bundle_is_safe_to_repeat_and_follows_no_symlink(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    write_bundle(tmp_path / "b", {})
    (tmp_path / "b/sub").mkdir()
    (tmp_path / "b/sub/file").touch()
    (tmp_path / "b/link").symlink_to(tmp_path / "outside")
    remove_bundle(tmp_path / "b")
    remove_bundle(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "outside/file").exists()
