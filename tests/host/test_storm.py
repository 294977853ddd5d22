"""A short storm in every run: the seeds are fixed, so that a failure is looked for with the same plan."""

import pytest

from tests.host.conftest import SUBNETS
from tests.storm.plan import make_plan
from tests.storm.run import run_storm, table


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [5, 8])  # with a broker of its own, and with the embedded one
def test_nothing_is_left_over_lost_or_doubled(unchanged_machine, tmp_path, seed: int):
    """The promise of the project: whatever fails, whenever it fails."""
    plan = make_plan(seed, kills=8)
    lines: list[str] = []

    tally = run_storm(plan, tmp_path / "storm", next(SUBNETS), lines.append)

    assert tally.findings == [], "\n".join([*lines, table(plan, tally)])
    assert tally.kills >= 8
    assert len(tally.ids) > 0


def test_a_plan_is_a_pure_function_of_its_seed():
    """Else nobody could look for a finding again; a longer plan begins like a shorter one."""
    assert make_plan(7, 20) == make_plan(7, 20)
    assert make_plan(7, 30).rounds[:20] == make_plan(7, 20).rounds
    assert make_plan(8, 20).rounds != make_plan(7, 20).rounds
