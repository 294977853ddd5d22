"""`python -m tests.fuzz --seed N --runs N [TARGET…]`; exit 0 only if every reader stood it."""

import argparse
import logging
import secrets
import sys
import time

from tests.fuzz.run import Failure, runs
from tests.fuzz.targets import TARGETS

SHOWN = 1500  # of bytes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--runs", type=int, default=1000, help="changed bytes for each target")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="of " + ", ".join(t.name for t in TARGETS)
    )
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of thousands of refusals nobody reads a line
    print(f"seed {asked.seed}", flush=True)
    found: dict[tuple[str, str], Failure] = {}
    for target in TARGETS:
        if asked.targets and target.name not in asked.targets:
            continue
        began = time.monotonic()
        for failure in runs(target, asked.seed, asked.runs):
            key = failure.target, failure.where
            if key not in found or len(failure.data) < len(found[key].data):
                found[key] = failure
        bad = sum(name == target.name for name, _ in found)
        print(
            f"{target.name}: {asked.runs} runs, {time.monotonic() - began:.1f} s, {bad} failures", flush=True
        )
    for failure in found.values():
        print(f"\n{failure.target}: {failure.where}: {failure.words}\n{failure.data[:SHOWN]!r}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
