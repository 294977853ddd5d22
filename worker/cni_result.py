"""CNI results as libcni's types read and write them: unknown fields dropped, versions converted."""

from collections.abc import Callable, Mapping
from ipaddress import IPv6Interface, ip_address, ip_interface
from typing import Any

from worker.cni_config import VERSIONS
from worker.netns import addresses_of

OLD_VERSIONS = ("0.1.0", "0.2.0")  # one address a family; a plugin may answer so to a newer list
KNOWN_VERSIONS = (*OLD_VERSIONS, "0.3.0", *VERSIONS)
Check = Callable[[Any], Any]
Table = Mapping[str, tuple[Check, bool]]  # of a Go struct: key -> its check, whether a zero value is left out


def typed(result: Any, config_version: str) -> dict[str, Any]:
    """What libcni hands on of a plugin's result; one without `cniVersion` has the configuration's.

    Raises:
        ValueError: It is no result of a version that we know.
    """
    result = {} if result is None else result
    if not isinstance(result, dict):
        raise ValueError("no JSON object")
    version = result.get("cniVersion")
    if not isinstance(version, str) or not version:
        version = config_version
    if version not in KNOWN_VERSIONS:
        raise ValueError(f"result of CNI version {version!r}")
    body = _fields(result, _BODY_02 if version in OLD_VERSIONS else _BODY[version[0]])
    if version[0] == "1" and not body["dns"]:
        del body["dns"]  # the types of 0.x keep an empty one: Go's omitempty does nothing for a struct
    return {"cniVersion": version, **body}


def converted(result: dict[str, Any], version: str) -> dict[str, Any]:
    """A typed result as another version has it: what CHECK and DEL get from the cache."""
    if result["cniVersion"] == version:
        return result
    if result["cniVersion"] in OLD_VERSIONS:
        result = _without_families(result)
    if version[0] == "0":
        ips = [{"version": _family(one["address"]), **one} for one in result.get("ips", [])]
        result = {**result, "ips": ips}
    return typed({**result, "cniVersion": version}, version)


def result_ips(result: dict[str, Any], if_name: str) -> list[str]:
    """The addresses of one link of the sandbox, without prefix length."""
    newest = converted(result, VERSIONS[-1])
    return [str(ip_interface(address).ip) for address in addresses_of(newest, if_name)]


def _without_families(result: dict[str, Any]) -> dict[str, Any]:
    """`ip4` and `ip6` of the first two versions as the lists of the later ones."""
    found = [(key[-1], result[key]) for key in ("ip4", "ip6") if key in result]
    ips = [{"version": family, "address": one["ip"], "gateway": one.get("gateway")} for family, one in found]
    routes = [route for _, one in found for route in one.get("routes", [])]
    return {"ips": ips, "routes": routes, "dns": result["dns"]}


def _family(address: str) -> str:
    return str(ip_interface(address).version)


# -- Go's types: a table a struct, one check a field ------------------------------------------------


def _fields(value: Any, table: Table) -> dict[str, Any]:
    """Fill a struct: null is no value, and a zero value is left out where `omitempty` says so."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    made = {}
    for name, (check, omit_empty) in table.items():
        given = value.get(name)
        try:
            found = check(given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if found or not omit_empty or (check is _pointer and found is not None):
            made[name] = found
    return made


def _string(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no string")
    return value or ""


def _pointer(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{value!r} is no integer")
    return value


def _integer(value: Any) -> int:
    return _pointer(value) or 0


def _ip(value: Any) -> str:
    """IP: in its canonical form; the empty string is none."""
    text = _string(value)
    if not text:
        return ""
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    address = ip_address(text)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _cidr(value: Any) -> str:
    """IPNet: address and prefix length; the host's bits stay."""
    text = _string(value)
    address, slash, length = text.partition("/")
    if not slash or not length.isdecimal() or "%" in address:
        raise ValueError(f"{text!r} is no address with a prefix length")
    return _canonical(text)


def _canonical(text: str) -> str:
    interface = ip_interface(text)
    mapped = interface.ip.ipv4_mapped if isinstance(interface, IPv6Interface) else None
    return f"{mapped}/{max(interface.network.prefixlen - 96, 0)}" if mapped else str(interface)


def _list_of(check: Check) -> Check:
    def check_list(value: Any) -> list[Any]:
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{value!r} is no list")
        return [check(one) for one in value or []]

    return check_list


def _struct(table: Table) -> Check:
    return lambda value: _fields(value, table)


def _optional(table: Table) -> Check:
    return lambda value: _fields(value, table) if value is not None else None


def _present(table: Table) -> Check:
    return lambda value: _fields({} if value is None else value, table)


_KEPT, _OMITTED = False, True  # what becomes of a zero value
_DNS: Table = {
    "nameservers": (_list_of(_string), _OMITTED),
    "domain": (_string, _OMITTED),
    "search": (_list_of(_string), _OMITTED),
    "options": (_list_of(_string), _OMITTED),
}
_ROUTE: Table = {
    "dst": (_cidr, _KEPT),
    "gw": (_ip, _OMITTED),
    "mtu": (_integer, _OMITTED),
    "advmss": (_integer, _OMITTED),
    "priority": (_integer, _OMITTED),
    "table": (_pointer, _OMITTED),
    "scope": (_pointer, _OMITTED),
}
_INTERFACE: Table = {"name": (_string, _KEPT), "mac": (_string, _OMITTED), "sandbox": (_string, _OMITTED)}
_INTERFACE_1: Table = {
    **_INTERFACE,
    "mtu": (_integer, _OMITTED),
    "socketPath": (_string, _OMITTED),
    "pciID": (_string, _OMITTED),
}
_IP_1: Table = {"interface": (_pointer, _OMITTED), "address": (_cidr, _KEPT), "gateway": (_ip, _OMITTED)}
_IP_0: Table = {"version": (_string, _KEPT), **_IP_1}
_IP_02: Table = {
    "ip": (_cidr, _KEPT),
    "gateway": (_ip, _OMITTED),
    "routes": (_list_of(_struct(_ROUTE)), _OMITTED),
}


def _body(interface: Table, ip: Table) -> Table:
    return {
        "interfaces": (_list_of(_struct(interface)), _OMITTED),
        "ips": (_list_of(_struct(ip)), _OMITTED),
        "routes": (_list_of(_struct(_ROUTE)), _OMITTED),
        "dns": (_present(_DNS), _KEPT),
    }


_BODY = {"0": _body(_INTERFACE, _IP_0), "1": _body(_INTERFACE_1, _IP_1)}
_BODY_02: Table = {
    "ip4": (_optional(_IP_02), _OMITTED),
    "ip6": (_optional(_IP_02), _OMITTED),
    "dns": (_present(_DNS), _KEPT),
}
