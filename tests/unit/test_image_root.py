"""The config.json of a sandbox whose root is an image's folder in the host's store."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker import names
from worker.bundle import CAPABILITIES, make_config
from worker.errors import BadInput
from worker.rootfs import resolve_rootfs
from worker.settings import Settings
from worker.spec import Spec, make_spec

ID = "sb-00000000000000b2"
HEX = "ab" * 32


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "allowed").mkdir()
    return Settings(
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        rootfs_allow=(tmp_path,),
        mount_allow=(tmp_path / "allowed",),
    )


@pytest.fixture
def root(settings) -> Path:
    root = settings.images_dir / f"sha256-{HEX}" / "rootfs"
    for name in ("etc", "tmp", "run", "var", "srv"):
        (root / name).mkdir(parents=True)
    for name in ("hosts", "resolv.conf"):
        (root / "etc" / name).touch()
    return root


@pytest.fixture
def spec(root) -> Callable[..., Spec]:
    """The effective spec of a launch: what its stage `image` has made of the one that was asked for."""

    def make(**fields: Any) -> Spec:
        found = {"rootfs": str(root), "cwd": "/srv", "ready": "none", "user": "1000:1001", "args": ["server"]}
        chosen = {name: fields.pop(name) for name in [*found] if name in fields}
        return make_spec(image="busybox", **fields).model_copy(update=found | chosen)

    return make


@pytest.fixture
def config(spec, settings) -> Callable[..., dict[str, Any]]:
    return lambda **fields: make_config(spec(**fields), ID, Path("/var/run/netns") / ID, settings)


def mounted(config: dict[str, Any]) -> dict[str, str]:
    return {one["destination"]: one["type"] for one in config["mounts"]}


def test_its_root_is_the_folder_of_the_store_and_its_user_the_specs(config, root):
    made = config(groups=[5, 7])
    assert made["root"] == {"path": str(root), "readonly": False}
    assert made["process"]["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [5, 7]}


def test_who_is_not_root_has_no_capabilities_and_root_has_them(config):
    assert config()["process"]["capabilities"] == {"bounding": list(CAPABILITIES)}
    assert config(user="0:0")["process"]["capabilities"]["effective"] == list(CAPABILITIES)


def test_home_and_path_are_those_that_the_image_gave(config):
    env = config(env={"PATH": "/opt", "HOME": "/home/app"})["process"]["env"]
    assert {"PATH=/opt", "HOME=/home/app", f"HOSTNAME={ID}"} <= set(env)


def test_a_writable_root_has_the_images_own_tmp_and_run(config):
    """As with docker: what the image has there is seen, and nothing of it lies in memory by our doing."""
    assert not {"/tmp", "/run", "/var/tmp"} & set(mounted(config()))


def test_a_read_only_root_has_a_tmpfs_for_what_programs_write(config):
    made = config(writable="no")
    assert made["root"]["readonly"] is True
    assert {"/tmp": "tmpfs", "/run": "tmpfs", "/var/tmp": "tmpfs"}.items() <= mounted(made).items()


def test_that_tmpfs_lies_where_the_images_links_lead_and_is_made_once(config, root):
    (root / "var/tmp").symlink_to("../tmp")
    (root / "run").rmdir()
    (root / "run").symlink_to("var/run")
    assert {"/tmp", "/var/run"} <= set(mounted(config(writable="no")))
    assert not {"/var/tmp", "/run"} & set(mounted(config(writable="no")))


@pytest.mark.parametrize(
    "leads", ["/", "/proc", "/proc/sys", "/dev/shm", "/etc/hosts", "/etc/hosts/below", "tmp"]
)
def test_a_link_of_a_hostile_image_hides_nothing(config, root, leads):
    (root / "tmp").rmdir()
    (root / "tmp").symlink_to(leads)
    made = [one["destination"] for one in config(writable="no")["mounts"]]
    assert len(made) == len(set(made))
    assert not {"/", "/tmp", "/etc/hosts", "/proc/sys"} & set(made)


def test_a_mount_of_the_users_own_takes_the_place_of_ours(config):
    mounts = [{"type": "tmpfs", "target": "/tmp", "size_bytes": 8192}]
    made = [one for one in config(writable="no", mounts=mounts)["mounts"] if one["destination"] == "/tmp"]
    assert ["size=8192" in one["options"] for one in made] == [True]


def test_a_bind_needs_a_mount_point_in_the_image_and_nobody_is_told_to_make_it(config, settings, root):
    """The folder is the store's: a command that writes there would change every sandbox of the image."""
    source = str(settings.mount_allow[0])
    assert mounted(config(mounts=[{"type": "bind", "source": source, "target": "/srv"}]))["/srv"] == "bind"
    with pytest.raises(BadInput, match="the image has no such folder; name a folder of it") as error:
        config(mounts=[{"type": "bind", "source": source, "target": "/data"}])
    assert str(root) not in str(error.value)


def test_a_tmpfs_needs_none(config):
    made = config(mounts=[{"type": "tmpfs", "target": "/data/cache", "size_bytes": 8192}])
    assert mounted(made)["/data/cache"] == "tmpfs"


def test_a_working_directory_that_the_image_lacks_is_refused(config):
    with pytest.raises(BadInput, match="cwd /nowhere"):
        config(cwd="/nowhere")


def test_an_image_without_a_file_for_names_says_so_without_the_stores_path(spec, settings, root):
    (root / "etc/hosts").unlink()
    asked = spec(hosts={"db": "10.0.0.1"})
    with pytest.raises(BadInput, match=r"the image has no plain file /etc/hosts") as error:
        names.names_of(asked, ID, [], settings, Path("/bundle"))
    assert str(root) not in str(error.value)


def test_an_image_that_is_gone_is_no_root(config, root):
    root.rename(root.with_name("gone"))
    with pytest.raises(BadInput, match=r"image .*busybox.*is not on this host"):
        config()


@pytest.mark.parametrize("other", ["/etc", "/", "host", "refs/x/rootfs"])
def test_nothing_but_a_folder_of_the_store_is_taken_for_an_image(config, settings, other):
    with pytest.raises(BadInput, match="not on this host"):
        config(rootfs=os.path.join(settings.images_dir, other) if "x" in other else other)


def test_nobody_names_a_folder_of_the_store_as_a_rootfs(settings, root):
    """Not even where the whole disk is allowed: it could go at any time, and is no sandbox's to see."""
    with pytest.raises(BadInput, match="belongs to the host's images"):
        resolve_rootfs(str(root), settings)
