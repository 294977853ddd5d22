"""What an image's config says, and how the command line overrides it: docker's rules."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from worker.errors import BadInput, ImageError
from worker.image_config import labels_of, overrides
from worker.image_manifest import read_config
from worker.image_store import Image
from worker.image_user import User, find_user
from worker.rootfs import DEFAULT_PATH
from worker.spec import Spec, make_spec

DIGEST = "sha256:" + "a" * 64
PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:an app:/home/app:/bin/sh\n"
NONSENSE = b"\xff\0:::\nroot\n::::::\nroot:x:-1:0:::\nroot:x:0:" + b"9" * 5000
GROUP = "root:x:0:\napp:x:1001:\nwheel:x:10:root,app\naudio:x:29:app\ndb:x:70:\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    etc = tmp_path / "rootfs" / "etc"
    etc.mkdir(parents=True)
    (etc / "passwd").write_text(PASSWD)
    (etc / "group").write_text(GROUP)
    return tmp_path


@pytest.fixture
def made(folder, settings) -> Any:
    """What becomes of a spec with an image of this config."""

    def make(config: Any, **fields: Any) -> dict[str, Any]:
        return overrides(make_spec(image="app", **fields), an_image(folder, config), settings)

    return make


def an_image(folder: Path, config: Any) -> Image:
    return Image(DIGEST, folder, {"config": config}, 0, 0, 0, (), 0.0, 0.0)


@pytest.mark.parametrize(
    ("config", "fields", "args"),
    [
        ({"Cmd": ["serve"]}, {}, ["serve"]),
        ({"Entrypoint": ["/start"], "Cmd": ["serve"]}, {}, ["/start", "serve"]),
        ({"Entrypoint": ["/start"], "Cmd": ["serve"]}, {"args": ["check", "-v"]}, ["/start", "check", "-v"]),
        ({"Entrypoint": ["/start"], "Cmd": ["serve"]}, {"entrypoint": ["sh"]}, ["sh"]),
        ({"Entrypoint": ["/start"]}, {"entrypoint": ["sh"], "args": ["-c", "id"]}, ["sh", "-c", "id"]),
        ({"Entrypoint": ["/start"]}, {"entrypoint": [], "args": ["id"]}, ["id"]),
        ({"Entrypoint": "sh -c", "Cmd": ["serve"]}, {}, ["serve"]),  # of the wrong type
        ({"Cmd": ["serve", 7]}, {"args": ["id"]}, ["id"]),
    ],
)
def test_the_command_is_put_together_as_docker_does(made, config, fields, args):
    assert made(config, **fields)["args"] == args


@pytest.mark.parametrize(
    ("config", "fields"), [({}, {}), (None, {}), ([], {}), ({"Cmd": ["serve"]}, {"entrypoint": []})]
)
def test_no_command_at_all_is_an_error_that_says_so(made, config, fields):
    with pytest.raises(ImageError, match="says no command"):
        made(config, **fields)


def test_the_environment_is_the_images_then_the_specs(made):
    config = {"Cmd": ["x"], "Env": ["A=1", "B=2=3", "bare", "=odd", "N=a\0b", "PATH=/app"]}
    env = made(config, env={"A": "mine"})["env"]
    assert env == {"PATH": "/app", "HOME": "/root", "A": "mine", "B": "2=3"}
    assert made({"Cmd": ["x"]})["env"]["PATH"] == DEFAULT_PATH


@pytest.mark.parametrize(
    ("words", "user"),
    [
        ("", User(0, 0, [10], "/root")),
        ("app", User(1000, 1001, [10, 29], "/home/app")),
        ("1000", User(1000, 1001, [10, 29], "/home/app")),  # docker knows it by its number, too
        ("app:db", User(1000, 70, [], "/home/app")),
        ("app:70", User(1000, 70, [], "/home/app")),
        ("4000", User(4000, 0, [], "/")),
        ("4000:5000", User(4000, 5000, [], "/")),
    ],
)
def test_a_user_is_looked_up_in_the_images_own_files(folder, words, user):
    assert find_user(folder / "rootfs", words) == user


@pytest.mark.parametrize("words", ["nobody", "app:nogroup", "99999999999", "0:4294967295", "-1"])
def test_a_user_that_it_does_not_know_is_an_error(folder, words):
    with pytest.raises(ImageError, match="is not in the image's /etc/"):
        find_user(folder / "rootfs", words)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda etc: (etc / "passwd").unlink(),
        lambda etc: (etc / "passwd").rename(etc / "gone") and (etc / "passwd").symlink_to("/etc/passwd"),
        lambda etc: ((etc / "passwd").unlink(), os.mkfifo(etc / "passwd")),
        lambda etc: ((etc / "passwd").unlink(), (etc / "passwd").mkdir()),
        lambda etc: (etc / "passwd").write_bytes(NONSENSE),
        lambda etc: (etc / "passwd").write_bytes(b"x" * (2 << 20)),
        lambda etc: (etc.rename(etc.parent / "other"), etc.symlink_to("/etc")),
    ],
)  # fmt: skip
def test_hostile_files_of_users_know_nobody_and_lead_nowhere(folder, break_it):
    """The host's /etc/passwd has a user of every machine: it must never be the one that is read."""
    break_it(folder / "rootfs" / "etc")
    with pytest.raises(ImageError):
        find_user(folder / "rootfs", "daemon")
    assert find_user(folder / "rootfs", "0").uid == 0


def test_a_link_with_two_slashes_is_as_one_with_one(folder):
    """POSIX lets `//` be a root of its own, and so does pathlib; Linux does not."""
    etc = folder / "rootfs" / "etc"
    (etc / "passwd").rename(etc / "users")
    (etc / "passwd").symlink_to("//etc/users")
    assert find_user(folder / "rootfs", "app").uid == 1000


def test_a_link_inside_the_image_is_followed(folder):
    etc = folder / "rootfs" / "etc"
    (folder / "rootfs" / "lib").mkdir()
    (etc / "passwd").rename(folder / "rootfs" / "lib" / "passwd")
    (etc / "passwd").symlink_to("/lib/passwd")
    assert find_user(folder / "rootfs", "app").uid == 1000


def test_user_groups_and_home_of_the_config_and_of_the_spec(made):
    config = {"Cmd": ["x"], "User": "app"}
    assert made(config)["user"] == "1000:1001"
    assert made(config)["groups"] == [10, 29]
    assert made(config)["env"]["HOME"] == "/home/app"
    assert made(config, user="0")["user"] == "0:0"
    assert made(config, groups=[5, 1001])["groups"] == [5, 10, 29]
    with pytest.raises(ImageError):
        made({"Cmd": ["x"], "User": "../../etc"})


@pytest.mark.parametrize(
    ("ports", "ready"),
    [
        (None, "none"),
        ({"8080/tcp": {}, "443": {}, "53/udp": {}}, "tcp:443"),
        ({"9000-9010/tcp": {}}, "tcp:9000"),
        ({"53/udp": {}, "http/tcp": {}, "0/tcp": {}, "99999/tcp": {}}, "none"),
        (["80/tcp"], "none"),
    ],
)
def test_an_exposed_port_is_the_default_of_ready(made, ports, ready):
    config = {"Cmd": ["x"], "ExposedPorts": ports}
    assert made(config)["ready"] == ready
    assert made(config, ready="none")["ready"] == "none"
    assert made(config, ready="http:1/")["ready"] == "http:1/"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        *(("SIGINT", "SIGINT"), ("quit", "SIGQUIT"), ("9", "SIGKILL"), ("RTMIN+3", "37")),
        *(("x", None), (7, None)),
    ],
)
def test_the_stop_signal(made, given, found):
    config = {"Cmd": ["x"], "StopSignal": given}
    assert made(config)["stop_signal"] == found
    assert made(config, stop_signal="term")["stop_signal"] == "SIGTERM"


@pytest.mark.parametrize(
    ("given", "cwd"),
    [("/app", "/app"), ("app/../x", "/x"), ("../../..", "/"), (None, "/"), (["/"], "/"), ("//a", "/a")],
)
def test_the_working_folder(made, given, cwd):
    config = {"Cmd": ["x"], "WorkingDir": given}
    assert made(config)["cwd"] == cwd
    assert made(config, cwd="/mine")["cwd"] == "/mine"


def test_labels_are_texts(folder):
    assert labels_of(an_image(folder, {"Labels": {"a": "1", "b": 2, "": "3"}})) == {"a": "1"}
    assert labels_of(an_image(folder, {"Labels": ["a"]})) == {}
    assert labels_of(an_image(folder, None)) == {}
    assert len(labels_of(an_image(folder, {"Labels": {str(n): "x" * 2000 for n in range(1000)}}))) < 200


def test_a_config_that_is_too_large_is_refused_before_it_is_journaled(made):
    with pytest.raises(ImageError, match="too large"):
        made({"Cmd": ["x"], "Env": [f"V{n}={'x' * 1000}" for n in range(1000)]})


# -- the spec --------------------------------------------------------------------------------------


def test_a_spec_with_an_image_is_of_a_kind_that_older_hosts_do_not_take():
    spec = make_spec(image="app")
    assert spec.kind == "spec/v3"
    assert (spec.image, spec.args, spec.cwd, spec.ready, spec.writable) == (
        "docker.io/library/app:latest", [], "", "image", "memory",
    )  # fmt: skip
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    assert make_spec(image="app", writable="no", cwd="/x", ready="none").writable == "no"
    assert make_spec(args=["x"]).kind == "spec/v1"
    assert make_spec(args=["x"], user="1000").kind == "spec/v3"
    assert not {"image", "pull", "entrypoint", "user", "groups", "stop_signal"} & set(
        make_spec(args=["x"]).model_dump()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"args": []},
        {"args": ["x"], "cwd": ""},
        {"args": ["x"], "ready": "image"},
        {"args": ["x"], "pull": "always"},
        {"args": ["x"], "entrypoint": ["sh"]},
        {"args": ["x"], "user": "app"},
        {"image": "app", "rootfs": "/x"},
        {"image": "Upper"},
        {"image": "app", "user": "a:b:c"},
        {"image": "app", "user": "4294967295"},
        {"image": "app", "groups": [-1]},
        {"image": "app", "stop_signal": "SIGNONE"},
        {"image": "app", "stop_signal": "0"},
        {"image": "app", "pull": "sometimes"},
        {"image": "app", "entrypoint": ["a\0b"]},
    ],
)
def test_what_does_not_fit_is_refused(fields):
    with pytest.raises(BadInput):
        make_spec(**fields)


def test_a_layout_without_the_blob_that_it_names_has_no_configuration(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:" + "0" * 64}]}))
    with pytest.raises(ImageError, match="cannot be read"):
        read_config("image", tmp_path)
