"""A pull by real skopeo and umoci: what comes, what is tried again, what is refused; and nothing is left."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.layers import CONFIG, INDEX, MANIFEST, blobs_of, digest_of, file, layout
from worker import image_fetch, image_guard
from worker.errors import ImageError
from worker.image_fetch import Progress, resolve
from worker.image_pull import pull
from worker.image_ref import ImageRef, parse_image
from worker.image_store import Image, ImageStore
from worker.settings import Settings

APP = blobs_of([[file("bin/app", os.urandom(200_000), 0o755)], [file("etc/version", b"1")]], {"Env": ["A=1"]})
DIGEST, FIRST = digest_of(APP[0]), next(iter(APP[1]))
ZSTD = b"\x28\xb5\x2f\xfd"
DENIED = b'{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}'


@dataclass
class Registry:
    """What a registry serves of one repository, `app`; and how it misbehaves."""

    port: int = 0
    manifests: dict[str, bytes] = field(default_factory=dict)  # by tag or digest
    blobs: dict[str, bytes] = field(default_factory=dict)
    answers: list[tuple[str, int]] = field(default_factory=list)  # (part of a path, status): once each
    refusal: tuple[int, bytes] = (0, b"")
    login: str = ""
    hold: str = ""  # part of a path whose answer stops half-way, until `go`
    go: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)

    def name(self, tag: str = ":v1") -> ImageRef:
        return parse_image(f"127.0.0.1:{self.port}/app{tag}")

    def serve(self, tag: str, image: tuple[bytes, dict[str, bytes]]) -> None:
        manifest, blobs = image
        self.manifests |= {tag: manifest, digest_of(manifest): manifest}
        self.blobs |= blobs

    def count(self, part: str) -> int:
        return sum(part in path for path in self.asked)


def handler_of(registry: Registry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            registry.asked.append(self.path)
            if registry.login and self.headers.get("Authorization") != f"Basic {registry.login}":
                return self.answer(401, b"{}", {"WWW-Authenticate": 'Basic realm="test"'})
            for one in registry.answers:
                if one[0] in self.path:
                    registry.answers.remove(one)
                    return self.answer(one[1], b"oops")
            if registry.refusal[0] and "manifests" in self.path:
                return self.answer(*registry.refusal)
            found = registry.blobs if "/blobs/" in self.path else registry.manifests
            if self.path == "/v2/":
                return self.answer(200, b"{}")
            raw = found.get(self.path.rpartition("/")[2])
            if raw is None:
                return self.answer(
                    404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
                )
            return self.answer(200, raw, {"Content-Type": INDEX if b'"manifests"' in raw else MANIFEST})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if registry.hold and registry.hold in self.path:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                registry.go.wait(20)
                body = body[len(body) // 2 :]
            self.wfile.write(body)

    return Handler


@pytest.fixture
def registry() -> Iterator[Registry]:
    one = Registry()
    one.serve("v1", APP)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(one))
    server.handle_error = lambda *_: None  # type: ignore[method-assign] - skopeo was ended on purpose
    one.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield one
    one.go.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def settings(
    tmp_path: Path, registry: Registry, image_parts: None, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    monkeypatch.setattr(image_fetch, "FIRST_WAIT_S", 0.02)
    image_fetch._known.clear()
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[[registry]]\nlocation = "127.0.0.1:{registry.port}"\ninsecure = true\n')
    return Settings(state_dir=tmp_path / "state", run_dir=tmp_path / "run", registries_conf=conf)


@dataclass
class Puller:
    settings: Settings
    seen: list[Progress] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __call__(self, ref: ImageRef, digest: str = "", timeout_s: float = 30.0) -> Image:
        digest = digest or resolve(self.settings, ref, timeout_s, self.stop)
        return pull(
            self.settings, ref, digest, timeout_s=timeout_s, progress=self.seen.append, stop=self.stop
        )

    def left(self) -> list[str]:
        folder = self.settings.images_dir
        names = os.listdir(folder) if folder.is_dir() else []
        return [name for name in names if not name.startswith("sha256-") and name not in (".lock", "refs")]

    def phases(self) -> list[str]:
        phases = [one.phase for one in self.seen]
        return [one for number, one in enumerate(phases) if number == 0 or phases[number - 1] != one]


@pytest.fixture
def puller(settings: Settings) -> Iterator[Puller]:
    one = Puller(settings)
    yield one
    assert one.left() == [], "whatever came of it"


def skopeos(part: object) -> list[str]:
    """Programs of a pull that still live."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if Path(words[0]).name in ("skopeo", "umoci") and str(part) in " ".join(words):
            found.append(" ".join(words))
    return found


def wait_until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- what comes ------------------------------------------------------------------------------------


def test_an_image_comes_once_and_is_described(registry: Registry, puller: Puller) -> None:
    """One look at the tag, then the manifest by its digest, and each blob once; never the tag again."""
    image = puller(registry.name())
    assert image.digest == DIGEST
    assert (image.rootfs / "etc/version").read_bytes() == b"1"
    assert image.config["config"] == {"Env": ["A=1"]}
    assert image.references == (f"127.0.0.1:{registry.port}/app:v1",)
    assert registry.count("manifests/v1") == 1
    assert registry.count(f"manifests/{DIGEST}") == 1
    assert [registry.count(digest) for digest in APP[1]] == [1, 1, 1]
    assert puller.phases() == ["pulling", "unpacking"]
    assert puller.seen[-1].total_bytes == sum(len(APP[1][one]) for one in list(APP[1])[:2])
    assert puller(registry.name(), DIGEST) == image
    assert registry.count("manifests/") == 2, "it is here: nobody is asked"


def test_a_tag_that_moves_between_resolve_and_pull_changes_nothing(
    registry: Registry, puller: Puller
) -> None:
    digest = resolve(puller.settings, registry.name(), 10, puller.stop)
    registry.serve("v1", blobs_of([[file("other")]]))
    assert (puller(registry.name(), digest).rootfs / "etc/version").exists()


def test_a_digest_is_pulled_without_asking_for_a_tag(registry: Registry, puller: Puller) -> None:
    image = puller(registry.name(f"@{DIGEST}"))
    assert image.references == (f"127.0.0.1:{registry.port}/app@{DIGEST}",)
    assert ImageStore(puller.settings).lookup(registry.name(f"@{DIGEST}")) == DIGEST


def test_of_an_index_this_machines_image_is_taken(registry: Registry, puller: Puller) -> None:
    """The digest is the index's: the same on hosts of all kinds."""
    other = blobs_of([[file("other")]], machine="s390x")
    registry.serve("other", other)
    entries = [
        {"mediaType": MANIFEST, "digest": digest_of(raw), "size": len(raw), "platform": platform}
        for raw, platform in (
            (other[0], {"os": "linux", "architecture": "s390x"}),
            (APP[0], {"os": "linux", "architecture": "amd64"}),
        )
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
    registry.serve("all", (index, {}))
    image = puller(registry.name(":all"))
    assert image.digest == digest_of(index)
    assert (image.rootfs / "etc/version").exists()
    foreign = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries[:1]}).encode()
    registry.serve("foreign", (foreign, {}))
    with pytest.raises(ImageError, match=r"none for linux/amd64; it is built for linux/s390x"):
        puller(registry.name(":foreign"))


def test_an_image_of_another_machine_is_refused(registry: Registry, puller: Puller) -> None:
    registry.serve("v2", blobs_of([[file("a")]], machine="s390x"))
    with pytest.raises(ImageError, match="is built for linux/s390x"):
        puller(registry.name(":v2"))


def test_twins_cause_one_pull(registry: Registry, puller: Puller) -> None:
    images: list[Image] = []
    twins = [
        threading.Thread(target=lambda: images.append(puller(registry.name(), DIGEST))) for _ in range(4)
    ]
    for one in twins:
        one.start()
    for one in twins:
        one.join(30)
    assert [one.digest for one in images] == [DIGEST] * 4
    assert [registry.count(digest) for digest in APP[1]] == [1, 1, 1]


def test_a_login_is_taken_from_the_auth_file(registry: Registry, puller: Puller, tmp_path: Path) -> None:
    registry.login = base64.b64encode(b"me:secret").decode()
    with pytest.raises(ImageError, match=r"denies it.*skopeo login"):
        puller(registry.name())
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {f"127.0.0.1:{registry.port}": {"auth": registry.login}}}))
    puller.settings = puller.settings.model_copy(update={"registry_auth_file": auth})
    assert puller(registry.name()).digest == DIGEST


# -- what is tried again ---------------------------------------------------------------------------


def test_what_can_pass_is_tried_again(registry: Registry, puller: Puller) -> None:
    """At the resolve, at the manifest, at a blob: five tries for each act, and the wait is told."""
    blob = FIRST
    registry.answers = [("manifests/v1", 503), ("/v2/", 500), (blob, 502)]
    assert puller(registry.name()).digest == DIGEST
    assert registry.answers == []
    assert puller.phases() == ["pulling", "waiting", "pulling", "unpacking"]
    waiting = next(one for one in puller.seen if one.phase == "waiting")
    assert "502" in waiting.words
    assert (waiting.tries, puller.seen[-1].tries) == (2, 2)


def test_five_tries_are_enough(registry: Registry, puller: Puller) -> None:
    registry.refusal = (503, b"later")
    with pytest.raises(ImageError, match=r"503 .*\(5 tries\)") as caught:
        puller(registry.name())
    assert caught.value.can_pass
    assert registry.count("manifests/") == 5


@pytest.mark.parametrize(
    ("refusal", "why"),
    [((404, b"{}"), "does not have it"), ((403, DENIED), "denies"), ((200, b"no json"), "none")],
)
def test_what_cannot_pass_is_asked_for_once(
    registry: Registry, puller: Puller, refusal: tuple[int, bytes], why: str
) -> None:
    registry.refusal = refusal
    with pytest.raises(ImageError, match=why) as caught:
        puller(registry.name())
    assert not caught.value.can_pass
    assert registry.count("manifests/") == 1


def test_a_registry_that_is_away_is_named(registry: Registry, puller: Puller) -> None:
    ref = parse_image("127.0.0.1:1/app")
    with pytest.raises(ImageError, match=r"image 127.0.0.1:1/app:latest: .*connection refused \(5 tries\)"):
        puller(ref)


def test_a_connection_that_brings_nothing_is_given_up(
    registry: Registry, puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_fetch, "STALL_S", 0.5)
    registry.hold = FIRST
    waits = threading.Event()

    def tell(progress: Progress) -> None:
        if progress.phase == "waiting":
            registry.hold = ""
            waits.set()

    image = pull(puller.settings, registry.name(), DIGEST, timeout_s=20, progress=tell, stop=puller.stop)
    assert waits.is_set()
    assert image.digest == DIGEST


# -- what is refused -------------------------------------------------------------------------------


def test_another_manifest_under_the_digest_is_refused(registry: Registry, puller: Puller) -> None:
    registry.manifests[DIGEST] = blobs_of([[file("evil")]])[0]
    with pytest.raises(ImageError, match=f"and {DIGEST[:19]}… is asked for"):
        puller(registry.name(), DIGEST)
    resolve(puller.settings, registry.name(), 10, puller.stop)  # its manifest is known now
    with pytest.raises(ImageError, match="what came is not what its digest says"):
        puller(registry.name(), DIGEST)


def test_a_wrong_blob_is_refused(registry: Registry, puller: Puller) -> None:
    registry.blobs[FIRST] = APP[1][FIRST][:-1] + b"x"
    with pytest.raises(ImageError, match="what came is not what its digest says"):
        puller(registry.name())


def test_what_is_too_large_by_its_manifest_is_never_asked_for(registry: Registry, puller: Puller) -> None:
    registry.serve("huge", blobs_of([[file("a")]], named_size=17 << 30))
    with pytest.raises(ImageError, match=r"larger than an image may be \(16g\): 17g"):
        puller(registry.name(":huge"))
    assert registry.count("/blobs/") == 0


def test_a_blob_larger_than_its_manifest_says_is_ended(registry: Registry, puller: Puller) -> None:
    """A limit of the file's size ends skopeo; what it had written goes."""
    manifest, blobs = blobs_of([[file("a")]])
    registry.serve("v2", (manifest, {digest: raw + bytes(3 << 20) for digest, raw in blobs.items()}))
    puller.settings = puller.settings.model_copy(update={"image_max_bytes": 1 << 20})
    with pytest.raises(ImageError):
        puller(registry.name(":v2"))


@pytest.mark.parametrize(
    "kind", ["application/vnd.cncf.helm.config.v1+json", "application/vnd.oci.empty.v1+json"]
)
def test_what_is_no_image_of_a_container_is_refused(registry: Registry, puller: Puller, kind: str) -> None:
    registry.serve("chart", (APP[0].replace(CONFIG.encode(), kind.encode()), APP[1]))
    with pytest.raises(ImageError, match="is no image of a container"):
        puller(registry.name(":chart"))


# -- what ends it ----------------------------------------------------------------------------------


def test_stop_ends_it_at_once(registry: Registry, puller: Puller) -> None:
    registry.hold = FIRST
    threading.Thread(
        target=lambda: (wait_until(lambda: registry.count(registry.hold)), puller.stop.set())
    ).start()
    with pytest.raises(ImageError, match="nobody waits for it any more"):
        puller(registry.name())
    assert skopeos(puller.settings.state_dir) == []


def test_its_time_is_over_for_all_tries_together(registry: Registry, puller: Puller) -> None:
    registry.hold = FIRST
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"was not here in time.*SANDBATCH_PULL_TIMEOUT_S"):
        puller(registry.name(), DIGEST, timeout_s=1.0)
    assert time.monotonic() - began < 3


def test_who_waits_for_a_twin_can_be_ended_alone(registry: Registry, puller: Puller) -> None:
    registry.hold = FIRST
    first = threading.Thread(target=lambda: puller(registry.name(), DIGEST))
    first.start()
    wait_until(lambda: registry.count(registry.hold))
    with pytest.raises(ImageError, match="in time"):
        Puller(puller.settings)(registry.name(), DIGEST, timeout_s=0.3)
    registry.go.set()
    first.join(30)
    assert ImageStore(puller.settings).find(DIGEST) is not None


PULLING = """
import sys, threading
from worker.image_pull import pull
from worker.image_ref import parse_image
from worker.settings import Settings
settings = Settings()
pull(settings, parse_image(sys.argv[1]), sys.argv[2], timeout_s=30, progress=print, stop=threading.Event())
"""


def test_a_killed_pull_leaves_nothing_that_is_ever_used(registry: Registry, puller: Puller) -> None:
    """Nor a program: skopeo dies with it. What it left is found, and goes."""
    registry.hold = FIRST
    one = puller.settings
    env = {
        **os.environ,
        "SANDBATCH_STATE_DIR": str(one.state_dir),
        "SANDBATCH_REGISTRIES_CONF": str(one.registries_conf),
    }
    argv = [sys.executable, "-c", PULLING, str(registry.name()), DIGEST]
    with subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: registry.count(registry.hold))
        assert skopeos(one.state_dir) != []
        store = ImageStore(one)
        assert store.left_over() == [], "it is at work"
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: skopeos(one.state_dir) == [])
    name = f".pulling-{DIGEST.removeprefix('sha256:')}"
    assert (store.left_over(), store.all(), store.lookup(registry.name())) == ([name], [], None)
    registry.hold = ""
    assert puller(registry.name()).digest == DIGEST, "and it is in nobody's way"


# -- full disks ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(puller: Puller) -> Iterator[Path]:
    """32 MiB and 300 inodes for the host's images."""
    place = puller.settings.images_dir
    place.mkdir(parents=True, mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m,nr_inodes=300,mode=700", "tmpfs", place], check=True
    )
    yield place
    assert puller.left() == []
    subprocess.run(["umount", place], check=True)


def test_a_disk_almost_full_takes_no_image(registry: Registry, puller: Puller, small_disk: Path) -> None:
    """What launches need stays free."""
    with pytest.raises(ImageError, match=r"and 192m of it must stay free; free some on the host"):
        puller(registry.name())


@pytest.mark.parametrize(
    "members", [[("zeros", 40 << 20)], [(f"f{n}", 0) for n in range(400)]], ids=["bytes", "inodes"]
)
def test_a_disk_that_is_full_in_the_middle_says_so(
    registry: Registry,
    puller: Puller,
    small_disk: Path,
    members: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_guard, "KEEP_FREE_BYTES", 0)
    monkeypatch.setattr(image_guard, "KEEP_FREE_FILES", 0)
    registry.serve("v2", blobs_of([[file(name, bytes(size)) for name, size in members]]))
    with pytest.raises(ImageError, match=r"the disk is full.*sandbatch image prune") as caught:
        puller(registry.name(":v2"))
    assert not caught.value.can_pass


# -- folders and archives of the host --------------------------------------------------------------


def test_a_layout_with_one_image_needs_no_tag(puller: Puller, tmp_path: Path) -> None:
    image = puller(parse_image(f"oci:{layout(tmp_path / 'one', {'v1': APP})}"))
    assert image.digest == DIGEST


def test_a_layout_with_more_says_what_it_has(puller: Puller, tmp_path: Path) -> None:
    place = layout(tmp_path / "two", {"v1": APP, "v2": blobs_of([[file("b")]])})
    with pytest.raises(ImageError, match=r"there are 2 images in .*; name one of its tags: v1, v2"):
        puller(parse_image(f"oci:{place}"))
    with pytest.raises(ImageError, match="has the tag v3; name one of its tags: v1, v2"):
        puller(parse_image(f"oci:{place}:v3"))
    assert puller(parse_image(f"oci:{place}:v2")).digest != DIGEST


def test_a_layout_that_has_changed_since_is_refused(puller: Puller, tmp_path: Path) -> None:
    """Nothing in it can be asked for by digest: who pinned it must get that, or an error."""
    ref = parse_image(f"oci:{layout(tmp_path / 'one', {'v1': APP})}:v1")
    with pytest.raises(ImageError, match="its files have changed"):
        puller(ref, "sha256:" + "0" * 64)
    assert puller(ref, DIGEST).digest == DIGEST


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_an_archive_is_unpacked_below_the_store_and_nowhere_else(
    puller: Puller, tmp_path: Path, kind: str
) -> None:
    """skopeo's own place is /var/tmp, where a killed one leaves all of it."""
    source, archive = layout(tmp_path / "one", {"v1": APP}), tmp_path / "app.tar"
    target = f"{kind}:{archive}" + (":app:v1" if kind == "docker-archive" else ":v1")
    subprocess.run(["skopeo", "copy", "--quiet", f"oci:{source}:v1", target], check=True)
    before = set(os.listdir("/var/tmp"))
    image = puller(parse_image(f"{kind}:{archive}"))
    assert (image.rootfs / "etc/version").read_bytes() == b"1"
    assert image.config["config"]["Env"] == ["A=1"]
    assert set(os.listdir("/var/tmp")) == before
    assert puller(parse_image(f"{kind}:{archive}")).digest == image.digest, "it is the same each time"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("oci:{}/none", "No such file or directory on this host"),
        ("oci:{}/file", "is no folder"),
        ("docker-archive:{}/none", "No such file or directory on this host"),
        ("docker-archive:{}/pipe", "is no file"),
        ("oci-archive:{}", "is no file"),
        ("oci-archive:{}/file", "invalid tar header"),
    ],
)
def test_what_is_no_image_on_the_host_says_so(puller: Puller, tmp_path: Path, text: str, why: str) -> None:
    """A pipe would keep skopeo for ever."""
    (tmp_path / "file").write_text("no tar " * 200)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match=why):
        puller(parse_image(text.format(tmp_path)))


def test_an_image_of_the_host_lies_in_an_allowed_folder(settings: Settings, tmp_path: Path) -> None:
    """Else a user of the broker could ask a root process about any path of the host."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    puller = Puller(settings.model_copy(update={"image_allow": (allowed,)}))
    assert puller(parse_image(f"oci:{layout(allowed / 'one', {'v1': APP})}")).digest == DIGEST
    (allowed / "out").symlink_to(layout(tmp_path / "other", {"v1": APP}))
    for place in (tmp_path / "other", allowed / "out", tmp_path / "none"):
        with pytest.raises(ImageError, match="in no folder that this host allows"):
            puller(parse_image(f"oci:{place}"))


def test_a_layer_of_zstd_is_unpacked_too(puller: Puller, tmp_path: Path) -> None:
    """umoci 0.4 knows only gzip: skopeo makes that of it."""
    source, target = layout(tmp_path / "gzip", {"v1": APP}), tmp_path / "zstd"
    argv = [
        "skopeo",
        "copy",
        "--quiet",
        "--dest-compress-format=zstd",
        f"oci:{source}:v1",
        f"oci:{target}:v1",
    ]
    subprocess.run(argv, check=True)
    assert any(one.read_bytes()[:4] == ZSTD for one in (target / "blobs/sha256").iterdir())
    assert (puller(parse_image(f"oci:{target}")).rootfs / "etc/version").read_bytes() == b"1"
