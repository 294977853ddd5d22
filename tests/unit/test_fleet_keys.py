"""The secrets of a fleet, as `sandbatch keys` writes them."""

import fnmatch
import hashlib
import json
import ssl
import tomllib
from pathlib import Path

import pytest

from tasks import acl
from tasks.fleet_keys import write_keys
from tasks.signing import Signer, Trust
from worker.errors import BadInput


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fleet_has_what_each_of_it_needs_and_no_more(tmp_path):
    """A host has its own key and the public ones of all; a user has neither those nor the worker's login."""
    folder = tmp_path / "fleet"
    written = write_keys(folder, "broker.example:7000", ["h1", "h2"], ["alice"])

    names = [path.name for path in written.new]
    assert names == ["broker", "host-h1", "host-h2", "user-alice", "flower"]
    public = {f"host-h1/trusted/{one}.pub" for one in ("host-h1", "host-h2", "user-alice")}
    host = {name for name in files(folder) if name.startswith("host-h1/")}
    own = {f"host-h1/{one}" for one in ("ca.crt", "host-h1.key", "host-h1.pub", "sandbatch.toml")}
    assert host == own | public
    user = {name for name in files(folder) if name.startswith("user-alice/")}
    assert user == {
        f"user-alice/{one}" for one in ("ca.crt", "user-alice.key", "user-alice.pub", "sandbatch.toml")
    }
    settings = tomllib.loads((folder / "host-h1" / "sandbatch.toml").read_text())
    assert settings["host"] == "h1"
    assert settings["broker_url"].startswith("rediss://worker:")
    assert settings["broker_url"].endswith("@broker.example:7000/0")
    assert tomllib.loads((folder / "user-alice" / "sandbatch.toml").read_text())["broker_url"].startswith(
        "rediss://cli:"
    )
    token = Signer.read(folder / "user-alice" / "user-alice.key").sign("message", ["a"])
    assert (
        Trust(folder / "host-h2" / "trusted").verify("message", ["a"], token, max_age_s=60).by == "user alice"
    )


def test_secrets_are_for_the_owner_alone(tmp_path):
    """Whatever the umask: the folder keeps others out, and each file that has a secret does, too."""
    folder = tmp_path / "fleet"
    write_keys(folder, "broker", ["h1"], ["alice"])
    for part in (folder, *(folder / one for one in ("broker", "host-h1", "user-alice", "flower"))):
        assert part.stat().st_mode & 0o777 == 0o700, part
    for name in files(folder):
        if not name.endswith((".pub", ".crt")):
            assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_a_second_run_adds_and_changes_nothing(tmp_path):
    """Hosts that are there keep their keys, and get the public keys of those who are new."""
    folder = tmp_path / "fleet"
    write_keys(folder, "broker", ["h1"], ["alice"])
    before = files(folder)

    assert write_keys(folder, "broker", ["h1"], ["alice"]).new == []
    assert files(folder) == before
    written = write_keys(folder, None, ["h2"], ["bob"])

    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert written.new == [folder / "host-h2", folder / "user-bob"]
    assert written.trusted == [folder / "host-h1" / "trusted"]
    assert {"host-h1/trusted/user-bob.pub", "host-h1/trusted/host-h2.pub"} <= set(after)
    assert Trust(folder / "host-h2" / "trusted").names() == ["host-h1", "host-h2", "user-alice", "user-bob"]


def test_who_was_taken_out_does_not_come_back(tmp_path):
    """Removing a user is removing a file here and on the hosts; the next run must not undo it."""
    folder = tmp_path / "fleet"
    write_keys(folder, "broker", ["h1"], ["alice", "bob"])
    for path in folder.rglob("trusted/user-bob.pub"):
        path.unlink()

    write_keys(folder, None, ["h2"], ["carol"])

    assert not list(folder.rglob("trusted/user-bob.pub"))


def test_no_password_is_in_the_brokers_file(tmp_path):
    """Who reads it has digests of 256 random bits; and nobody logs in without a name."""
    folder = tmp_path / "fleet"
    write_keys(folder, "broker", [], ["alice"])
    url = tomllib.loads((folder / "user-alice" / "sandbatch.toml").read_text())["broker_url"]
    password = url.partition("cli:")[2].partition("@")[0]
    lines = (folder / "broker" / "users.acl").read_text().splitlines()
    assert lines[0] == "user default off"
    assert [line.split()[1] for line in lines[1:]] == list(acl.USERS)
    assert f"user cli on #{hashlib.sha256(password.encode()).hexdigest()} " in "\n".join(lines)
    assert password not in "\n".join(lines)


def test_a_login_gets_a_new_password_wherever_it_is(tmp_path):
    """Who knew the old one has left; the others' settings stay as they were."""
    folder = tmp_path / "fleet"
    write_keys(folder, "broker", ["h1"], ["alice", "bob"])
    before = files(folder)
    old = json.loads(before["fleet.json"])["passwords"]

    written = write_keys(folder, None, [], [], renew="cli")

    after, new = files(folder), json.loads((folder / "fleet.json").read_text())["passwords"]
    assert (new["cli"] != old["cli"], new["worker"]) == (True, old["worker"])
    names = {"broker/users.acl", "user-alice/sandbatch.toml", "user-bob/sandbatch.toml"}
    assert {str(path.relative_to(folder)) for path in written.changed} == names
    assert {name for name in after if after[name] != before[name]} == names | {"fleet.json"}
    assert new["cli"].encode() in after["user-bob/sandbatch.toml"]
    assert acl.digest(new["cli"]).encode() in after["broker/users.acl"]
    assert (folder / "fleet.json").stat().st_mode & 0o077 == 0
    with pytest.raises(BadInput, match="no such login"):
        write_keys(folder, None, [], [], renew="admin")


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.7", "[fd00::7]"])
def test_the_brokers_certificate_is_of_its_name(tmp_path, host: str):
    """A client that asks for that name believes it, as strictly as Python 3.13 does, and no other name."""
    folder = tmp_path / "fleet"
    write_keys(folder, host, [], [])
    client = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "broker" / "broker.crt", folder / "broker" / "broker.key")

    handshake(client, server, host.strip("[]"))
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(client, server, "other.example")


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Without a network: what one side writes the other reads."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    ours.do_handshake()


def test_without_tls_there_is_no_certificate(tmp_path):
    folder = tmp_path / "fleet"
    write_keys(folder, "10.0.0.7", ["h1"], [], has_tls=False)
    assert not list(folder.rglob("*.crt"))
    settings = tomllib.loads((folder / "host-h1" / "sandbatch.toml").read_text())
    assert settings["broker_url"].startswith("redis://worker:")
    assert "broker_ca" not in settings
    assert "tls" not in (folder / "broker" / "redis.conf").read_text()


@pytest.mark.parametrize(
    ("broker", "hosts", "users", "words"),
    [
        (None, [], [], "needed for a new fleet"),
        ("a b", [], [], "HOST:PORT"),
        ("broker:99999", [], [], "HOST:PORT"),
        ("fd00::7", [], [], "HOST:PORT"),
        ("broker", ["../h1"], [], "no name of a host"),
        ("broker", [], ["a/b"], "no name"),
        ("broker", [], [""], "no name"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_made(tmp_path, broker, hosts, users, words):
    with pytest.raises(BadInput, match=words):
        write_keys(tmp_path / "fleet", broker, hosts, users)
    assert files(tmp_path) == {}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(BadInput, match="neither empty nor"):
        write_keys(tmp_path, "broker", [], [])
    assert files(tmp_path) == {"mine": b"text"}


def test_another_broker_needs_another_folder(tmp_path):
    """Its certificate and all settings have the broker's name."""
    write_keys(tmp_path, "one", [], [])
    with pytest.raises(BadInput, match="has the broker one:6379"):
        write_keys(tmp_path, "two", [], [])


@pytest.mark.parametrize(("kind", "end", "other"), [(*acl.CALLS, ":calls:begun"), (*acl.PINS, ":ids")])
def test_patterns_leave_out_what_ends_so(kind: str, end: str, other: str):
    """ACLs have no exception: the patterns say in many ways "does not end so"."""
    patterns = [one.replace("[^", "[!") for one in acl._but(kind, end)]
    word = end.removeprefix(":")
    for name in ("h", "s", word, f"h{word}", f"x.{word}", "ll", "a-s", "es", kind):
        assert not any(fnmatch.fnmatchcase(f"{kind}:{name}{end}", one) for one in patterns), name
        for key in (f"{kind}:{name}", f"{kind}:{name}{other}", f"{kind}:{name}:memory"):
            assert any(fnmatch.fnmatchcase(key, one) for one in patterns), key
