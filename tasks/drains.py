"""A drained host stays drained: its disk remembers the wish, should the broker lose it, and the other way."""

import json
import logging
import secrets
import threading
from pathlib import Path
from typing import Any

from tasks.host_record import Hosts
from worker.settings import Settings

log = logging.getLogger("sandbatch")
FILE = "drained.json"
_settling = threading.Lock()  # heartbeat and puller both do, and the newest is to be written last


def settle(record: Hosts, current: Settings) -> dict[str, Any] | None:
    """Bring the newest of both wishes to where it is missing; returns it, or None if there is none.

    A disk that cannot be written is logged: the heartbeat must go on.
    """
    with _settling:
        wish, kept = record.drain_of(current.host), _read(current.state_dir / FILE)
        if wish is None and kept is None:
            return None
        if kept is None or (wish is not None and wish["at"] > kept["at"]):
            _write(current.state_dir / FILE, wish)
            return wish
        if wish is None or wish["at"] < kept["at"]:
            record.restore_drain(current.host, kept)
        return kept


def is_drained(current: Settings) -> bool:
    """As this host's disk remembers it; the broker may know a newer wish for some seconds."""
    kept = _read(current.state_dir / FILE)
    return kept is not None and bool(kept["drained"])


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
        return {"drained": bool(found["drained"]), "at": float(found["at"]), "why": str(found["why"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is not to be read, the broker's word counts: %s", file, error)
        return None


def _write(file: Path, wish: dict[str, Any] | None) -> None:
    writing = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        writing.write_text(json.dumps(wish))
        writing.replace(file)
    except OSError as error:
        log.warning("%s cannot be written, the broker alone remembers the drain: %s", file, error)
        writing.unlink(missing_ok=True)
