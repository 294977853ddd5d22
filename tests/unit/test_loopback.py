"""When the rule is asked for that keeps the loopback closed; tests/contain tries what it holds back."""

import pytest

from worker import loopback, nft
from worker.errors import HostNotReady
from worker.settings import Settings


def test_it_is_open_where_a_port_was_published_and_the_rule_is_not_whole(tmp_path, monkeypatch):
    settings = Settings(run_dir=tmp_path)
    found = {"rules": 0}
    monkeypatch.setattr(nft, "rules_in", lambda *_: found["rules"])
    assert not loopback.is_open(settings), "nothing was published"
    settings.ports_dir.mkdir()
    assert loopback.is_open(settings)
    found["rules"] = 1
    assert loopback.is_open(settings)
    found["rules"] = 2
    assert not loopback.is_open(settings)


def test_without_nft_no_port_is_published(monkeypatch):
    monkeypatch.setattr(nft, "is_here", lambda: False)
    with pytest.raises(HostNotReady, match="opens its loopback to sandboxes"):
        loopback.check_possible()


def test_its_rules_spare_the_loopback_itself():
    assert loopback.TEXT.count('iifname != "lo"') == len(loopback.RULES) == loopback.TEXT.count("add rule")
