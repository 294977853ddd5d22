"""What `run --dry-run` found, in sections for people."""

import json
import shlex
from typing import Any

from cli.output import one_line


def print_plan(found: dict[str, Any]) -> None:
    """Each section with what a launch would hand to one program, as that program gets it."""
    _section("config.json", _json(found["config"]))
    for call in found["cni"]:
        title = (
            f"CNI {call['command']} by plugin {call['plugin']}: network {call['network']}, {call['if_name']}"
        )
        env = [one_line(f"{name}={value}") for name, value in call["env"].items()]
        _section(title, "\n".join([*env, _json(call["stdin"])]))
    _section("firewall: nft -f -", found["firewall"].rstrip() or "nothing: no egress policy, not isolated")
    _section("programs", "\n".join(one_line(shlex.join(argv)) for argv in found["runsc"]))
    unknown = [one_line(f"{what}: {shown}") for what, shown in found["unknown"].items()]
    _section("known only at launch; here stands", "\n".join(unknown))


def _section(title: str, text: str) -> None:
    print(f"# {title}\n{text}\n")


def _json(document: Any) -> str:
    return json.dumps(document, indent=1)
