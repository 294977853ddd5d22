"""Changes to bytes, and to the JSON in them, as a seeded random number generator has it."""

import json
from random import Random
from typing import Any

DEEP = 5000
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "é",
        "²",
        "../../outside",
        "/etc/passwd",
        "a/b",
        ".",
        "..",
        "x" * 5000,
        "%s{0}",
    ),
    *("sb-0123456789abcdef", "sb-../../../../etc", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "-1"),
    *([], {}, [[]], [None], ["a", 1], {"": {}}, {"a": None}, {"__type__": "datetime", "__value__": 1}),
    *({"__type__": "uuid", "__value__": {"hex": "0" * 32}}, {"__type__": "bytes", "__value__": "a"}),
)
PIECES = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\n\n",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
    ),
    *(b",", b":", b"null", b"NaN", b"-", b"1" * 5000, b"1e999", b"../", b"..", b"/", b" ", b"\t", b"\\ud800"),
    *(
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"&a [*a]",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system",
        b"--- ",
        b"%",
    ),
)


def changed(random: Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with a few changes; of JSON, a line of it or all, also in its values."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        data = _json(random, data) if random.random() < 0.6 else _bytes(random, data, others)
    return data[: 1 << 20]


def _bytes(random: Random, data: bytes, others: list[bytes]) -> bytes:
    at, end = sorted(random.randint(0, len(data)) for _ in range(2))
    kind = random.randrange(7)
    if kind == 0:
        return data[:at]  # torn
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:end] + data[at:]
    if kind == 3:
        return data[:at] + random.choice(PIECES) + data[at:]
    if kind == 4:
        return data[:at] + random.choice(PIECES) + data[end:]
    if kind == 5:
        other = random.choice(others)
        return data[:at] + other[random.randint(0, len(other)) :]
    return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]


def _json(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    for text, put in ((lines[number], True), (data, False)):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        made = json.dumps(_value(random, found), ensure_ascii=random.random() < 0.9)
        raw = made.encode("utf-8", "surrogatepass")
        return b"\n".join([*lines[:number], raw, *lines[number + 1 :]]) if put else raw
    return _bytes(random, data, [data])


def _value(random: Random, found: Any) -> Any:
    """One value somewhere in it, or a key, is another."""
    if random.random() < 0.15 or not isinstance(found, dict | list) or not found:
        return random.choice(HOSTILE)
    if isinstance(found, list):
        at = random.randrange(len(found))
        if random.random() < 0.1:
            return found * 2
        return [*found[:at], _value(random, found[at]), *found[at + 1 :]]
    key = random.choice(list(found))
    kind = random.random()
    if kind < 0.1:
        return {name: value for name, value in found.items() if name != key}
    if kind < 0.2:
        return {**found, str(random.choice(HOSTILE)): found[key]}
    return {**found, key: _value(random, found[key])}
