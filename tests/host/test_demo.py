"""`sandbatch demo`, as `make demo` runs it."""

from tests.host.system import System


def test_the_demo_says_hello_three_times_and_leaves_nothing(make_system):
    """The first thing that a new user sees; it starts and stops its own broker and worker."""
    system: System = make_system(SANDBATCH_NETWORK="sandbatch")

    done = system.cli("demo")

    assert done.stdout.count("Hello World!") == 3
    assert "netns s" in done.stdout
    assert "audit: clean" in done.stderr
    own = next(line for line in done.stderr.splitlines() if line.startswith("network sandbatch: "))
    assert str(system.folder) in own
    assert not (system.run_dir / "broker.sock").exists()
    system.bridge = system.own_bridge()
