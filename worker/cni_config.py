"""Find a CNI network in configuration folders, as libcni's LoadNetworkConf does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import BadNetwork
from worker.spec import NETWORK_NAME

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")


@dataclass(frozen=True)
class Network:
    """A network configuration list; `raw` is its JSON as libcni's cache keeps it."""

    name: str
    cni_version: str
    plugins: tuple[dict[str, Any], ...]
    raw: bytes
    disable_check: bool = False
    disable_gc: bool = False
    file: Path | None = None

    def is_at_least(self, version: str) -> bool:
        return VERSIONS.index(self.cni_version) >= VERSIONS.index(version)


def find_network(name: str, conf_dirs: Sequence[Path]) -> Network:
    """The first network of that name: lists before single plugins, folder by folder.

    Raises:
        BadNetwork: There is none (the error has the known names), or a file before it is broken.
    """
    for folder in conf_dirs:
        for file in _files(folder):
            network = _load(file)
            if network.name == name:
                return network
    known = ", ".join(sorted(list_networks(conf_dirs)[0])) or "none"
    places = ", ".join(map(str, conf_dirs))
    raise BadNetwork(f"network {name}", f"there is none of that name in {places}", f"known: {known}")


def list_networks(conf_dirs: Sequence[Path]) -> tuple[dict[str, Network], list[BadNetwork]]:
    """All networks by name, and what is wrong with the files that cannot be read."""
    networks: dict[str, Network] = {}
    errors = []
    for file in (file for folder in conf_dirs for file in _files(folder)):
        try:
            network = _load(file)
            networks.setdefault(network.name, network)
        except BadNetwork as error:
            errors.append(error)
    return networks, errors


def network_from_bytes(raw: bytes, file: Path | None = None, where: str = "network") -> Network:
    """Read a list's JSON, such as a cache entry holds it.

    Raises:
        BadNetwork: Names the file, the line or the key.
    """
    document = _object(raw, where)
    name = document.get("name")
    if not isinstance(name, str) or not NETWORK_NAME.match(name):
        raise BadNetwork(where, f"key name: {name!r} is no network name", "letters, digits, '_', '.', '-'")
    version = _version(document, where)
    plugins = document.get("plugins")
    if not isinstance(plugins, list):
        raise BadNetwork(
            where, "key plugins: a list of plugin objects is needed", "see the CNI spec, section 1"
        )
    if file is not None and not _bool(document, "loadOnlyInlinedPlugins", where):
        from_folder = [
            _object(one.read_bytes(), str(one)) for one in sorted((file.parent / name).glob("*.conf"))
        ]
        if from_folder:
            plugins = [*plugins, *from_folder]
            # What DEL reads from the cache must be what ADD ran, whatever the folder holds by then.
            raw = json.dumps({**document, "plugins": plugins, "loadOnlyInlinedPlugins": True}).encode()
    if not plugins:
        raise BadNetwork(where, "key plugins: no plugin", "name at least one")
    for number, plugin in enumerate(plugins):
        if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str) or not plugin["type"]:
            raise BadNetwork(
                where, f"key plugins[{number}].type: the plugin's name is needed", "for example bridge"
            )
        if "/" in plugin["type"]:
            raise BadNetwork(
                where, f"key plugins[{number}].type: {plugin['type']!r} is a path", "give a name only"
            )
    return Network(
        name,
        version,
        tuple(plugins),
        raw,
        _bool(document, "disableCheck", where),
        _bool(document, "disableGC", where),
        file,
    )


def _files(folder: Path) -> list[Path]:
    lists = sorted(folder.glob("*.conflist"))
    return [
        *lists,
        *sorted(one for one in folder.glob("*") if one.suffix in (".conf", ".json") and one.is_file()),
    ]


def _load(file: Path) -> Network:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise BadNetwork(f"CNI file {file}", str(error.strerror), "correct or remove it") from None
    where = f"CNI file {file}"
    if file.suffix == ".conflist":
        return network_from_bytes(raw, file, where)
    plugin = _object(raw, where)
    if "plugins" in plugin:
        raise BadNetwork(
            where, "key plugins: a list stands in a file for one plugin", "name the file *.conflist"
        )
    if not plugin.get("type"):
        raise BadNetwork(where, "key type: the plugin's name is needed", "for example bridge")
    single = {key: plugin[key] for key in ("name", "cniVersion") if key in plugin}
    return network_from_bytes(json.dumps({**single, "plugins": [plugin]}).encode(), None, where)


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadNetwork(where, place, "correct or remove it") from None
    if not isinstance(document, dict):
        raise BadNetwork(where, "line 1: a JSON object is needed", "correct or remove it")
    return document


def _version(document: dict[str, Any], where: str) -> str:
    """The highest version that the list and this runtime both know."""
    offered = [document.get("cniVersion", "0.1.0"), *(document.get("cniVersions") or [])]
    known = [version for version in VERSIONS if version in offered]
    if not known:
        raise BadNetwork(
            where, f"key cniVersion: {offered[0]!r} is not supported", f"one of {', '.join(VERSIONS)}"
        )
    return known[-1]


def _bool(document: dict[str, Any], key: str, where: str) -> bool:
    value = document.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise BadNetwork(where, f"key {key}: {value!r} is neither true nor false", "correct it")
    return value
