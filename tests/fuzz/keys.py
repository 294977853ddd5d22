"""The keys of alice and of host h1, for this process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tasks import signing
from tasks.envelope import Guard
from tasks.signing import Signer
from worker.settings import Settings

WHO = ("user-alice", "host-h1")


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="sandbatch-fuzz-keys-"))
    atexit.register(shutil.rmtree, made)
    for who in WHO:
        signing.make_key(made, who)
    return made


@cache
def guard(who: str) -> Guard:
    """What host h1 would admit, and sign as `who`."""
    run = folder() / "run"
    run.mkdir(exist_ok=True)
    return Guard(Settings(host="h1", run_dir=run, signing_key=folder() / f"{who}.key", trusted_keys=folder()))


def signer(who: str) -> Signer:
    return Signer.read(folder() / f"{who}.key")
