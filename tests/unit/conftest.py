"""What several unit tests begin with."""

import pytest

from worker.settings import Settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    """A host in folders of the test's own, in which no sandbox has ended."""
    settings = Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run")
    settings.exit_dir.mkdir(parents=True)
    return settings
