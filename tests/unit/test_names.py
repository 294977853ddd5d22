"""A sandbox's resolv.conf and hosts, and what they are bound over."""

from pathlib import Path

import pytest

from worker import names
from worker.attachments import Attached
from worker.errors import BadInput
from worker.settings import Settings
from worker.spec import Spec, make_spec

ID = "sb-0123456789abcdef"


def link(number: int, *ips: str, **dns: object) -> Attached:
    return Attached(f"eth{number}", f"net{number}", list(ips), {"dns": dns})


def spec(**fields: object) -> Spec:
    networks = fields.pop("networks", [{"name": "net0"}, {"name": "net1"}])
    return make_spec(args=["true"], networks=networks, **fields)


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "root/etc").mkdir(parents=True)
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run", rootfs_allow=[tmp_path])


@pytest.fixture
def root(settings, tmp_path) -> Path:
    return tmp_path / "root"


def test_the_networks_say_who_is_asked_eth0_first():
    links = [
        link(0, nameservers=["10.0.0.1", "fd00::1"], search=["a.example"], options=["ndots:2"], domain="x"),
        link(1, nameservers=["10.1.0.1", "10.0.0.1", "10.1.0.2"], search=["b.example", "a.example"]),
    ]
    assert names.resolv_conf(spec(), links) == (
        "nameserver 10.0.0.1\nnameserver fd00::1\nnameserver 10.1.0.1\n"
        "search a.example b.example\noptions ndots:2\n"
    )


def test_a_domain_is_the_search_list_where_there_is_none():
    """Of two such lines the C library would take the last."""
    assert names.resolv_conf(spec(), [link(0, domain="a.example")]) == "search a.example\n"


def test_the_spec_counts_before_the_networks():
    links = [link(0, nameservers=["10.0.0.1"], search=["a.example"], options=["ndots:2"])]
    asked = spec(dns=["192.0.2.1"], dns_search=["c.example"])
    assert names.resolv_conf(asked, links) == "nameserver 192.0.2.1\nsearch c.example\noptions ndots:2\n"


def test_a_plugins_text_is_no_line_of_its_own():
    links = [link(0, nameservers=["evil\nnameserver 6.6.6.6", "no-address"], search=["a b", "c.example"])]
    assert names.resolv_conf(spec(), links) == "search c.example\n"


def test_hosts_has_the_sandboxs_own_names_on_each_network_and_the_specs_hosts():
    asked = spec(networks=[{"name": "net0", "aliases": ["db"]}, {"name": "net1"}], hosts={"web": "10.9.9.9"})
    links = [link(0, "10.0.0.2", "fd00::2"), link(1, "10.1.0.2")]
    assert names.hosts(asked, ID, links).splitlines() == [
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        f"10.0.0.2 {ID} db",
        f"fd00::2 {ID} db",
        f"10.1.0.2 {ID}",
        "10.9.9.9 web",
    ]


def test_the_generated_root_has_both_files_to_bind_over(settings, tmp_path):
    made = names.names_of(spec(dns=["192.0.2.1"]), ID, [], settings, tmp_path)
    assert [(one["destination"], one["source"]) for one in made.mounts] == [
        ("/etc/resolv.conf", f"{tmp_path}/resolv.conf"),
        ("/etc/hosts", f"{tmp_path}/hosts"),
    ]
    assert all("ro" in one["options"] for one in made.mounts)
    names.write(tmp_path, made)
    assert (tmp_path / "resolv.conf").read_text() == "nameserver 192.0.2.1\n"


def test_without_a_name_server_the_roots_own_file_stays(settings, tmp_path):
    """One bind less; what is there names none either."""
    assert list(names.names_of(spec(), ID, [], settings, tmp_path).files) == ["hosts"]


def test_over_a_folder_of_the_users_only_plain_files_are_bound(settings, root, tmp_path):
    """A link may lead out, and a mount point that is missing runsc would make on the host, for all."""
    (root / "etc/hosts").write_text("")
    (root / "etc/resolv.conf").symlink_to("/etc/resolv.conf")
    links = [link(0, "10.0.0.2", nameservers=["10.0.0.1"])]
    made = names.names_of(spec(rootfs=str(root)), ID, links, settings, tmp_path)
    assert [one["destination"] for one in made.mounts] == ["/etc/hosts"]
    assert made.notes == [
        "its /etc/resolv.conf is not written: the rootfs has no plain file /etc/resolv.conf to bind it over"
    ]
    assert not (root / "etc/resolv.conf").exists() or (root / "etc/resolv.conf").is_symlink()


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ({"dns": ["192.0.2.1"]}, "resolv.conf"),
        ({"dns_search": ["a"]}, "resolv.conf"),
        ({"hosts": {"a": "10.0.0.9"}}, "hosts"),
    ],
)
def test_what_the_spec_asks_for_is_refused_where_it_cannot_be_bound(settings, root, fields, target):
    """With what to make; nothing has been made yet."""
    with pytest.raises(BadInput, match=f"no plain file /etc/{target} .*touch {root}/etc/{target}"):
        names.check(spec(rootfs=str(root), **fields), settings)
    (root / "etc" / target).write_text("")
    names.check(spec(rootfs=str(root), **fields), settings)


def test_a_linked_etc_is_not_gone_through(settings, root):
    (root / "real").mkdir()
    (root / "real/hosts").write_text("")
    (root / "etc").rmdir()
    (root / "etc").symlink_to("real")
    with pytest.raises(BadInput, match="no plain file"):
        names.check(spec(rootfs=str(root), hosts={"a": "10.0.0.9"}), settings)


@pytest.mark.parametrize("target", ["/etc/hosts", "/etc"])
def test_a_mount_of_the_specs_own_wins(settings, tmp_path, target):
    mount = {"type": "tmpfs", "target": target}
    made = names.names_of(spec(mounts=[mount]), ID, [], settings, tmp_path)
    assert made.mounts == []
    with pytest.raises(BadInput, match=f"a mount of its own at {target}"):
        names.check(spec(mounts=[mount], hosts={"a": "10.0.0.9"}), settings)
