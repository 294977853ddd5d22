"""What a command of `exec` is in OCI's words: the sandbox's own process, but for what is asked for.

runsc's flags would not do: without `--user` the runsc of 2024 takes root, whoever the sandbox's own
command runs as, and root would get no more capabilities than that one has.
"""

import json
from pathlib import Path
from typing import Any

from worker import bundle
from worker.calls import ExecCall
from worker.errors import SandbatchError
from worker.image_user import find_user
from worker.journal import Journal
from worker.spec import Spec
from worker.spec_parts import NUMBERS


def make_process(known: Journal, call: ExecCall) -> dict[str, Any]:
    """The OCI process of the call.

    Raises:
        SandbatchError: The bundle is gone: the sandbox has just ended. Or nobody knows such a user.
    """
    try:
        own = json.loads((known.bundle / "config.json").read_text())["process"]
    except FileNotFoundError:
        raise SandbatchError(known.container_id, "its command has ended", "see sandbatch show") from None
    env = dict(pair.split("=", 1) for pair in own["env"])
    made = {**own, "args": list(call.args), "cwd": call.cwd or own["cwd"]}
    if call.user:
        user = _user_of(known.spec, call.user, env)
        made |= {"user": user, "capabilities": bundle.capabilities_of(user["uid"])}
    made["env"] = [f"{name}={value}" for name, value in {**env, **call.env}.items()]
    return made


def _user_of(spec: Spec, words: str, env: dict[str, str]) -> dict[str, Any]:
    """Who `words` name, and into `env` the home of that user, where nobody asked for another."""
    if spec.image is None:
        if not NUMBERS.fullmatch(words):
            why = "numbers are needed, UID[:GID]: names are looked up in an image, and this sandbox has none"
            raise SandbatchError(f"user {words}", why, "correct it and run again")
        return bundle.user_of(words)
    root = Path(spec.rootfs)
    user = find_user(root, words)
    if env.get("HOME") == find_user(root, spec.user).home:
        env["HOME"] = user.home
    return bundle.user_of(f"{user.uid}:{user.gid}", user.groups)
