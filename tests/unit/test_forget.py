"""The journal of a sandbox that has ended goes, whoever looks at it at that moment."""

import threading

import pytest

from tasks import workflow
from worker import journal as journals
from worker.spec import make_spec

ID = "sb-0123456789abcdef"


@pytest.fixture
def ended(settings, monkeypatch):
    """The journal of a sandbox that has ended, all undone."""
    monkeypatch.setattr(workflow, "settings", lambda: settings)
    spec = make_spec(args=["true"])
    known = journals.create(settings.sandboxes_dir, ID, attempt=1, batch="b", spec=spec)
    known.set_facts(final="exited")
    return known


def test_a_twin_that_only_looks_does_not_keep_the_journal(settings, ended):
    """A second message of one undo holds the lock while it reads that nothing is to do (storm, seed 5)."""
    holds, may_go = threading.Event(), threading.Event()

    def look() -> None:
        with journals.locked(settings.sandboxes_dir, ID):
            holds.set()
            may_go.wait(10)

    twin = threading.Thread(target=look)
    twin.start()
    assert holds.wait(10)
    threading.Timer(0.2, may_go.set).start()

    workflow.forget(ended)

    twin.join()
    assert not ended.folder.exists()


def test_it_may_be_repeated(ended):
    workflow.forget(ended)
    workflow.forget(ended)
    assert not ended.folder.exists()
