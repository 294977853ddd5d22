"""A host takes work as it has room: at once, never more than it may, and nothing gets lost on the way."""

from datetime import datetime

from tests.host.system import System


def test_a_full_host_takes_again_as_soon_as_one_has_ended(make_system):
    """Its end rings the host's bell: nobody waits for the next look, and never are there two."""
    system: System = make_system(SANDBATCH_CAPACITY="1")
    system.start()
    ids = system.run("--count", "4", "--", "true")
    assert set(system.wait(ids, "terminal").values()) == {"exited"}

    told = [one for one in system.events() if one["state"] in ("placed", "exited")]

    assert [one["state"] for one in told] == ["placed", "exited"] * 4
    times = [datetime.fromisoformat(one["t"]) for one in told]
    waits = [
        (after - before).total_seconds() for before, after in zip(times[1::2], times[2::2], strict=False)
    ]
    assert max(waits) < 1, waits
