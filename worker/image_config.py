"""What an image's config says where the spec is silent, by docker's rules.

The config is as hostile as the layers: what is of the wrong type is as if it were not there, and what
remains is bounded, as it goes into the sandbox's journal.
"""

import posixpath
from typing import Any

from worker.errors import ImageError
from worker.image_store import Image
from worker.image_user import find_user
from worker.rootfs import DEFAULT_PATH
from worker.settings import Settings
from worker.spec import OF_IMAGE, Spec
from worker.spec_parts import signal_name, text

MOST_WORDS, MOST_BYTES = 10_000, 256 << 10  # of command and environment, of all that is taken from a config
MOST_LABELS = 256
LONGEST_PATH = 4095


def overrides(asked: Spec, image: Image, settings: Settings) -> dict[str, Any]:
    """Fields of the spec as the launch has them, in JSON's types: see `Journal.spec`.

    Raises:
        ImageError: There is no command, a user that the image does not know, or a config that is too large.
    """
    config = image.config.get("config")
    config = config if isinstance(config, dict) else {}
    user = find_user(image.rootfs, asked.user or _text(config.get("User")))
    env = {"PATH": DEFAULT_PATH, "HOME": user.home, **_env(config), **asked.env}
    args = _command(asked, config, image)
    made = {
        "args": args,
        "env": env,
        "cwd": asked.cwd or _folder(config.get("WorkingDir")),
        "user": f"{user.uid}:{user.gid}",
        "groups": sorted({*user.groups, *asked.groups} - {user.gid}),
        "ready": _port(config) if asked.ready == OF_IMAGE else asked.ready,
        "stop_signal": asked.stop_signal or _signal(config),
        "rootfs": str(image.rootfs),
    }
    words = [*args, *(f"{name}={value}" for name, value in env.items())]
    if sum(len(one.encode()) + 1 for one in words) > MOST_BYTES or len(words) > MOST_WORDS:
        raise ImageError(f"image {image.digest}", "its command and environment are too large", "use another")
    return made


def labels_of(image: Image) -> dict[str, str]:
    """The labels of its config, as far as they are texts; never more than `MOST_BYTES` in all."""
    config = image.config.get("config")
    given = config.get("Labels") if isinstance(config, dict) else None
    found: dict[str, str] = {}
    left = MOST_BYTES
    for name, value in given.items() if isinstance(given, dict) else ():
        left -= len(str(name).encode()) + len(_text(value).encode())
        if left < 0 or len(found) >= MOST_LABELS:
            break
        if name and isinstance(value, str):
            found[_text(name)] = _text(value)
    return found


def _command(asked: Spec, config: dict[str, Any], image: Image) -> list[str]:
    """As docker: arguments take the place of Cmd; an entrypoint that is asked for drops the image's Cmd."""
    if asked.entrypoint is not None:
        found = [*asked.entrypoint, *asked.args]
    else:
        found = [*_texts(config.get("Entrypoint")), *(asked.args or _texts(config.get("Cmd")))]
    if not found or not found[0]:
        todo = "name one after --"
        raise ImageError(f"image {asked.image or image.digest}", "says no command, and none was given", todo)
    return found


def _env(config: dict[str, Any]) -> dict[str, str]:
    pairs = (one.partition("=") for one in _texts(config.get("Env")))
    return {name: value for name, equals, value in pairs if name and equals}


def _folder(value: Any) -> str:
    """A relative one is taken from the root, as docker does."""
    given = _text(value)
    if not given or len(given) > LONGEST_PATH:
        return "/"
    return posixpath.normpath("/" + given.lstrip("/"))


def _port(config: dict[str, Any]) -> str:
    """`tcp:PORT` for the lowest of the ports that it exposes; of a range its first."""
    given = config.get("ExposedPorts")
    ports = []
    for word in given if isinstance(given, dict) else ():
        port, _, protocol = word.partition("/")
        port = port.partition("-")[0]
        if protocol in ("", "tcp") and port.isascii() and port.isdigit() and len(port) <= 5:
            ports.append(int(port))
    ports = [port for port in ports if 1 <= port <= 65535]
    return f"tcp:{min(ports)}" if ports else "none"


def _signal(config: dict[str, Any]) -> str | None:
    try:
        return signal_name(_text(config.get("StopSignal")))
    except ValueError:
        return None


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return []
    return [_text(one) for one in value]


def _text(value: Any) -> str:
    """What the kernel can take; anything else is as if it were not there."""
    try:
        return text(value) if isinstance(value, str) else ""
    except ValueError:
        return ""
