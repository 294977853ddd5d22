"""Signatures: who may say what, until when, and once."""

import subprocess
import sys
import time

import pytest

from tasks import signing
from tasks.signing import Refused, Seen, Signer, Trust
from worker.errors import BadInput
from worker.settings import Settings


@pytest.fixture
def keys(tmp_path):
    """A folder with the keys of alice and of host h1."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)
    for who in ("user-alice", "host-h1"):
        signing.make_key(folder, who)
    return folder


@pytest.fixture
def alice(keys):
    return Signer.read(keys / "user-alice.key")


def test_what_is_signed_is_verified_with_its_signer_and_moment(keys, alice):
    before = time.time() - 0.001
    signed = Trust(keys).verify("call", ["h1", b"{}"], alice.sign("call", ["h1", "{}"]), max_age_s=60)
    assert (signed.role, signed.name, signed.by) == ("user", "alice", "user alice")
    assert before <= signed.at <= time.time() + 0.001  # it is rounded


@pytest.mark.parametrize(
    ("purpose", "parts"),
    [
        ("message", ["a", "b"]),
        ("call", ["a"]),
        ("call", ["ab", ""]),
        ("call", ["a", "c"]),
        ("call", ["a", "b", ""]),
    ],
)
def test_a_token_is_for_what_it_was_made_for_alone(keys, alice, purpose, parts):
    token = alice.sign("call", ["a", "b"])
    with pytest.raises(Refused, match="its signature is not of user-alice, or it was changed"):
        Trust(keys).verify(purpose, parts, token, max_age_s=60)


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_nothing_in_a_token_can_be_changed(keys, alice, part):
    words = alice.sign("call", ["a"]).split(":")
    words[part] = {1: "host-h1", 2: f"{time.time() - 1:.3f}", 3: "0" * 32, 4: "A" * 86}[part]
    with pytest.raises(Refused):
        Trust(keys).verify("call", ["a"], ":".join(words), max_age_s=60)


@pytest.mark.parametrize(
    "token", [None, "", 7, [], {}, "v1", "v1:user-alice:1.000:0:x", "ü" * 100, "v2:" + "a" * 300]
)
def test_what_is_no_token_is_refused_in_words(keys, token):
    with pytest.raises(Refused, match="not signed" if not token else "its signature is none"):
        Trust(keys).verify("call", ["a"], token, max_age_s=60)


def test_a_key_that_is_not_in_the_folder_is_foreign(keys, tmp_path, alice):
    other = tmp_path / "other"
    other.mkdir()
    mallory = Signer.read(signing.make_key(other, "user-mallory")[0])
    false_alice = Signer.read(signing.make_key(other, "user-alice")[0])
    with pytest.raises(
        Refused, match=r"user-mallory, whose key this host does not know; put user-mallory\.pub"
    ):
        Trust(keys).verify("call", ["a"], mallory.sign("call", ["a"]), max_age_s=60)
    with pytest.raises(Refused, match="is not of user-alice"):
        Trust(keys).verify("call", ["a"], false_alice.sign("call", ["a"]), max_age_s=60)


@pytest.mark.parametrize(
    ("shift_s", "words"), [(-61, "signed it 61 s ago"), (400, "signed it in 400 s; set both clocks")]
)
def test_stale_or_from_the_future(keys, alice, monkeypatch, shift_s, words):
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + shift_s)
        token = alice.sign("call", ["a"])
    with pytest.raises(Refused, match=words):
        Trust(keys).verify("call", ["a"], token, max_age_s=60)


def test_a_key_that_is_taken_away_counts_no_more_and_a_new_one_does(keys, alice, monkeypatch):
    monkeypatch.setattr(signing, "REREAD_S", 0.0)
    trust = Trust(keys)
    trust.verify("call", ["a"], alice.sign("call", ["a"]), max_age_s=60)
    (keys / "user-alice.pub").unlink()
    with pytest.raises(Refused, match="does not know"):
        trust.verify("call", ["a"], alice.sign("call", ["a"]), max_age_s=60)
    bob = Signer.read(signing.make_key(keys, "user-bob")[0])
    assert trust.verify("call", ["a"], bob.sign("call", ["a"]), max_age_s=60).name == "bob"


def test_a_slip_of_the_hand_in_the_folder_shuts_nobody_out(keys, alice, monkeypatch, caplog):
    monkeypatch.setattr(signing, "REREAD_S", 0.0)
    trust = Trust(keys)
    (keys / "user-bob.pub").write_text("no key")
    trust.verify("call", ["a"], alice.sign("call", ["a"]), max_age_s=60)
    assert "user-bob.pub: it is no public key" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "mode", "words"),
    [
        ("alice.key", None, 0o600, "neither user-NAME.key nor host-NAME.key"),
        ("user-alice.pem", None, 0o600, "neither user-NAME.key"),
        ("user-alice.key", None, 0o604, "every user of this machine may read"),
        ("user-alice.key", "nothing", 0o600, "no private key in PEM"),
        ("user-bob.key", "", 0o600, "no private key"),
        ("user-none.key", None, None, "No such file"),
    ],
)
def test_a_signing_key_that_cannot_be_used_is_refused_in_words(keys, tmp_path, name, text, mode, words):
    path = tmp_path / name
    if mode is not None:
        path.write_text((keys / "user-alice.key").read_text() if text is None else text)
        path.chmod(mode)
    with pytest.raises(BadInput, match=words):
        signing.signer(Settings(signing_key=path))


def test_a_key_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "user-rsa.key"
    subprocess.run(["openssl", "genrsa", "-out", path, "2048"], check=True, capture_output=True)
    path.chmod(0o600)
    with pytest.raises(BadInput, match="no Ed25519 key"):
        Signer.read(path)


@pytest.mark.parametrize(
    ("mode", "words"), [(0o777, "others than its owner may write"), (None, "No such file")]
)
def test_a_folder_of_keys_that_cannot_be_trusted(keys, mode, words):
    folder = keys if mode else keys / "absent"
    if mode:
        folder.chmod(mode)
    with pytest.raises(BadInput, match=words):
        Trust(folder)


def test_a_host_that_listens_to_some_must_be_one_of_them(keys):
    def check(**more):
        signing.check_host(Settings(host="h1", **more))

    check()
    check(signing_key=keys / "host-h1.key", trusted_keys=keys)
    with pytest.raises(BadInput, match="take anything from anybody"):
        check(signing_key=keys / "host-h1.key")
    with pytest.raises(BadInput, match="it is none, and this host, h1"):
        check(trusted_keys=keys)
    with pytest.raises(BadInput, match="it is user-alice, and this host, h1"):
        check(signing_key=keys / "user-alice.key", trusted_keys=keys)
    (keys / "host-h1.pub").unlink()
    signing._trust.cache_clear()
    with pytest.raises(BadInput, match="would refuse its own messages"):
        check(signing_key=keys / "host-h1.key", trusted_keys=keys)


def test_keys_are_not_made_over_others_and_are_not_for_all(keys):
    assert (keys / "user-alice.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        signing.make_key(keys, "user-alice")
    with pytest.raises(BadInput):
        signing.make_key(keys, "../user-alice")


def test_settings_without_keys_do_not_load_cryptography():
    code = "from tasks import signing, app, submit; from worker.settings import Settings; import sys;"
    code += "s = Settings(); assert signing.signer(s) is None; assert signing.trust(s) is None;"
    code += "sys.exit('cryptography.hazmat.primitives' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- what was seen ---------------------------------------------------------------------------------------


def test_what_was_seen_is_known_to_other_processes_and_to_the_next_one(tmp_path):
    one, other = Seen(tmp_path / "seen", 100), Seen(tmp_path / "seen", 100)
    assert one.add("a", time.time())
    assert "a" in other
    assert not other.add("a", time.time())
    assert other.add("b", time.time())
    assert "b" in one
    assert "c" not in Seen(tmp_path / "seen", 100)


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "seen"
    Seen(path, 100).add("a", time.time())
    with path.open("a") as file:
        file.write("\n17956")
    later = Seen(path, 100)
    assert later.add("b", time.time())
    assert all(name in Seen(path, 100) for name in "ab")


def test_the_file_forgets_what_would_be_refused_for_its_age(tmp_path, monkeypatch):
    monkeypatch.setattr(signing, "LEAST_TO_DROP", 10)
    path, moment = tmp_path / "seen", time.time()
    one, other = Seen(path, 100), Seen(path, 100)
    for number in range(50):
        one.add(f"old{number}", moment - 200)
        assert other.add(f"new{number}", moment) is True
    assert all(f"new{number}" in one for number in range(50))
    assert len(path.read_text().split("\n")) < 100
    assert not one.add("new49", moment)


def test_many_processes_add_each_name_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tasks.signing import Seen;"
        "seen = Seen(Path(sys.argv[1]), 100);"
        "print(sum(seen.add(str(n), time.time()) for n in range(300)))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "seen")]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sum(int(one.communicate(timeout=60)[0]) for one in running) == 300
