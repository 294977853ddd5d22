"""`sandbatch audit --deep`: CNI CHECK of each running sandbox's attachment; images. Changes nothing."""

import re
from dataclasses import replace
from ipaddress import ip_address

from worker import attachments, image_audit, journal
from worker.attachments import Planned
from worker.audit import Finding
from worker.cni import CniRuntime
from worker.errors import Busy, JournalError, SandbatchError
from worker.journal import Journal
from worker.settings import Settings

# plugins, pkg/ip/utils_linux.go, ValidateExpectedInterfaceIPs; it is the last but one that a plugin looks at.
LACKS_ADDRESS = re.compile(r"Failed to match addr .* on interface")
NETSTACK = "expected: gVisor's netstack holds the addresses"
# portmap 1.1.1 looks in both families for the rules that its ADD made in those of the addresses (portmap.go).
LACKS_FAMILY = re.compile(r"could not check ipv(?P<version>[46]) dnat: chain CNI-DN-\w+ not found")
# bandwidth 1.1.1 follows a nil pointer where nothing was asked of it (main.go, cmdCheck).
BANDWIDTH_CRASH = re.compile(r"exit status 2: .*plugins/meta/bandwidth/main\.go")
NO_BANDWIDTH = "expected: no bandwidth was asked for, and the plugin falls over that"
OTHER_FAMILY = "expected: the sandbox has no address of this family, and the plugin looks all the same"


def check_all(settings: Settings) -> list[Finding]:
    """What the plugins say about each attachment of a running sandbox, one finding each complaint; and
    images that are no longer as they were pulled.

    netstack takes the addresses off the interface when the sandbox starts (DESIGN, point 1), so the
    complaint about these is "expected". The netns of a live sandbox stays as it is: to put them back
    for the CHECK would give its addresses to two network stacks at once.
    """
    cni, findings = CniRuntime.from_settings(settings), []
    for known in journal.read_all(settings.sandboxes_dir)[0]:
        if not known.is_up:
            continue
        try:
            # Never two operations on one container at a time (CNI spec).
            with journal.locked(settings.sandboxes_dir, known.container_id) as current:
                if current.is_up:
                    findings += _check(cni, current, settings.runsc_network)
        except Busy:
            findings.append(_finding(known, "skipped", "somebody works on it at the moment"))
        except JournalError:
            continue  # it has just ended
    changed = image_audit.check_contents(settings)
    return sorted([*findings, *(Finding("image", *one) for one in changed)])


def _check(cni: CniRuntime, known: Journal, runsc_network: str) -> list[Finding]:
    try:
        plans = attachments.planned(known)
    except SandbatchError as error:
        return [_finding(known, "changed", str(error))]
    return [found for one in plans for found in _check_link(cni, known, one, runsc_network)]


def _check_link(cni: CniRuntime, known: Journal, one: Planned, runsc_network: str) -> list[Finding]:
    network, attachment = one.network, one.attachment
    if not network.is_at_least("0.4.0"):
        return [_finding(known, "skipped", f"CNI {network.cni_version} has no CHECK", one)]
    if network.disable_check:
        return [_finding(known, "skipped", f"network {network.name} disables CHECK", one)]
    if not cni.is_attached(network.name, attachment):
        return []  # audit has it as missing
    found = []
    for plugin in network.plugins:  # one by one: an expected complaint must not hide that of the next
        try:
            cni.cni_check(replace(network, plugins=(plugin,)), attachment)
        except SandbatchError as error:
            reason = _explanation(known, one, error.why, runsc_network)
            words = f"{reason} ({error.why})" if reason else error.why
            problem = "expected" if reason else "changed"
            found.append(_finding(known, problem, words, one, plugin["type"]))
    return found


def _explanation(known: Journal, link: Planned, complaint: str, runsc_network: str) -> str:
    """Why a complaint is none; empty if it is one."""
    if runsc_network == "sandbox" and LACKS_ADDRESS.search(complaint):
        return NETSTACK
    family = LACKS_FAMILY.search(complaint)
    name = link.attachment.if_name
    ips = [ip for one in attachments.attached(known) if one.if_name == name for ip in one.ips]
    if BANDWIDTH_CRASH.search(complaint) and "bandwidth" not in link.attachment.capability_args:
        return NO_BANDWIDTH
    if family and int(family["version"]) not in {ip_address(ip).version for ip in ips}:
        return OTHER_FAMILY
    return ""


def _finding(
    known: Journal, problem: str, detail: str, one: Planned | None = None, plugin: str = ""
) -> Finding:
    network, if_name = known.spec.network, attachments.if_name(0)
    if one is not None:
        network, if_name = one.network.name, one.attachment.if_name
    name = "/".join(filter(None, (network, if_name, plugin)))
    return Finding("check", name, problem, known.container_id, detail)
