"""Which network a name means, and what the errors of broken files say."""

import json
from pathlib import Path

import pytest

from worker.cni_config import find_network, list_networks, network_from_bytes
from worker.errors import BadNetwork


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "net.d"
    made.mkdir()
    return made


def write(folder: Path, name: str, document: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document, indent=1))
    return path


def network(name: str = "net", plugin: str = "one", **keys: object) -> dict[str, object]:
    return {"cniVersion": "1.0.0", "name": name, "plugins": [{"type": plugin}], **keys}


def single(name: str = "net", plugin: str = "one", **keys: object) -> dict[str, object]:
    return {"cniVersion": "1.0.0", "name": name, "type": plugin, **keys}


def types(folder: Path, *more: Path) -> list[str]:
    return [plugin["type"] for plugin in find_network("net", [folder, *more]).plugins]


def error_of(folder: Path) -> BadNetwork:
    with pytest.raises(BadNetwork) as caught:
        find_network("net", [folder])
    assert caught.value.exit_code == 2
    return caught.value


def test_lists_come_before_single_plugins_within_one_folder(folder):
    write(folder, "00.conf", single(plugin="single"))
    write(folder, "99.conflist", network(plugin="list"))
    assert types(folder) == ["list"]


def test_the_first_folder_wins_even_with_a_single_plugin(folder, tmp_path):
    """Our own folder comes first: what a user's list is called must not matter to our network."""
    write(folder, "a.conf", single(plugin="first"))
    write(tmp_path / "later", "a.conflist", network(plugin="later"))
    assert types(folder, tmp_path / "later") == ["first"]


def test_a_folder_that_is_missing_is_an_empty_one(folder, tmp_path):
    write(folder, "a.conflist", network())
    assert find_network("net", [tmp_path / "missing", folder]).name == "net"


def test_a_network_that_is_nowhere_names_those_that_are(folder):
    write(folder, "a.conflist", network("blue"))
    write(folder, "b.conf", single("red"))
    write(folder, "c.conf", single("of an old version", cniVersion="0.2.0"))
    assert str(error_of(folder)) == (f"network net: there is none of that name in {folder}; known: blue, red")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.conflist", '{\n "name": "x",\n "plugins": [}', "line 3: Expecting value"),
        ("a.conf", '{\n "name": "x"\n "type": "one"\n}', "line 3: Expecting ',' delimiter"),
        ("a.conflist", "", "line 1: Expecting value"),
        ("a.conflist", "\ufeff{}", "line 1: Unexpected UTF-8 BOM"),
        ("a.conflist", "[]", "line 1: a JSON object is needed"),
        ("a.conflist", '{"a":' * 100_000, "nested too deeply"),
        ("a.conflist", '{"a": NaN}', "NaN is no JSON"),
        ("a.conflist", '{"a": 1e999}', "1e999 is too large"),
        ("a.conflist", '{\n "cniVersion": "1.0.0"}', "line 1: key name: the network's name is needed"),
        ("a.conflist", '{\n "name": 7}', "line 2: key name: 7 is not a string"),
        ("a.conflist", network() | {"cniVersion": 1}, "line 2: key cniVersion: 1 is not a string"),
        (
            "a.conflist",
            network(cniVersions=["1.0.0", "1.x"]),
            "line 11: key cniVersions[1]: '1.x' is no version",
        ),
        ("a.conflist", network(disableGC="yes"), "line 9: key disableGC: 'yes' is neither true nor false"),
        ("a.conflist", '{"name": "x",\n\n"plugins": []}', "line 3: key plugins: no plugin"),
        ("a.conflist", '{"name": "x"}', "line 1: key plugins: no plugin"),
        ("a.conflist", network(plugins=[{"type": "a"}, "b"]), "line 8: key plugins[1]: a plugin's object"),
        (
            "a.conflist",
            network(plugins=[{"type": "a"}, {"a": 1}]),
            "line 8: key plugins[1].type: the plugin's",
        ),
        (
            "a.conflist",
            network(plugins=[{"type": "a", "ipam": {"type": 7}}]),
            "line 8: key plugins[0].ipam.type",
        ),
        (
            "a.conflist",
            network(plugins=[{"x": [{"dns": 1}, "}"], "type": "a", "dns": {"search": ["a", 2]}}]),
            "line 16: key plugins[0].dns.search[1]: 2 is not a string",
        ),
        (
            "a.conf",
            single(capabilities={"a": True, "b": "yes"}),
            "line 7: key capabilities.b: 'yes' is not true",
        ),
        ("a.conf", network(), "line 4: key plugins: a list stands in a file for one plugin; name the file"),
        ("a.conf", '{\n "name": "x"\n}', "line 1: key type: the plugin's name is needed"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_key(folder, name, text, words):
    """It comes before the one that is wanted, as libcni reads them; a list is laid out one key a line."""
    path = write(folder, name, text)
    write(folder, "z.conflist" if name.endswith("list") else "z.conf", single())
    error = error_of(folder)
    assert error.what == f"CNI file {path}"
    assert words in str(error)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            network(cniVersion="0.2.0"),
            "line 2: key cniVersion: '0.2.0' is not supported; one of 0.3.1, 0.4.0",
        ),
        (network(cniVersion="1.2.0"), "key cniVersion: '1.2.0' is not supported"),
        ({"name": "net", "plugins": [{"type": "a"}]}, "line 1: key cniVersion: '0.1.0' is not supported"),
        (network(plugins=[{"type": "a"}, {"type": "../a"}]), "line 9: key plugins[1].type: '../a' is a path"),
    ],
)
def test_the_wanted_network_must_be_one_that_we_can_run(folder, document, words):
    write(folder, "a.conflist", document)
    assert words in str(error_of(folder))


def test_a_single_plugin_that_we_cannot_run_is_named_by_its_own_lines(folder):
    write(folder, "a.conf", single(plugin="x/y"))
    assert "line 4: key type: 'x/y' is a path" in str(error_of(folder))


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../a", "a\n"])
def test_a_name_that_no_network_may_have(name):
    with pytest.raises(BadNetwork, match=r"key name: .* is no network name"):
        network_from_bytes(json.dumps(network(name)).encode())


def test_a_network_that_we_cannot_run_does_not_hide_the_others(folder):
    """libcni finds out only when it runs one; until then it reads on."""
    write(folder, "a.conflist", network("old", cniVersion="0.2.0"))
    write(folder, "b.conflist", network("bad name"))
    write(folder, "c.conflist", network())
    assert types(folder) == ["one"]
    networks, errors = list_networks([folder])
    assert list(networks) == ["net"]
    assert [error.what for error in errors] == [
        f"CNI file {folder / name}" for name in ("a.conflist", "b.conflist")
    ]


def test_all_networks_are_listed_around_the_broken_ones(folder, tmp_path):
    write(folder, "a.conflist", "{")
    write(folder, "b.conflist", network("blue", plugin="first"))
    write(folder, "c.conflist", network("blue", plugin="second"))
    (folder / "d.conf").symlink_to("nowhere")
    write(folder, "e.conf", single("red"))
    (tmp_path / "file").touch()
    networks, errors = list_networks([tmp_path / "file", folder])
    assert {name: one.plugins[0]["type"] for name, one in networks.items()} == {"blue": "first", "red": "one"}
    assert [error.what for error in errors] == [
        f"CNI folder {tmp_path / 'file'}",
        f"CNI file {folder / 'a.conflist'}",
        f"CNI file {folder / 'd.conf'}",
    ]


def test_bytes_that_are_no_utf_8_are_read_as_libcni_reads_them(folder):
    (folder / "a.conflist").write_bytes(json.dumps(network(x="?")).encode().replace(b"?", b"\xff"))
    assert types(folder) == ["one"]


def test_the_whole_list_holds_the_plugins_of_its_folder(folder):
    """libcni's cache keeps the file's bytes alone: a DEL from them would leave those plugins out."""
    write(folder, "a.conflist", network(disableGC="true"))
    write(folder, "net/1.conf", {"type": "two", "x": "<&>\ud800"})
    found = find_network("net", [folder])
    assert b"two" not in found.raw
    again = network_from_bytes(found.whole.decode().encode())  # a journal keeps text
    assert [plugin["type"] for plugin in again.plugins] == ["one", "two"]
    assert (again.name, again.cni_version, again.disable_gc) == ("net", "1.0.0", True)


def test_a_broken_plugin_of_the_folder_is_named_itself(folder):
    write(folder, "a.conflist", network())
    path = write(folder, "net/1.conf", '{\n"type": 1}')
    error = error_of(folder)
    assert (error.what, error.why) == (f"CNI file {path}", "line 2: key type: 1 is not a string")


@pytest.mark.parametrize(
    ("version", "at_least"),
    [
        ("0.3.1", []),
        ("0.4.0", ["0.4.0"]),
        ("1.0.0", ["0.4.0", "1.0.0"]),
        ("1.1.0", ["0.4.0", "1.0.0", "1.1.0"]),
    ],
)
def test_versions_are_compared_by_their_numbers(version, at_least):
    found = network_from_bytes(json.dumps(network(cniVersion=version)).encode())
    assert [one for one in ("0.4.0", "1.0.0", "1.1.0") if found.is_at_least(one)] == at_least
