"""CNI plugins that write down how they are called and answer as told."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In sh, since it starts ten times as fast as Python. Calls are numbered in their order.
SCRIPT = """#!/bin/sh
here=${0%/*} name=${0##*/}
set -- "$here"/calls/*.stdin
[ -e "$1" ] || shift
call="$here/calls/$((1000 + $#)).$name"
env | grep '^CNI_' > "$call.env"
cat > "$call.stdin"
answer="$here/answers/$name.$CNI_COMMAND"
[ -e "$answer.stderr" ] && cat "$answer.stderr" >&2
[ -e "$answer.stdout" ] && cat "$answer.stdout"
[ -e "$answer.exit" ] && exit "$(cat "$answer.exit")"
exit 0
"""


@dataclass(frozen=True)
class Call:
    """One run of a plugin: its name, CNI_* without their prefix, and its stdin as JSON."""

    plugin: str
    env: dict[str, str]
    stdin: dict[str, Any]

    @property
    def command(self) -> str:
        return self.env["COMMAND"]


@dataclass(frozen=True)
class Plugins:
    """A plugin folder of such doubles."""

    folder: Path

    def add(self, *names: str) -> None:
        for place in ("calls", "answers"):
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            (self.folder / name).write_text(SCRIPT)
            (self.folder / name).chmod(0o755)

    def answer(
        self, plugin: str, command: str, stdout: object = "", *, exit_code: int = 0, stderr: str = ""
    ) -> None:
        """Tell one what it prints: a text as it is, anything else as JSON."""
        text = stdout if isinstance(stdout, str) else json.dumps(stdout)
        for suffix, content in (("stdout", text), ("stderr", stderr), ("exit", str(exit_code))):
            (self.folder / "answers" / f"{plugin}.{command}.{suffix}").write_text(content)

    def take_calls(self) -> list[Call]:
        """The calls since the last time, in their order."""
        calls = []
        for stdin in sorted((self.folder / "calls").glob("*.stdin")):
            env = stdin.with_suffix(".env")
            pairs = [line.removeprefix("CNI_").split("=", 1) for line in env.read_text().splitlines()]
            calls.append(Call(stdin.stem.split(".", 1)[1], dict(pairs), json.loads(stdin.read_text())))
            stdin.unlink()
            env.unlink()
        return calls
