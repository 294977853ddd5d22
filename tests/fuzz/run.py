"""Runs by a seed: the same seed, the same bytes."""

import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.mutate import changed
from tests.fuzz.targets import Target


@dataclass(frozen=True)
class Failure:
    """Bytes that a reader did not stand; `where` names the reader and the line that failed."""

    target: str
    where: str
    data: bytes
    words: str


def runs(target: Target, seed: int, count: int) -> Iterator[Failure]:
    """The real bytes as they are, then `count` changed ones, each in a folder beside one that is not its."""
    random, seeds = Random(f"{target.name} {seed}"), target.seeds()  # noqa: S311 - to be repeated
    place = Path(tempfile.mkdtemp(prefix="sandbatch-fuzz-"))
    outside = place / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    try:
        for number in range(len(seeds) + count):
            data = seeds[number] if number < len(seeds) else changed(random, random.choice(seeds), seeds)
            if failure := _one(target, data, place / "in"):
                yield failure
            if [(one.name, one.read_text()) for one in outside.iterdir()] != [("kept", "kept")]:
                yield Failure(target.name, "outside", data, "it changed a folder that is not its own")
    finally:
        shutil.rmtree(place)


def _one(target: Target, data: bytes, folder: Path) -> Failure | None:
    folder.mkdir()
    try:
        target.run(data, folder)
    except Exception as error:  # noqa: BLE001 - which ones may come, the target knows
        frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if Path(one.filename).parent.name in ("worker", "tasks", "cli", "fuzz")]
        where = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
        return Failure(target.name, where, data, str(error)[:200])
    finally:
        shutil.rmtree(folder)
    return None
