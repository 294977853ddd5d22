"""What `doctor` says of the keys of a host."""

import pytest

from tasks import signing
from tasks.fleet_keys import write_keys
from tasks.key_rows import key_rows
from worker.settings import Settings


@pytest.fixture
def fleet(tmp_path):
    for cached in (signing._signer, signing._trust):
        cached.cache_clear()
    write_keys(tmp_path / "fleet", "broker", ["h1", "h2"], ["alice"])
    return tmp_path / "fleet"


def rows(fleet, host: str = "h1", **given):
    own = fleet / f"host-{host}"
    named = {"signing_key": own / f"host-{host}.key", "trusted_keys": own / "trusted", "host": host}
    named |= {"broker_url": "rediss://b", "broker_ca": own / "ca.crt", **given}
    return {row.name: row for row in key_rows(Settings(**named))}


def test_a_host_without_keys_has_no_rows(tmp_path):
    """The embedded broker's socket is root's: there is nothing to be signed."""
    assert key_rows(Settings(run_dir=tmp_path)) == []


def test_a_host_with_the_keys_of_a_fleet_is_ready(fleet):
    found = rows(fleet)
    assert all(row.ok for row in found.values())
    assert found["keys"].version == "host-h1"
    assert "trusts 3 keys" in found["keys"].found


def test_the_key_of_another_host_is_told(fleet):
    """Copied to the wrong machine, its messages would be refused by itself."""
    found = rows(fleet, host="h1", signing_key=fleet / "host-h2" / "host-h2.key")
    assert not found["keys"].ok
    assert "host-h2" in found["keys"].found


def test_a_key_that_everybody_may_read_is_told(fleet):
    key = fleet / "host-h1" / "host-h1.key"
    key.chmod(0o644)
    row = rows(fleet)["keys"]
    assert not row.ok
    assert row.mend == f"chmod 600 {key}"


@pytest.mark.parametrize(("text", "words"), [(None, "No such file"), ("text", "no certificate in PEM")])
def test_a_ca_that_is_none_is_told(fleet, tmp_path, text, words):
    file = tmp_path / "ca.crt"
    if text is not None:
        file.write_text(text)
    row = rows(fleet, broker_ca=file)["broker CA"]
    assert not row.ok
    assert words in row.found
