"""Find a CNI network in configuration folders, as libcni's LoadNetworkConf does."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.cni_json import KeyPath, bad_key, dumps, parse_object
from worker.errors import BadNetwork
from worker.spec import NETWORK_NAME

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = (1, 1, 0)  # libcni 1.3 passes over anything newer in `cniVersions`
TYPES = {str: "a string", bool: "true or false", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Network:
    """A network configuration list; `raw` is its JSON as libcni's cache keeps it.

    `raw` lacks the plugins that stand in the folder of the network's name; `whole` has them.
    """

    name: str
    cni_version: str
    plugins: tuple[dict[str, Any], ...]
    raw: bytes
    disable_check: bool = False
    disable_gc: bool = False
    file: Path | None = None

    def is_at_least(self, version: str) -> bool:
        return VERSIONS.index(self.cni_version) >= VERSIONS.index(version)

    @property
    def whole(self) -> bytes:
        """The list as ADD runs it, to be kept for a DEL, whatever the files say by then."""
        return dumps(
            {
                "name": self.name,
                "cniVersion": self.cni_version,
                "plugins": list(self.plugins),
                "disableCheck": self.disable_check,
                "disableGC": self.disable_gc,
                "loadOnlyInlinedPlugins": True,
            }
        )


def find_network(name: str, conf_dirs: Sequence[Path]) -> Network:
    """The first network of that name: lists before single plugins, folder by folder.

    Raises:
        BadNetwork: There is none (the error has the known names), or a file before it is broken.
    """
    for folder in conf_dirs:
        for file in _files(folder):
            found = _load(file)
            if found.network.name == name:
                return _usable(found)
    known = ", ".join(sorted(list_networks(conf_dirs)[0])) or "none"
    places = ", ".join(map(str, conf_dirs))
    raise BadNetwork(f"network {name}", f"there is none of that name in {places}", f"known: {known}")


def list_networks(conf_dirs: Sequence[Path]) -> tuple[dict[str, Network], list[BadNetwork]]:
    """All usable networks by name, and what is wrong with the files of the others."""
    networks: dict[str, Network] = {}
    errors: list[BadNetwork] = []
    for folder in conf_dirs:
        try:
            files = _files(folder)
        except BadNetwork as error:
            errors.append(error)
            continue
        for file in files:
            try:
                network = _usable(_load(file))
                networks.setdefault(network.name, network)
            except BadNetwork as error:
                errors.append(error)
    return networks, errors


def network_from_bytes(raw: bytes, where: str = "network") -> Network:
    """Read a list's JSON, such as a cache entry or a journal holds it.

    Raises:
        BadNetwork: Names `where`, the line and the key.
    """
    return _usable(_list(raw, where))


@dataclass(frozen=True)
class _Found:
    """What libcni makes of a file. Whether it can be used is asked only of the network that is wanted."""

    network: Network
    raw: bytes
    where: str
    plugin_path: KeyPath = ("plugins", 0)  # the way to its first plugin in `raw`


def _files(folder: Path) -> list[Path]:
    return [*_conf_files(folder, ".conflist"), *_conf_files(folder, ".conf", ".json")]


def _conf_files(folder: Path, *suffixes: str) -> list[Path]:
    """In the order of their bytes; a name may be all suffix, or of a link that leads nowhere."""
    try:
        with os.scandir(folder) as found:
            names = [one.name for one in found if not one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # ValueError: NUL in a network's name
        raise BadNetwork(f"CNI folder {folder}", _words(error), "correct or remove it") from None
    named = [name for name in names if name[max(name.rfind("."), 0) :] in suffixes]
    return [folder / name for name in sorted(named, key=os.fsencode)]


def _load(file: Path) -> _Found:
    raw, where = _read(file), f"CNI file {file}"
    return _list(raw, where, file) if file.name.endswith(".conflist") else _single(raw, where, file)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadNetwork(f"CNI file {file}", _words(error), "correct or remove it") from None


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _single(raw: bytes, where: str, file: Path) -> _Found:
    """A file for one plugin, as a list of one."""
    plugin = parse_object(raw, where)
    if "plugins" in plugin and "type" not in plugin:
        raise bad_key(
            raw, where, ("plugins",), "a list stands in a file for one plugin", "name the file *.conflist"
        )
    _check_plugin(raw, where, plugin, ())
    name, version = (plugin.get(key) or "" for key in ("name", "cniVersion"))
    made = dumps({"name": name, "cniVersion": version, "plugins": [plugin]})
    return _Found(Network(name, version, (plugin,), made, file=file), raw, where, plugin_path=())


def _list(raw: bytes, where: str, file: Path | None = None) -> _Found:
    """A list; that of a file takes the plugins of `<its folder>/<name>/*.conf` as well."""
    document = parse_object(raw, where)
    if "name" not in document:
        raise bad_key(raw, where, ("name",), "the network's name is needed", "name it")
    name = _typed(raw, where, document, "name", str)
    version = _version(raw, where, document)
    disable_check, disable_gc, is_whole = (
        _bool(raw, where, document, key) for key in ("disableCheck", "disableGC", "loadOnlyInlinedPlugins")
    )
    plugins = list(_typed(raw, where, document, "plugins", list) or [])
    for number, plugin in enumerate(plugins):
        if not isinstance(plugin, dict):
            raise bad_key(raw, where, ("plugins", number), "a plugin's object is needed", "correct it")
        _check_plugin(raw, where, plugin, ("plugins", number))
    from_folder = []
    if file is not None and not is_whole and (plugins or "plugins" not in document):
        from_folder = _plugins_of_folder(Path(f"{file.parent}/{name}"))
    if not plugins and not from_folder:
        raise bad_key(raw, where, ("plugins",), "no plugin", "name at least one")
    everything = (*plugins, *from_folder)
    return _Found(Network(name, version, everything, raw, disable_check, disable_gc, file), raw, where)


def _plugins_of_folder(folder: Path) -> list[dict[str, Any]]:
    plugins = []
    for file in _conf_files(folder, ".conf"):
        raw, where = _read(file), f"CNI file {file}"
        plugin = parse_object(raw, where)
        _check_plugin(raw, where, plugin, ())
        plugins.append(plugin)
    return plugins


def _check_plugin(raw: bytes, where: str, plugin: dict[str, Any], path: KeyPath) -> None:
    """The keys that libcni reads itself; all others are the plugin's own affair."""

    def check(value: Any, wanted: type, *steps: str | int) -> None:
        if value is not None and not isinstance(value, wanted):
            raise bad_key(raw, where, (*path, *steps), f"{value!r} is not {TYPES[wanted]}", "correct it")

    for key in ("type", "name", "cniVersion"):
        check(plugin.get(key), str, key)
    for key in ("ipam", "dns", "capabilities", "prevResult"):
        check(plugin.get(key), dict, key)
    if not plugin.get("type"):
        raise bad_key(raw, where, (*path, "type"), "the plugin's name is needed", "for example bridge")
    check((plugin.get("ipam") or {}).get("type"), str, "ipam", "type")
    for name, value in (plugin.get("capabilities") or {}).items():
        check(value, bool, "capabilities", name)
    dns = plugin.get("dns") or {}
    check(dns.get("domain"), str, "dns", "domain")
    for key in ("nameservers", "search", "options"):
        check(dns.get(key), list, "dns", key)
        for number, value in enumerate(dns.get(key) or []):
            check(value, str, "dns", key, number)


def _version(raw: bytes, where: str, document: dict[str, Any]) -> str:
    """`cniVersion`, or the highest of it and `cniVersions` that is not newer than libcni."""
    version = _typed(raw, where, document, "cniVersion", str) or ""
    if "cniVersions" not in document:
        return version
    listed = _typed(raw, where, document, "cniVersions", list)
    offered: list[tuple[KeyPath, Any]] = [(("cniVersions", number), one) for number, one in enumerate(listed)]
    known = []
    for path, one in [*offered, *([(("cniVersion",), version)] if version else [])]:
        try:
            known.append((_numbers(one), one))
        except ValueError:
            raise bad_key(raw, where, path, f"{one!r} is no version", "for example 1.0.0") from None
    usable = [one for one in known if one[0] <= NEWEST]
    return max(usable)[1] if usable else version


def _numbers(version: object) -> tuple[int, int, int]:
    parts = version.split(".") if isinstance(version, str) else []
    if version == "":
        return 0, 1, 0
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(version)
    major, minor, micro = [*map(int, parts), 0, 0][:3]
    return major, minor, micro


def _typed(raw: bytes, where: str, document: dict[str, Any], key: str, wanted: type) -> Any:
    """None where the key is absent; null is a wrong value."""
    value = document.get(key)
    if key in document and not isinstance(value, wanted):
        raise bad_key(raw, where, (key,), f"{value!r} is not {TYPES[wanted]}", "correct it")
    return value


def _bool(raw: bytes, where: str, document: dict[str, Any], key: str) -> bool:
    value = document.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise bad_key(raw, where, (key,), f"{value!r} is neither true nor false", "correct it")
    return value


def _usable(found: _Found) -> Network:
    """The network, unless libcni would refuse it when it runs the plugins."""
    network = found.network
    if not NETWORK_NAME.fullmatch(network.name):
        why, todo = f"{network.name!r} is no network name", "letters, digits, '_', '.', '-'"
        raise bad_key(found.raw, found.where, ("name",), why, todo)
    if network.cni_version not in VERSIONS:
        why = f"{network.cni_version or '0.1.0'!r} is not supported"
        raise bad_key(found.raw, found.where, ("cniVersion",), why, f"one of {', '.join(VERSIONS)}")
    for number, plugin in enumerate(network.plugins):
        if "/" in plugin["type"]:
            path = (*found.plugin_path[:1], number, "type") if found.plugin_path else ("type",)
            raise bad_key(found.raw, found.where, path, f"{plugin['type']!r} is a path", "give a name only")
    return network
