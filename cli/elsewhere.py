"""Commands in modules of their own, imported when one of them is asked for: else every start pays for all."""

from importlib import import_module
from typing import Any

from typer.core import TyperGroup
from typer.main import get_group

# Each module has an `app` with its commands.
MODULES = {
    "run": "cli.run",
    "batch": "cli.batch",
    "batches": "cli.batch",
    "cancel": "cli.batch",
    "ls": "cli.ls",
    "logs": "cli.calls",
    "exec": "cli.calls",
    "cp": "cli.copy",
    "hosts": "cli.hosts",
    "drain": "cli.hosts",
    "resume": "cli.hosts",
    "images": "cli.images",
    "image": "cli.images",
    "pull": "cli.pull",
    "keys": "cli.keys",
}


class Commands(TyperGroup):
    """The commands of `cli.main`, then those that are elsewhere."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*(name for name in super().list_commands(ctx) if name not in MODULES), *MODULES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            # An unknown one is looked for in all: "did you mean" goes by what is loaded.
            for module in {MODULES[cmd_name]} if cmd_name in MODULES else set(MODULES.values()):
                self.commands.update(get_group(import_module(module).app).commands)
        return super().get_command(ctx, cmd_name)
