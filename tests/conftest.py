"""What every test may ask for. A missing part skips on a laptop, with the reason, and fails in CI."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

# A shell that starts us in the background has this ignored, and so would all commands that we send a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ARTEFACTS = Path(os.environ.get("TEST_ARTEFACTS") or Path(__file__).parents[1] / "build" / "artefacts")
STARTED = time.time()
PLUGIN_DIRS = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
PLUGINS = ("bridge", "host-local", "loopback")
PROGRAMS = ("runsc", "conmon", "tini", "iptables-save", "nsenter", "setpriv", "ip", "nft")


@pytest.fixture(scope="session")
def host_parts() -> None:
    """Root and the real parts of a host; `sandbatch setup` installs them."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    lacking += [
        f"CNI plugin {name}" for name in PLUGINS if not any((d / name).is_file() for d in PLUGIN_DIRS)
    ]
    if os.geteuid() != 0:
        lacking.insert(0, "root")
    if lacking:
        lack(f"this machine lacks {', '.join(lacking)}: run sandbatch setup as root")


@pytest.fixture(scope="session")
def image_parts() -> None:
    """Root, and what pulls images; `sandbatch setup` installs it."""
    lacking = [name for name in ("skopeo", "umoci", "setpriv", "prlimit") if shutil.which(name) is None]
    if os.geteuid() != 0:
        lacking.insert(0, "root")
    if lacking:
        lack(f"this machine lacks {', '.join(lacking)}: run sandbatch setup as root")


def lack(reason: str) -> None:
    """Skip for want of a part; in CI a skipped test is a failed one."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> None:
    """A browser, and what drives it; `make test-host` installs both."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if lacking:
        lack(f"this machine lacks {', '.join(lacking)}: apt-get install chromium chromium-driver")


@pytest.fixture
def artefacts() -> Path:
    """Where a test leaves what a person may want to look at: TEST_ARTEFACTS, or build/artefacts."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    return ARTEFACTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what these tests have left to look at."""
    for path in sorted(ARTEFACTS.glob("*")):
        if path.stat().st_mtime >= STARTED:
            terminalreporter.write_line(f"artefact: {path}")
