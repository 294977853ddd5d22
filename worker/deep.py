"""CNI CHECK of each running sandbox's attachment: `sandbatch audit --deep`. Changes nothing."""

import re
from dataclasses import replace

from worker import journal, netns
from worker.audit import Finding
from worker.cni import Attachment, CniRuntime
from worker.cni_config import network_from_bytes
from worker.errors import Busy, JournalError, SandbatchError
from worker.journal import Journal
from worker.settings import Settings
from worker.stages import IF_NAME

# plugins, pkg/ip/utils_linux.go, ValidateExpectedInterfaceIPs; it is the last but one that a plugin looks at.
LACKS_ADDRESS = re.compile(r"Failed to match addr .* on interface")
NETSTACK = "expected: gVisor's netstack holds the addresses"


def check_all(settings: Settings) -> list[Finding]:
    """What the plugins say about each attachment of a running sandbox, one finding each complaint.

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
    return sorted(findings)


def _check(cni: CniRuntime, known: Journal, runsc_network: str) -> list[Finding]:
    try:
        config = str(known.intents["network"].get("config", ""))
        network = network_from_bytes(config.encode(), f"network in the journal of {known.container_id}")
    except SandbatchError as error:
        return [_finding(known, "changed", str(error))]
    if not network.is_at_least("0.4.0"):
        return [_finding(known, "skipped", f"CNI {network.cni_version} has no CHECK")]
    if network.disable_check:
        return [_finding(known, "skipped", f"network {network.name} disables CHECK")]
    attachment = Attachment(known.container_id, netns.netns_path(known.container_id), IF_NAME)
    if not cni.is_attached(network.name, attachment):
        return []  # audit has it as missing
    found = []
    for plugin in network.plugins:  # one by one: an expected complaint must not hide that of the next
        try:
            cni.cni_check(replace(network, plugins=(plugin,)), attachment)
        except SandbatchError as error:
            is_expected = runsc_network == "sandbox" and LACKS_ADDRESS.search(error.why)
            words = f"{NETSTACK} ({error.why})" if is_expected else error.why
            found.append(_finding(known, "expected" if is_expected else "changed", words, plugin["type"]))
    return found


def _finding(known: Journal, problem: str, detail: str, plugin: str = "") -> Finding:
    name = "/".join(filter(None, (known.spec.network, IF_NAME, plugin)))
    return Finding("check", name, problem, known.container_id, detail)
