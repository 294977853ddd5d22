"""What must not be read in a log or an error: passwords of URLs, and the environment of a sandbox.

Programs echo what they were given (`error finding executable "x" in PATH [/secret]`): their words are not
trusted to be free of it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import unquote, urlsplit

from worker.errors import SandbatchError

HIDDEN = "***"
PLAIN = 6  # a shorter value is hidden only with its name before it: "1" is in every second word
LOGIN = re.compile(r"(?<=://)[^/@\s]*@|(?<=[?&]password=)[^&'\"\s]*")
_known: set[str] = set()  # of this process, for ever: the broker's password


def know(*values: str) -> None:
    """Hide these from now on, in every thread and in what is forked."""
    _known.update(value for value in values if len(value) >= PLAIN)  # a URL's login goes anyway


def know_url(url: str) -> None:
    """Hide the password of a URL, as it stands there and as it is meant."""
    password = urlsplit(url).password
    if password:
        know(password, unquote(password))


def hide(text: str, env: Mapping[str, str] | None = None) -> str:
    """The text without the logins of URLs, what this process knows to be secret, and a sandbox's `env`."""
    text = LOGIN.sub(lambda found: HIDDEN + ("@" if found[0].endswith("@") else ""), text)
    return without(text, (*_known, *values_of(env or {})))


def scrub(error: BaseException, env: Mapping[str, str]) -> None:
    """Take a sandbox's `env` out of an error's words, and of the arguments that Celery rebuilds it from."""
    values = values_of(env)
    if not isinstance(error, SandbatchError) or not values:
        return
    for part in ("what", "why", "todo", "msg"):
        if isinstance(text := getattr(error, part, None), str):
            setattr(error, part, without(text, values))
    error.args = tuple(without(one, values) if isinstance(one, str) else one for one in error.args)


def values_of(env: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(value if len(value) >= PLAIN else f"{name}={value}" for name, value in env.items() if value)


def without(text: str, values: Iterable[str]) -> str:
    """The text without these values, also where a program quotes them, or the text ends within one."""
    shapes = _shapes_of(tuple(values))
    for shape in shapes:
        text = text.replace(shape, HIDDEN)
    for shape in shapes:
        text = _without_part(text, shape)
    return text


def _without_part(text: str, shape: str) -> str:
    if len(shape) <= PLAIN:
        return text
    at = text.find(shape[:PLAIN], max(0, len(text) - len(shape)))
    while at >= 0:
        if shape.startswith(text[at:]):
            return text[:at] + HIDDEN
        at = text.find(shape[:PLAIN], at + 1)
    return text


@lru_cache(maxsize=64)
def _shapes_of(values: tuple[str, ...]) -> tuple[str, ...]:
    """Longest first: one may be a part of another."""
    shapes = {shape for value in values for shape in _shapes(value) if len(shape) >= PLAIN}
    shapes.update(values)  # a short one has its name before it
    return tuple(sorted(shapes, key=len, reverse=True))


def _shapes(value: str) -> Iterator[str]:
    yield value
    yield from (line.strip() for line in value.splitlines())  # of an output often one line is kept
    yield " ".join(value.split(":"))  # Go's words of a PATH
    for quoted in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)):
        yield quoted[1:-1]
        yield quoted[1:-1].replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
