"""`make storm SEED=n KILLS=n`: exit 0 only if nothing was left over, lost or doubled."""

import argparse
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.storm.plan import make_plan
from tests.storm.run import run_storm, table

SUBNET = "10.239.0.0/24"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of the plan; by default a new one")
    parser.add_argument("--kills", type=int, default=1000, help="of the worker")
    parser.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    given = parser.parse_args()
    plan = make_plan(secrets.randbelow(10**6) if given.seed is None else given.seed, given.kills)
    print(f"seed {plan.seed}, mode {plan.mode}", flush=True)
    if given.plan:
        print("\n".join(map(str, plan.rounds)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="sandbatch-storm-"))
    tally = run_storm(plan, folder, SUBNET, lambda text: print(text, flush=True))
    print(table(plan, tally))
    for finding in tally.findings:
        print(f"FINDING {finding}")
    if tally.findings:
        print(f"seed {plan.seed}; journals and logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
