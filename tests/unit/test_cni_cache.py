"""Cache entries in libcni's format and place. That cnitool writes the same ones is in test_cni.py."""

import base64
import json
import os
import stat

import pytest

from worker import cni_cache
from worker.errors import SandbatchError

RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.5/16"}]}
KEY = {"network": "net", "container_id": "c1", "if_name": "eth0"}


def save(cache_dir, **changes):
    entry = {
        **KEY,
        "netns": "/ns",
        "config": b'{"name": "net"}',
        "cni_args": (("A", "b"),),
        "capability_args": {"ips": ["10.1.0.5/16"]},
        "result": RESULT,
    }
    cni_cache.save(cache_dir, **{**entry, **changes})


def test_an_entry_is_libcnis(tmp_path):
    save(tmp_path / "cni")
    assert json.loads((tmp_path / "cni/results/net-c1-eth0").read_text()) == {
        "kind": "cniCacheV1",
        "containerId": "c1",
        "config": base64.b64encode(b'{"name": "net"}').decode(),
        "ifName": "eth0",
        "networkName": "net",
        "netns": "/ns",
        "cniArgs": [["A", "b"]],
        "capabilityArgs": {"ips": ["10.1.0.5/16"]},
        "result": RESULT,
    }


def test_what_is_empty_is_left_out(tmp_path):
    save(tmp_path, netns="", cni_args=(), capability_args={})
    assert list(json.loads((tmp_path / "results/net-c1-eth0").read_text())) == [
        *("kind", "containerId", "config", "ifName", "networkName", "result")
    ]


def test_only_root_may_read_it(tmp_path):
    save(tmp_path / "cni")
    assert stat.S_IMODE((tmp_path / "cni/results").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cni/results/net-c1-eth0").stat().st_mode) == 0o600


def test_an_entry_comes_back_as_it_was_saved(tmp_path):
    save(tmp_path)
    entry = cni_cache.load(tmp_path, **{key: KEY[key] for key in KEY})
    assert entry is not None
    assert (entry.network, entry.container_id, entry.if_name, entry.netns) == ("net", "c1", "eth0", "/ns")
    assert (entry.config, entry.cni_args) == (b'{"name": "net"}', (("A", "b"),))
    assert (entry.capability_args, entry.result) == ({"ips": ["10.1.0.5/16"]}, RESULT)


def test_a_second_save_replaces_the_first_and_leaves_no_other_file(tmp_path):
    save(tmp_path)
    save(tmp_path, netns="/other")
    assert [entry.netns for entry in cni_cache.list_entries(tmp_path)] == ["/other"]
    assert os.listdir(tmp_path) == ["results"]
    assert os.listdir(tmp_path / "results") == ["net-c1-eth0"]


def test_what_a_killed_writer_left_is_no_entry_and_goes_with_it(tmp_path):
    """SIGKILL before the rename: others list results/, so the torn file must not stand in there."""
    save(tmp_path)
    torn = tmp_path / ".net-c1-eth0.sandbatch"
    torn.write_text('{"kind": "cniCa')
    save(tmp_path)  # over the torn one
    assert not torn.exists()
    torn.write_text('{"kind": "cniCa')
    assert len(cni_cache.list_entries(tmp_path)) == 1
    cni_cache.forget(tmp_path, **KEY)
    assert (os.listdir(tmp_path), os.listdir(tmp_path / "results")) == (["results"], [])


def test_forget_is_safe_to_repeat(tmp_path):
    save(tmp_path)
    cni_cache.forget(tmp_path, **KEY)
    cni_cache.forget(tmp_path, **KEY)
    cni_cache.forget(tmp_path / "missing", **KEY)
    assert cni_cache.list_entries(tmp_path) == []


def test_names_with_slashes_stay_inside_the_cache(tmp_path):
    (tmp_path / "victim").touch()
    cni_cache.forget(tmp_path / "cni", "net", "/../../../victim", "")
    cni_cache.forget(tmp_path / "cni", "..", "..", "../../../victim")
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[]", "7", '{"kind": "cniCacheV2"}', '{"kind": "cniCacheV1", "netns": 7}', "[" * 100_000],
    ids=["empty", "garbage", "list", "number", "other kind", "wrong type", "deep"],
)
def test_files_that_are_no_entries_are_passed_over(tmp_path, text):
    """Other runtimes write there, and not by rename."""
    save(tmp_path)
    (tmp_path / "results/net-c0-eth0").write_text(text)
    (tmp_path / "results/folder").mkdir()
    (tmp_path / "results/link").symlink_to("nowhere")
    assert [entry.container_id for entry in cni_cache.list_entries(tmp_path)] == ["c1"]
    assert cni_cache.load(tmp_path, "net", "c0", "eth0") is None


def test_a_cache_that_is_missing_has_no_entries(tmp_path):
    assert cni_cache.list_entries(tmp_path / "missing") == []
    assert cni_cache.load(tmp_path / "missing", **KEY) is None
    assert cni_cache.load_result(tmp_path / "missing", **KEY, version="1.0.0") is None


def test_the_result_comes_in_the_version_that_is_asked_for(tmp_path):
    save(tmp_path)
    assert cni_cache.load_result(tmp_path, **KEY, version="0.4.0") == {
        "cniVersion": "0.4.0",
        "ips": [{"version": "4", "address": "10.1.0.5/16"}],
        "dns": {},
    }


@pytest.mark.parametrize("text", ["garbage", "[]", '{"cniVersion": "0.9.0"}', "[" * 100_000])
def test_an_entry_without_a_result_says_which_it_is(tmp_path, text):
    save(tmp_path)
    (tmp_path / "results/net-c1-eth0").write_text(text)
    with pytest.raises(SandbatchError, match=r"CNI cache entry .*/results/net-c1-eth0: holds no result"):
        cni_cache.load_result(tmp_path, **KEY, version="1.0.0")
