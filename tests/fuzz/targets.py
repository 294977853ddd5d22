"""What reads bytes of others: each target gives some to its reader, and fails where that does not hold."""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport.virtual import Message
from kombu.utils import json as wire_json

from cli import batch_specs, parse
from cli.batch_specs import BadFile
from tasks import envelope, rows, sealed, view, wire
from tasks.messages import read_order, read_pull_order, read_words
from tasks.signing import Refused, Trust
from tasks.transport import Channel, Transport, _broken
from tests.fuzz import corpus, keys
from worker import (
    attachments,
    cni_cache,
    conmon,
    egress,
    ends,
    image_config,
    image_entry,
    image_manifest,
    journal,
    k8s_log,
    limits,
    ports,
    reconcile,
    spec_parts,
)
from worker.calls import read_call
from worker.cni_config import find_network, list_networks, network_from_bytes
from worker.cni_json import loads
from worker.cni_result import converted, result_ips, typed
from worker.errors import BadInput, BadNetwork, ImageError, Lost, SandbatchError
from worker.image_entry import Image
from worker.image_ref import absolute, parse_image
from worker.image_refs import References
from worker.image_user import find_user
from worker.reconcile import Later
from worker.settings import Settings, load_settings
from worker.spec import Spec, make_spec

ID = corpus.ID
PASSWORD = re.compile(rb'^broker_url = "[^"\n]*secret[^"\n]*@', re.MULTILINE)


def anything(data: bytes) -> Any:
    """JSON as Celery, or a broker's client, hands it on; text where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace")


def spec(data: bytes, _folder: Path) -> None:
    given = anything(data)
    with contextlib.suppress(BadInput):
        if isinstance(given, dict):
            made = make_spec(**given)
            assert Spec(**made.model_dump()) == made
            assert Spec.model_validate_json(made.model_dump_json()) == made
            assert ".." not in Path(made.rootfs).parts
            assert not any(".." in Path(one.target).parts for one in made.mounts)


def batch(data: bytes, _folder: Path) -> None:
    for name in ("a.yaml", "a.json", "a.jsonl", "a"):
        with contextlib.suppress(BadInput, BadFile):
            read = batch_specs.read(data, name, "sandbatch", {})
            assert read.specs


def one_journal(data: bytes, folder: Path) -> None:
    """Read, or set aside: then a worker starts, looks again, tells the record, and none of it fails."""
    settings = Settings(state_dir=folder / "state", run_dir=folder / "run", host="h1")
    settings.exit_dir.mkdir(parents=True)
    own = settings.sandboxes_dir / ID
    own.mkdir(parents=True)
    (own / journal.FILE).write_bytes(data)
    known, errors = journal.read_all(settings.sandboxes_dir)
    if errors:
        assert errors[0].kind, "a file that is there can be set aside"
        reconcile.at_start(settings)
        assert journal.set_aside_files(own)
        return
    view.view(known[0])
    reconcile.at_start(settings)
    again(journal.read(own), settings)


def again(known: journal.Journal, settings: Settings) -> None:
    """What a worker does with a journal that can be read."""
    view.view(known)
    ends.next_due(known, was_asked=False)
    ends.probe_source(known)
    attachments.attached(known)
    ports.reservations(settings, known.facts.get("publish") or [])
    limits.made_cgroup(known.data.get("bundle", {}), ID)
    egress.journaled(known)
    with contextlib.suppress(BadNetwork):
        attachments.planned(known)
    Later(settings)._sort(reconcile.Due(), known, 1e6)  # as a look long after its last word


def exit_file(data: bytes, folder: Path) -> None:
    (folder / ID).write_bytes(data)
    found = conmon.exit_code(folder, ID)
    assert found is None or -1 <= found <= 255


def log_file(data: bytes, folder: Path) -> None:
    path = folder / "container.log"
    path.write_bytes(data)
    log = k8s_log.LogFile(path)
    try:
        shower = k8s_log.Shower(("stdout", "stderr"), timestamps=True)
        for since, tail in ((None, None), (0.0, 3), (1.8e9, None)):
            start = k8s_log.start_of(log, since=since, tail=tail, streams=("stdout",))
            assert 0 <= start <= len(data)
        shown = b"".join(map(shower.show, log.records()))
        assert len(shown) <= len(data)
        log.rest()
        cursor = k8s_log.cursor_of(log, log.offset, shower)
        assert k8s_log.read_cursor(cursor) == (log.identity, log.offset, shower.mid)
    finally:
        log.close()
    conmon.tail_log(path)


def cursor(data: bytes, folder: Path) -> None:
    path = folder / "container.log"
    path.write_bytes(corpus.LOG)
    log = k8s_log.LogFile(path)
    try:
        _, log.offset, _ = k8s_log.read_cursor(data.decode(errors="surrogateescape"))
        list(log.records())
        log.rest()
    except BadInput:
        pass
    finally:
        log.close()


def cni_config(data: bytes, folder: Path) -> None:
    for name in ("10-a.conflist", "20-b.conf"):
        (folder / name).write_bytes(data)
    list_networks([folder])
    with contextlib.suppress(BadNetwork):
        find_network("net", [folder])
    with contextlib.suppress(BadNetwork):
        found = network_from_bytes(data)
        assert network_from_bytes(found.whole).whole == found.whole
        assert "/" not in found.name


def cni_result(data: bytes, _folder: Path) -> None:
    with contextlib.suppress(ValueError, RecursionError):  # as `worker.cni` has it of a plugin
        found = typed(loads(data.decode(errors="replace")), "1.0.0")
        assert typed(found, "1.0.0") == found
        for version in ("0.3.1", "0.4.0", "1.1.0"):
            converted(found, version)
        for ip in result_ips(found, "eth0"):
            assert socket.getaddrinfo(ip, None, flags=socket.AI_NUMERICHOST)


def cache_file(data: bytes, folder: Path) -> None:
    path = cni_cache.entry_path(folder, "../../outside", ID, "../eth0")
    assert path.parent == folder / "results"
    path.parent.mkdir()
    path.write_bytes(data)
    cni_cache.list_entries(folder)
    with contextlib.suppress(SandbatchError):
        cni_cache.load_result(folder, "../../outside", ID, "../eth0", "1.0.0")
    cni_cache.forget(folder, "../../outside", ID, "../eth0")


def message(data: bytes, _folder: Path) -> None:
    """Out of its queue, as kombu's transport does: it ends a worker with whatever it does not catch."""
    transport, channel = Transport.__new__(Transport), Channel.__new__(Channel)
    taken: list[Any] = []
    transport._callbacks = {"host.h1": taken.append}
    transport.client = SimpleNamespace(transport_options={"guard": keys.guard("host-h1")})
    answers = SimpleNamespace(parse_response=lambda *_, **__: (b"host.h1", data), connection=None)
    channel.__dict__ |= {"client": answers, "connection": transport, "_in_poll": None}
    channel._queue_cycle = SimpleNamespace(rotate=lambda _: None)
    channel._flush_brpop_reauth = lambda: None
    assert channel._brpop_read()
    for one in taken:
        Message(one, channel=channel)
        assert one["headers"]["sandbatch"]


def signed_message(data: bytes, _folder: Path) -> None:
    """Of somebody who has alice's key, and may not have a host do what only the host itself may."""
    try:
        found = wire_json.loads(data)  # as kombu's transport
    except Exception:  # noqa: BLE001 - `message` has the bytes that it does not stand
        return
    if _broken(found):
        return
    try:
        found = keys.guard("user-alice").sign("host.h1", found)
    except (ValueError, RecursionError):
        return  # a sender's own affair
    if keys.guard("host-h1").admits("host.h1", found):
        assert found["headers"]["task"] in envelope.FOR_ALL


def order(data: bytes, _folder: Path) -> None:
    given = anything(data)
    for read in (read_order, read_pull_order, read_words):
        with contextlib.suppress(BadInput):
            made = read(given)
            assert type(made).model_validate_json(made.model_dump_json()) == made


def token(data: bytes, _folder: Path) -> None:
    with contextlib.suppress(Refused):
        signed = Trust(keys.folder()).verify(
            "call", ["h1", "{}"], data.decode(errors="surrogateescape"), max_age_s=3600
        )
        assert signed.by == "user alice"
        assert abs(time.time() - signed.at) < 3600


def call(data: bytes, _folder: Path) -> None:
    with contextlib.suppress(BadInput):
        made = read_call(data)
        assert read_call(made.model_dump_json()) == made


def entry(data: bytes, _folder: Path) -> None:
    given = anything(data)
    fields = given if isinstance(given, dict) else {"t": given}
    raw = {
        str(key).encode(errors="replace"): str(value).encode(errors="replace")
        for key, value in fields.items()
    }
    with contextlib.suppress(Lost):
        made = wire.read_entry({**raw, b"d": data})
        wire.Numbers().is_new(made)


def record(data: bytes, _folder: Path) -> None:
    """A record that anybody with the broker's password may have written keeps nobody from the others."""
    given = anything(data)
    if not isinstance(given, dict):
        return
    raw = {str(key): str(value) for key, value in given.items()}
    beside = raw.pop("beside", None)
    with contextlib.suppress(BadInput):
        made = sealed.unseal(raw.get("spec", ""), beside)
        assert sealed.unseal(sealed.seal(made), sealed.beside(made, None)) == made
    shown = sealed.readable(raw.get("spec", ""))
    assert not any((shown.get("env") or {}).values())


def reference(data: bytes, _folder: Path) -> None:
    text = data.decode(errors="surrogateescape")
    absolute(text, Path("/srv"))
    try:
        found = parse_image(text)
    except ValueError:
        return
    assert parse_image(str(found)) == found
    assert found.is_remote or (found.name.startswith("/") and ".." not in Path(found.name).parts)
    assert not found.source().startswith("-")


def manifest(data: bytes, folder: Path) -> None:
    found = image_manifest.parsed(data)
    with contextlib.suppress(ImageError):
        image_manifest.own_digest("image", found)
    with contextlib.suppress(ImageError):
        image_manifest.total_size("image", found)
    (folder / "index.json").write_bytes(data)
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (blobs / ("ab" * 32)).write_bytes(data)
    with contextlib.suppress(ImageError):
        image_manifest.read_config("image", folder)


def config(data: bytes, folder: Path) -> None:
    root = _root(folder, b"me:x:5:5::/home/me:\n", b"us:x:7:me\n")
    image = Image(corpus.IMAGE_ID, root.parent, image_manifest.parsed(data), 1, 1, 0, (), 0.0, 0.0)
    image_config.labels_of(image)
    with contextlib.suppress(ImageError):
        asked = make_spec(args=[], image="busybox")
        made = image_config.overrides(asked, image, Settings(state_dir=folder / "state"))
        whole = asked.model_copy(update=made)
        json.dumps(made).encode()
        assert Spec(**{**whole.model_dump(), "image": None, "env": {}, "kind": "spec/v1"}).cwd == whole.cwd


def passwd(data: bytes, folder: Path) -> None:
    users, _, groups = data.partition(b"\x1c")
    root = _root(folder, users, groups)
    for words in ("", "me", "me:us", "1000", "0:us", "root"):
        with contextlib.suppress(ImageError):
            user = find_user(root, words)
            assert all(0 <= one < 2**32 - 1 for one in (user.uid, user.gid, *user.groups))


def _root(folder: Path, users: bytes, groups: bytes) -> Path:
    etc = folder / "image" / "rootfs" / "etc"
    etc.mkdir(parents=True)
    (etc / "passwd").write_bytes(users)
    (etc / "group").write_bytes(groups)
    return etc.parent


def words(data: bytes, _folder: Path) -> None:
    text = data.decode(errors="surrogateescape")
    for read in (parse.size, parse.rate, parse.duration, parse.moment):
        with contextlib.suppress(BadInput):
            read(text, "--flag")
    alone = (parse.network, parse.publish, parse.bandwidth, parse.bind, parse.tmpfs, parse.writable)
    for one in (*alone, parse.name_and_address, parse.instant, parse.since):
        with contextlib.suppress(BadInput):
            one(text)
    for check in (spec_parts.parse_egress, spec_parts.signal_name, spec_parts.stamp):
        with contextlib.suppress(ValueError):
            check(text)


def settings_file(data: bytes, folder: Path) -> None:
    file = folder / "sandbatch.toml"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SANDBATCH_")]:
            patch.delenv(name)
        patch.setenv("SANDBATCH_CONFIG", str(file))
        words = ""
        try:
            load_settings()
        except BadInput as error:
            words = str(error)
    if PASSWORD.search(data):
        assert "secret" not in words


def fields(data: bytes, _folder: Path) -> None:
    """One record that another release or a stranger wrote, as lists and tables read it beside others."""
    given = anything(data)
    if isinstance(given, dict):
        raw = {**{str(key): str(value) for key, value in given.items()}, "id": ID, "state": "running"}
        json.dumps(view.shape(raw))
        json.dumps(rows._row([raw.get(name) for name in rows.FIELDS]))


def store_file(data: bytes, folder: Path) -> None:
    image = folder / f"sha256-{'ab' * 32}"
    (image / "rootfs").mkdir(parents=True)
    (image / "image.json").write_bytes(data)
    found = image_entry.read_entry(image, ())
    assert found is None or found.rootfs.is_dir()
    known = References(folder / "references")
    known.folder.mkdir()
    (known.folder / "a.json").write_bytes(data)
    known.forget(tuple(name for names in known.by_digest().values() for name in names))
    known.forget_strays(set())


@dataclass(frozen=True)
class Target:
    """`run` gets bytes, and an empty folder of its own; what it raises is a bug."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]

    @property
    def name(self) -> str:
        return self.run.__name__


TARGETS = (
    *(Target(corpus.specs, spec), Target(corpus.batches, batch), Target(corpus.journals, one_journal)),
    *(Target(corpus.exits, exit_file), Target(corpus.logs, log_file), Target(corpus.cursors, cursor)),
    *(Target(corpus.cni_configs, cni_config), Target(corpus.cni_results, cni_result)),
    *(Target(corpus.cni_caches, cache_file), Target(corpus.messages, message)),
    *(Target(corpus.messages, signed_message), Target(corpus.orders, order), Target(corpus.tokens, token)),
    *(Target(corpus.calls, call), Target(corpus.entries, entry), Target(corpus.records, record)),
    *(Target(corpus.references, reference), Target(corpus.manifests, manifest)),
    *(Target(corpus.configs, config), Target(corpus.passwds, passwd), Target(corpus.words, words)),
    *(Target(corpus.settings_files, settings_file), Target(corpus.fields, fields)),
    Target(corpus.store_files, store_file),
)
