"""CNI results as libcni's types read and write them: unknown fields dropped, versions converted."""

from ipaddress import ip_interface
from typing import Any

from worker.cni_config import VERSIONS
from worker.netns import addresses_of

INTERFACE = {"0": ("mac", "sandbox"), "1": ("mac", "mtu", "sandbox", "socketPath", "pciID")}
ROUTE = ("gw", "mtu", "advmss", "priority", "table", "scope")
DNS = ("nameservers", "domain", "search", "options")


def typed(result: dict[str, Any], config_version: str) -> dict[str, Any]:
    """What libcni hands on of a plugin's result; one without `cniVersion` has the configuration's.

    Raises:
        ValueError: It is no result of a version that we know.
    """
    version = result.get("cniVersion") or config_version
    if version not in VERSIONS:
        raise ValueError(f"result of CNI version {version!r}")
    try:
        return _as(result, version)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no result of CNI {version}: {type(error).__name__} {error}") from None


def converted(result: dict[str, Any], version: str) -> dict[str, Any]:
    """A typed result as another version has it: what CHECK and DEL get from the cache."""
    return _as(result, version)


def result_ips(result: dict[str, Any], if_name: str) -> list[str]:
    """The addresses of one link of the sandbox, without prefix length."""
    return [str(ip_interface(address).ip) for address in addresses_of(result, if_name)]


def _as(result: dict[str, Any], version: str) -> dict[str, Any]:
    major = version[0]
    made: dict[str, Any] = {"cniVersion": version}
    interfaces = [
        {"name": one.get("name", ""), **_set(one, INTERFACE[major])} for one in result.get("interfaces") or []
    ]
    ips = [_ip(one, major) for one in result.get("ips") or []]
    routes = [{"dst": one["dst"], **_set(one, ROUTE)} for one in result.get("routes") or []]
    for name, values in (("interfaces", interfaces), ("ips", ips), ("routes", routes)):
        if values:
            made[name] = values
    made["dns"] = _set(result.get("dns") or {}, DNS)
    return made


def _ip(one: dict[str, Any], major: str) -> dict[str, Any]:
    interface = ip_interface(one["address"])
    made: dict[str, Any] = {"version": str(interface.version)} if major == "0" else {}
    if one.get("interface") is not None:
        made["interface"] = one["interface"]
    return {**made, "address": one["address"], **_set(one, ("gateway",))}


def _set(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Go's omitempty: zero, "" and [] are left out; a pointer to 0 (priority, table, scope) is not."""
    pointers = ("table", "scope")
    return {
        name: values[name]
        for name in names
        if values.get(name) or (name in pointers and values.get(name) == 0)
    }
