"""Many hosts under one batch, while machines fail; `python -m tests.hosts.judged` has it at full size."""

import pytest

from tests.hosts.judged import CUT, DRAINED, KILLED, peaks, run_scenario

HOSTS, SANDBOXES, CAPACITY = 8, 72, 4


@pytest.mark.timeout(400)
def test_every_sandbox_ends_as_it_should_while_hosts_die_and_are_cut_off(make_fleet):
    """More than they can have at a time, so that some of it waits; 32 s without a host make it lost."""
    fleet, said = make_fleet(HOSTS, SANDBATCH_CAPACITY=str(CAPACITY)), []

    verdict = run_scenario(fleet, SANDBOXES, said.append)

    assert verdict.findings == [], "\n".join([*said, verdict.table()])
    assert sum(verdict.placed.values()) == sum(verdict.ends.values())
    assert set(verdict.placed) == set(fleet.hosts), "each had a part of it"
    steady = [count for name, count in verdict.placed.items() if name not in (KILLED, CUT, DRAINED)]
    assert max(steady) <= 2 * min(steady), verdict.table()


def test_a_host_that_had_more_than_it_may_is_seen_from_the_events():
    def event(container_id: str, state: str, host: str) -> dict[str, str]:
        return {"id": container_id, "state": state, "host": host}

    events = [
        event("a", "queued", ""),
        event("a", "placed", "h1"),
        event("b", "placed", "h1"),
        event("c", "placed", "h2"),
        event("a", "running", "h1"),
        event("a", "exited", "h1"),
        event("d", "placed", "h1"),
        event("b", "failed", "h1"),
        event("d", "exited", "h1"),
        event("d", "exited", "h1"),
        event("e", "placed", "h1"),
        event("f", "cancelled", ""),
    ]
    assert peaks(events) == {"h1": 2, "h2": 1}
