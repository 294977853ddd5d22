"""The links of a sandbox in its journal: as this release writes them, and as the one before did."""

import json
from pathlib import Path

import pytest

from worker import attachments
from worker import journal as journals
from worker.errors import BadInput, BadNetwork
from worker.journal import Journal
from worker.spec import make_spec

ID = "sb-0123456789abcdef"


def write_network(folder: Path, name: str, *capabilities: str) -> None:
    plugin = {"type": "bridge", "capabilities": dict.fromkeys(capabilities, True)}
    document = {"cniVersion": "1.0.0", "name": name, "plugins": [plugin]}
    (folder / f"{name}.conflist").write_text(json.dumps(document))


@pytest.fixture
def conf_dir(tmp_path) -> Path:
    folder = tmp_path / "net.d"
    folder.mkdir()
    write_network(folder, "a", "ips", "mac")
    write_network(folder, "b", "portMappings")
    return folder


def journal(tmp_path: Path, **fields: object) -> Journal:
    spec = make_spec(args=["true"], **fields)
    return journals.create(tmp_path / "sandboxes", ID, attempt=1, batch="b", spec=spec)


def result(if_name: str, *ips: str) -> dict[str, object]:
    interfaces = [{"name": "br0"}, {"name": if_name, "sandbox": "/x"}]
    return {
        "cniVersion": "1.0.0",
        "interfaces": interfaces,
        "ips": [{"address": one, "interface": 1} for one in ips],
    }


def test_each_network_is_planned_with_its_own_configuration_and_arguments(tmp_path, conf_dir):
    known = journal(
        tmp_path,
        networks=[{"name": "a", "ips": ["10.0.0.9"]}, {"name": "b"}],
        publish=[{"port": 80, "host_port": 8080}],
    )
    known.mark_begun("network", attachments.plan(known.spec, [conf_dir]))
    write_network(conf_dir, "a")  # whatever the files say by then
    known.set_facts(publish=[{"host_ip": None, "host_port": 8080, "port": 80, "protocol": "tcp"}])

    first, second = attachments.planned(journals.read(known.folder))

    assert (first.network.name, first.attachment.if_name) == ("a", "eth0")
    assert first.network.plugins[0]["capabilities"] == {"ips": True, "mac": True}
    assert first.attachment.capability_args == {"ips": ["10.0.0.9"]}
    assert (second.network.name, second.attachment.if_name) == ("b", "eth1")
    assert second.attachment.capability_args == {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    }


def test_before_the_ports_are_chosen_no_add_has_begun_and_del_has_no_mapping(tmp_path, conf_dir):
    """Killed in between: a mapping with host port 0 would be an error of portmap's, for ever."""
    known = journal(tmp_path, networks=[{"name": "b"}], publish=[{"port": 80}])
    known.mark_begun("network", attachments.plan(known.spec, [conf_dir]))
    assert attachments.planned(known)[0].attachment.capability_args == {}


@pytest.mark.parametrize(
    ("networks", "error"),
    [([{"name": "c"}], BadNetwork), ([{"name": "a"}, {"name": "b", "mac": "02:00:00:00:00:01"}], BadInput)],
)
def test_nothing_is_planned_of_a_network_that_is_missing_or_cannot(tmp_path, conf_dir, networks, error):
    known = journal(tmp_path, networks=networks)
    with pytest.raises(error):
        attachments.plan(known.spec, [conf_dir])
    known.mark_begun("network", {})
    assert attachments.planned(known) == []


def test_what_add_made_is_kept_for_each_link_eth0_first(tmp_path, conf_dir):
    known = journal(tmp_path, networks=[{"name": "a"}, {"name": "b"}])
    known.mark_begun("network", attachments.plan(known.spec, [conf_dir]))
    results = [result("eth0", "10.0.0.2/24", "fd00::2/64"), result("eth1", "10.1.0.2/24")]
    data = attachments.data_of(list(zip(attachments.planned(known), results, strict=True)))
    known.mark_done("network", data)

    known = journals.read(known.folder)
    assert known.data["network"]["ips"] == ["10.0.0.2", "fd00::2", "10.1.0.2"]
    assert known.data["network"]["result"] == results[0]
    assert attachments.attached(known) == [
        attachments.Attached("eth0", "a", ["10.0.0.2", "fd00::2"], results[0]),
        attachments.Attached("eth1", "b", ["10.1.0.2"], results[1]),
    ]


def test_a_journal_of_the_release_before_has_one_network(tmp_path, conf_dir):
    """A sandbox outlives the upgrade of its worker."""
    known = journal(tmp_path, network="a")
    known.mark_begun("network", {"config": (conf_dir / "a.conflist").read_text()})
    known.mark_done("network", {"result": result("eth0", "10.0.0.2/24"), "ips": ["10.0.0.2"]})

    (planned,) = attachments.planned(known)
    assert (planned.network.name, planned.attachment.if_name) == ("a", "eth0")
    assert attachments.attached(known) == [
        attachments.Attached("eth0", "a", ["10.0.0.2"], result("eth0", "10.0.0.2/24"))
    ]


def test_without_an_add_nothing_is_attached(tmp_path):
    assert attachments.attached(journal(tmp_path)) == []
