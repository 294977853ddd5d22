"""The settings that every part reads: flags, then `SANDBATCH_*`, then the TOML file, then defaults."""

import ipaddress
import json
import os
import re
import socket
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from worker import faults
from worker.errors import BadInput
from worker.limits import DEFAULT_PARENT, LEAST_CPUS, LEAST_MEMORY, in_words
from worker.spec import host_name
from worker.spec_parts import host_labels, size

DEFAULT_CONFIG = Path("/etc/sandbatch/sandbatch.toml")
BROKER_SCHEMES = ("redis://", "rediss://", "redis+socket://", "unix://")
NOT_CHECKED = re.compile(r"[?&]ssl_(cert_reqs|check_hostname)=(?!required|true)", re.IGNORECASE)
LOGIN = re.compile(r"://.*@|(?<=[?&]password=)[^&'\"]*")  # of a URL in an error
PORTS = re.compile(r"^(?P<first>[0-9]{1,5})-(?P<last>[0-9]{1,5})$")
PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$")
CGROUP_FILES = ("tasks", "notify_on_release", "release_agent")  # of v1; the kernel's others have a dot
SHARE_OF_MEMORY = 0.8  # of the machine's, for sandboxes
MEMORY_PER_SANDBOX = 24 * 2**20  # 15 MB measured for an idle netstack sandbox, and room for a small program


class Settings(BaseSettings):
    """One frozen object, read once at start. Times are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="SANDBATCH_", frozen=True, extra="forbid", allow_inf_nan=False
    )

    broker_url: str = ""
    broker_ca: Path | None = Field(
        None, description="certificate of who has signed that of a rediss:// broker"
    )
    broker_group: str = Field(
        "", description="group that may open the embedded broker's socket, besides root"
    )
    host: str = Field(default_factory=lambda: socket.gethostname().split(".")[0] or "localhost")
    capacity: int = Field(default_factory=lambda: _capacity_from_memory(), gt=0)
    slots: int = Field(default_factory=lambda: 2 * (os.cpu_count() or 1), gt=0)
    memory: int = Field(
        default_factory=lambda: int(_memory_of_the_machine() * SHARE_OF_MEMORY),
        ge=LEAST_MEMORY,
        description="bytes for all sandboxes, or such as 16g",
    )
    labels: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="of this host, for `run --on`: K=V,K=V or a JSON object"
    )
    state_dir: Path = Path("/var/lib/sandbatch")
    run_dir: Path = Path("/run/sandbatch")
    cni_conf_dir: Path = Path("/etc/cni/net.d")
    cni_path: str = "/opt/cni/bin:/usr/lib/cni"
    cni_cache_dir: Path = Path("/var/lib/cni")
    cni_timeout_s: float = Field(30.0, gt=0, description="longest run of one CNI plugin")
    network: str = "sandbatch"
    runsc: str = Field("", description="path of the binary; empty: the first on the PATH")
    runsc_platform: str = Field("systrap", pattern="^(systrap|ptrace|kvm)$")
    runsc_network: str = Field("sandbox", pattern="^(sandbox|host|none)$")
    runsc_timeout_s: float = Field(30.0, gt=0, description="longest run of one runsc verb")
    default_memory: int | None = Field(None, description="bytes, or such as 512m; 0 for no limit")
    default_cpus: float | None = Field(None, ge=LEAST_CPUS)
    default_pids: int | None = Field(1024, ge=1)
    cgroup_parent: str = DEFAULT_PARENT
    rootfs_allow: tuple[Path, ...] = ()
    image_allow: tuple[Path, ...] = (Path("/"),)
    mount_allow: tuple[Path, ...] = ()
    publish_ports: str = Field(
        "20000-29999", description="host ports to choose from; below the kernel's own range for clients"
    )
    writable_disk_bytes: int = Field(
        2**30, ge=2**20, description="most that a writable root takes of the disk, if its spec names no size"
    )
    faults: str = Field("", description="fault points of a test (worker.faults)")
    allow_faults: bool = False
    stall_s: float = Field(
        120.0, gt=0, description="a launch that journals nothing for so long has lost its message"
    )
    reconcile_s: float = Field(15.0, gt=0, description="time between two looks at what is left over")

    metrics_port: int = Field(0, ge=0, le=65535, description="of /metrics for Prometheus; 0: none")
    metrics_address: str = Field("127.0.0.1", description="the IP address on which it answers")

    exec_slots: int = Field(64, ge=0, le=10_000, description="commands of `exec` at a time")
    log_max_bytes: int = Field(10 * 2**20, ge=2**16, le=2**40, description="of one sandbox's log")
    log_keep_s: float = Field(3600.0, ge=0, description="a log stays so long after its sandbox's end")
    logs_max_bytes: int = Field(2**30, ge=0, description="of all kept logs; the oldest go first")

    log_format: Literal["line", "json"] = Field("line", description="of worker and tasks, on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    images_bytes: int = Field(
        32 * 2**30, ge=0, description="most that all images of this host take, or such as 32g; 0: no limit"
    )
    image_max_bytes: int = Field(16 * 2**30, ge=2**20, description="of one unpacked image, or such as 16g")
    image_max_files: int = Field(1_000_000, ge=1, description="of one unpacked image, folders too")
    pull_timeout_s: float = Field(600.0, gt=0, description="longest pull of an image, with all its tries")
    pulls: int = Field(4, ge=1, le=64, description="pulls of images at a time")
    registries_conf: Path | None = Field(
        None, description="mirrors, insecure registries; none: /etc/containers/registries.conf"
    )
    registry_auth_file: Path | None = Field(
        None, description="logins at registries; none: where skopeo looks by itself"
    )

    signing_key: Path | None = Field(
        None, description="signs what is sent: user-NAME.key, on a host host-NAME.key"
    )
    trusted_keys: Path | None = Field(
        None, description="folder of public keys; a host with it refuses what none of them has signed"
    )
    message_age_s: float = Field(900.0, ge=60, description="signed messages and calls are stale after it")
    spec_age_s: float = Field(
        7 * 86_400.0, ge=60, description="a signed spec that has waited for longer is refused"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        pairs = [one.strip().partition("=") for one in value.split(",") if one.strip()]
        for name, equals, _ in pairs:
            if not equals:
                raise ValueError(f"{name!r} is no K=V; a list such as gpu=true,zone=a is needed")
        if len({name for name, _, _ in pairs}) != len(pairs):
            raise ValueError("a label is named twice")
        return {name: given for name, _, given in pairs}

    @field_validator("labels")
    @classmethod
    def _labels_can_be_asked_for(cls, value: dict[str, str]) -> dict[str, str]:
        return host_labels(value)

    @field_validator("memory", "default_memory", "images_bytes", "image_max_bytes", mode="before")
    @classmethod
    def _size_may_have_a_unit(cls, value: Any) -> Any:
        return size(value) if isinstance(value, str) else value

    @field_validator("default_memory", "default_cpus", "default_pids", mode="before")
    @classmethod
    def _zero_is_no_limit(cls, value: Any) -> Any:
        return None if value in (0, "0") else value

    @field_validator("default_memory")
    @classmethod
    def _memory_suffices(cls, value: int | None) -> int | None:
        if value is not None and value < LEAST_MEMORY:
            raise ValueError(f"gVisor needs {in_words(LEAST_MEMORY)} at least")
        return value

    @field_validator("log_format", "log_level", mode="before")
    @classmethod
    def _word_is_in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("host")
    @classmethod
    def _host_is_a_name(cls, value: str) -> str:
        return host_name(value)

    @field_validator("metrics_address")
    @classmethod
    def _metrics_address_is_one(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            raise ValueError("an IP address is needed, such as 127.0.0.1, ::1, 0.0.0.0") from None

    @field_validator("broker_url")
    @classmethod
    def _broker_is_one_that_we_speak_to(cls, value: str) -> str:
        if value and not value.startswith(BROKER_SCHEMES):
            raise ValueError(f"a URL is needed that begins with {', '.join(BROKER_SCHEMES)}")
        try:
            _ = urlsplit(value).port
        except ValueError:  # its words may hold a part of the password
            raise ValueError("it is no URL; in a password '/' is written %2F, ':' %3A, '@' %40") from None
        if NOT_CHECKED.search(value):
            raise ValueError("the broker's certificate is always looked at; name its CA with broker_ca")
        return value

    @field_validator("cgroup_parent")
    @classmethod
    def _cgroup_parent_is_a_plain_name(cls, value: str) -> str:
        if not PLAIN_NAME.fullmatch(value) or value in CGROUP_FILES:
            raise ValueError("one plain name is needed: letters, digits, - and _, at most 64")
        return value

    @field_validator("publish_ports")
    @classmethod
    def _ports_are_a_range(cls, value: str) -> str:
        match = PORTS.fullmatch(value)
        if match is None or not 1 <= int(match["first"]) <= int(match["last"]) <= 65535:
            raise ValueError("FIRST-LAST is needed, two ports, the lower one first")
        return value

    @model_validator(mode="after")
    def _faults_are_for_tests(self) -> "Settings":
        if self.faults and not self.allow_faults:
            raise ValueError("faults break sandboxes on purpose: set SANDBATCH_ALLOW_FAULTS=1 as well")
        faults.parse(self.faults)
        return self

    @field_validator(
        *("registries_conf", "registry_auth_file", "signing_key", "trusted_keys", "broker_ca"), mode="before"
    )
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("signing_key", "trusted_keys", "broker_ca")
    @classmethod
    def _home_of_a_user(cls, value: Path | None) -> Path | None:
        try:
            return value.expanduser() if value else value
        except RuntimeError:
            raise ValueError("an absolute path is needed, or one that begins with ~/") from None

    @model_validator(mode="after")
    def _a_ca_is_of_a_broker_with_tls(self) -> "Settings":
        if self.broker_ca and not self.broker_url.startswith("rediss://"):
            raise ValueError(
                "broker_ca is given, and broker_url is none of rediss://: nothing would be encrypted"
            )
        return self

    @field_validator(
        *("state_dir", "run_dir", "cni_conf_dir", "cni_cache_dir"),
        *("rootfs_allow", "image_allow", "mount_allow"),
    )
    @classmethod
    def _paths_are_absolute(cls, value: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        return tuple(map(_absolute, value)) if isinstance(value, tuple) else _absolute(value)

    @field_validator("registries_conf", "registry_auth_file", "signing_key", "trusted_keys", "broker_ca")
    @classmethod
    def _file_is_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute(value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of the sources, first wins."""
        file = Path(os.environ.get("SANDBATCH_CONFIG") or DEFAULT_CONFIG)
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file))

    # -- places derived from the folders above ---------------------------------------------------

    @property
    def sandboxes_dir(self) -> Path:
        """One folder a sandbox: journal, bundle, log."""
        return self.state_dir / "sandboxes"

    @property
    def images_dir(self) -> Path:
        """The images that this host has pulled (`worker.image_store`)."""
        return self.state_dir / "images"

    @property
    def execs_dir(self) -> Path:
        """A file for each exec under way (`worker.exec`)."""
        return self.run_dir / "execs"

    @property
    def logs_dir(self) -> Path:
        """Logs of sandboxes that have ended (`worker.logs`)."""
        return self.state_dir / "logs"

    @property
    def own_cni_conf_dir(self) -> Path:
        """Our own networks; searched before the users' folder."""
        return self.state_dir / "cni" / "net.d"

    @property
    def runsc_root(self) -> Path:
        return self.run_dir / "runsc"

    @property
    def exit_dir(self) -> Path:
        """conmon writes one file an ended sandbox here: its name the id, its text the exit code."""
        return self.run_dir / "exits"

    @property
    def ports_dir(self) -> Path:
        """One symlink a published port of this host; see `worker.ports`."""
        return self.run_dir / "ports"

    @property
    def publish_range(self) -> tuple[int, int]:
        first, _, last = self.publish_ports.partition("-")
        return int(first), int(last)

    @property
    def broker_socket(self) -> Path:
        return self.run_dir / "broker.sock"

    @property
    def is_broker_embedded(self) -> bool:
        return not self.broker_url

    @cached_property
    def cni_paths(self) -> tuple[Path, ...]:
        return tuple(Path(part) for part in self.cni_path.split(":") if part)


def load_settings(**flags: Any) -> Settings:
    """Read the settings; a flag that is None counts as not given.

    Raises:
        BadInput: A value is wrong; the error has its name, the value and what is allowed, and no password.
    """
    file = os.environ.get("SANDBATCH_CONFIG") or DEFAULT_CONFIG
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        why = str(first["msg"]).removeprefix("Value error, ")
        if not first["loc"]:  # a check of the whole: its input is all settings, the broker's password too
            raise BadInput("settings", why, "correct the flags, the environment or the file") from None
        name = str(first["loc"][0])
        raise BadInput(
            f"setting {name}",
            f"{_shown(name, repr(first.get('input')))} is not allowed ({why})",
            f"correct the flag, SANDBATCH_{name.upper()} or the line in {file}",
        ) from None
    except SettingsError as error:  # its words: error parsing value for field "NAME" from source "…"
        name = str(error).split('"')[1]
        raise BadInput(
            f"setting {name}", "it is no JSON list", f'write SANDBATCH_{name.upper()}=\'["/a", "/b"]\''
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise BadInput(f"settings file {file}", str(error), "correct the file") from None


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("an absolute path is needed")
    return path


def _shown(name: str, value: str) -> str:
    """A wrong value without its password; of a URL that is none nobody can say where that begins."""
    if name == "broker_url" and "://" not in value:
        value = re.sub(r"(?<=^['\"]).*@", "***@", value)
    return LOGIN.sub(_hide, value)


def _hide(match: re.Match[str]) -> str:
    return "://***@" if match[0].startswith("://") else "***"


def _capacity_from_memory() -> int:
    return max(1, int(_memory_of_the_machine() * SHARE_OF_MEMORY) // MEMORY_PER_SANDBOX)


def _memory_of_the_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
