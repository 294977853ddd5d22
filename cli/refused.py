"""What other launchers have to weaken a sandbox, and this one has not: refused with what is there instead."""

from typing import Any, NoReturn

from typer.core import TyperCommand

from cli.output import fail
from worker.errors import BadInput

OWN_KERNEL = "a sandbox has a kernel of its own (gVisor), with the least capabilities, and no way to more"
OWN_SPACES = "a sandbox shares no namespace with its host or with others"
AS_ROOT = "root inside is root of that kernel alone; -u, --user runs it as another"
FILES = "-v, --volume binds allowed folders read-only, cp copies in and out"
# Option or word of a batch file -> why there is none, and what is there.
REFUSED: dict[str, tuple[str, str]] = {
    "privileged": (OWN_KERNEL, AS_ROOT),
    "cap_add": (OWN_KERNEL, AS_ROOT),
    "cap_drop": ("it has the least capabilities already", "-u, --user: who is not root has none"),
    "security_opt": ("no new privileges, gVisor and masked paths are always on", "leave it out"),
    "pid": (OWN_SPACES, "exec looks inside, -p, --publish and networks connect"),
    "ipc": (OWN_SPACES, "networks connect"),
    "uts": (OWN_SPACES, "leave it out"),
    "userns": (OWN_SPACES, AS_ROOT),
    "cgroupns": (OWN_SPACES, "leave it out"),
    "cgroup_parent": ("it is a setting of the host", "cgroup_parent in the host's sandbatch.toml"),
    "device": ("no device of the host is given to a sandbox", FILES),
    "devices": ("no device of the host is given to a sandbox", FILES),
    "device_cgroup_rule": ("no device of the host is given to a sandbox", FILES),
    "gpus": ("no device of the host is given to a sandbox", "leave it out"),
    "volumes_from": ("sandboxes share no files that they can write to", FILES),
    "sysctl": ("its kernel's settings are not those of the host", "leave it out"),
    "sysctls": ("its kernel's settings are not those of the host", "leave it out"),
    "runtime": ("every sandbox is gVisor's", "leave it out"),
}
# Networks that are none of CNI's, where nobody has given one that name.
NETWORKS = {
    "host": ("a sandbox is never in the host's network", "-p, --publish opens a port of the host"),
    "none": ("every sandbox is in a network", "--egress deny and --isolate close it"),
}


def refusal(word: str) -> tuple[str, str] | None:
    """Why there is no such word, and what is there instead."""
    return REFUSED.get(word.lstrip("-").partition("=")[0].replace("-", "_").lower())


def explain_network(error: BadInput) -> BadInput:
    """The same error of a network that is not there, with what other launchers mean by its name."""
    name = error.what.removeprefix("network ").partition(":")[0]
    if not error.what.startswith("network ") or name not in NETWORKS:
        return error
    why, todo = NETWORKS[name]
    return BadInput(error.what, f"{why}, and there is no CNI network of that name", todo)


class RefusingCommand(TyperCommand):
    """A command that says of such an option why it is not there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = str(getattr(error, "option_name", ""))
            found = refusal(option) if option.startswith("--") else None
            if found is None:
                raise
            _refuse(option, *found)


def _refuse(option: str, why: str, todo: str) -> NoReturn:
    raise fail(option, why, todo, BadInput.exit_code) from None
