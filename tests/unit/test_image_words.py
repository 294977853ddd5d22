"""What skopeo 1.9 and umoci 0.4 were seen to say, and what is made of it: try again or not; what to do."""

import pytest

from worker.image_words import LONGEST, meaning, plain

FRAME = 'time="2026-11-25T13:16:12Z" level=fatal msg="{}"'
NAME = 'Error parsing image name \\"docker://127.0.0.1:5056/a:x\\": '
READING = f"{NAME}reading manifest x in 127.0.0.1:5056/a: "
PINGING = f"{NAME}pinging container registry 127.0.0.1:5056: "
BLOB = "reading blob sha256:84d8: Error fetching blob: invalid status code from registry "
GET = 'Get \\"http://127.0.0.1:5056/v2/a/manifests/x\\": '


@pytest.mark.parametrize(
    "said",
    [
        f"{READING}toomanyrequests",
        f"{READING}received unexpected HTTP status: 500 Internal Server Error",
        f"{READING}received unexpected HTTP status: 503 Service Unavailable",
        f"{READING}StatusCode: 502, <html>",
        f"{PINGING}invalid status code from registry 500 (Internal Server Error)",
        f"{BLOB}503 (Service Unavailable)",
        f"{BLOB}429 (Too Many Requests)",
        f"{NAME}{GET}EOF",
        f"{NAME}unexpected EOF",
        f"{NAME}{GET}read tcp 127.0.0.1:52924->127.0.0.1:5056: read: connection reset by peer",
        f"{PINGING}{GET}dial tcp 127.0.0.1:5999: connect: connection refused",
        f"{PINGING}{GET}dial tcp 192.0.2.1:443: i/o timeout",
        f"{PINGING}{GET}net/http: TLS handshake timeout",
        f"{PINGING}{GET}dial tcp: lookup a.example on 192.0.2.1:53: connect: network is unreachable",
        f"{PINGING}{GET}dial tcp: lookup a.example: server misbehaving",
        "writing blob: happened during read: unexpected EOF",
    ],
)
def test_what_can_pass_is_tried_again(said: str) -> None:
    assert meaning("image a", FRAME.format(said)).can_pass


@pytest.mark.parametrize(
    ("said", "why", "todo"),
    [
        (f"{READING}manifest unknown: manifest unknown", "does not know this tag", "the tag"),
        (f"{READING}name unknown", "no such repository", "the name"),
        (f"{READING}unauthorized", "denies", "skopeo login"),
        (f"{READING}denied", "denies", "skopeo login"),
        (f"{BLOB}403 (Forbidden)", "denies", "skopeo login"),
        (f"{READING}StatusCode: 404, <html>nope</html>", "does not have it", "the name"),
        (f"{BLOB}404 (Not Found)", "does not have it", "the name"),
        (f"{PINGING}http: server gave HTTP response to HTTPS client", "plain HTTP", "registries.conf"),
        (f"{PINGING}tls: first record does not look like a TLS handshake", "plain HTTP", "registries.conf"),
        (f"{PINGING}x509: certificate signed by unknown authority", "x509", "CA"),
        (f"{PINGING}{GET}dial tcp: lookup a.invalid: no such host", "no such host", "the name"),
        (
            "writing blob: happened during read: Digest did not match, expected a, got b",
            "digest says",
            "nothing",
        ),
        (
            "determining type: Manifest does not match provided manifest digest sha256:0",
            "digest says",
            "nothing",
        ),
        ("writing blob: write /x: no space left on device", "disk is full", "prune"),
        ("Error loading trust policy: open /etc/containers/policy.json: no such file", "policy", "apt-get"),
        (f"{NAME}loading registries configuration: toml: line 1", "toml", "SANDBATCH_REGISTRIES_CONF"),
        (
            "choosing image: no image found in manifest list for architecture arm64",
            "no image found",
            "machines",
        ),
        ("Source image rejected: Running image docker://a is rejected by policy.", "rejected", "policy.json"),
        ("something new", "something new", ""),
    ],
)
def test_what_cannot_pass_says_what_to_do(said: str, why: str, todo: str) -> None:
    error = meaning("image a", FRAME.format(said))
    assert not error.can_pass
    assert why in error.why
    assert todo in error.todo
    assert "level=" not in str(error)


def test_a_crash_for_a_file_too_large_is_no_riddle() -> None:
    """Go says it so when the limit of a file's size ends it."""
    words = "SIGXFSZ: file size limit exceeded\nPC=0x4\n\ngoroutine 1 [syscall]:\nrip 0x1\n"
    assert "larger than a whole image" in meaning("image a", words).why


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            FRAME.format('Get \\"https://cdn.example/b?sig=SECRET&x=1\\": denied'),
            'Get "https://cdn.example/b?…": denied',
        ),
        ("Get https://me:SECRET@registry.example/v2/: no", "Get https://***@registry.example/v2/: no"),
        ("", "it ended without a word"),
        ("first\nlast \x1b[31mred\n", "last  [31mred"),
        (" \u2a2f create rootfs: unpack layer: unpack entry: a: link: bad", "a: link: bad"),
        (f"{FRAME.format('one')}\n{FRAME.format('two')}", "two"),
    ],
)
def test_only_the_words_themselves_are_shown(said: str, shown: str) -> None:
    """No frame, no signature or login of a URL, nothing that a terminal obeys."""
    assert plain(said) == shown


def test_long_words_are_cut() -> None:
    assert len(plain("x" * 1000)) == LONGEST + 1
