"""What a user may write for an image, and what it means: docker's grammar and short names."""

from pathlib import Path

import pytest

from worker.image_ref import ImageRef, absolute, parse_image

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("docker://busybox", "docker.io/library/busybox:latest"),
        ("docker://docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker:24", "docker.io/library/docker:24"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("registry.example/a/b/c", "registry.example/a/b/c:latest"),
        ("REGISTRY/app", "REGISTRY/app:latest"),
        ("[2001:db8::1]:5000/app", "[2001:db8::1]:5000/app:latest"),
        ("a__b/c-d--e/f.g_h", "docker.io/a__b/c-d--e/f.g_h:latest"),
        (f"app@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        (f"app:v1@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        ("oci:/srv/images", "oci:/srv/images"),
        ("oci:/srv//images/:v1", "oci:/srv/images:v1"),
        ("oci-archive:/srv/a.tar:team/app@v1", "oci-archive:/srv/a.tar:team/app@v1"),
        ("docker-archive:/srv/a.tar", "docker-archive:/srv/a.tar"),
        ("docker-archive:/srv/a.tar:app", "docker-archive:/srv/a.tar:docker.io/library/app:latest"),
        ("docker-archive:/srv/a.tar:@1", "docker-archive:/srv/a.tar:@1"),
        ("dir", "docker.io/library/dir:latest"),
    ],
)
def test_a_name_becomes_canonical(text: str, canonical: str) -> None:
    """Two ways to write one image must be one image: a batch resolves it once."""
    found = parse_image(text)
    assert str(found) == canonical
    assert parse_image(canonical) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "printable"),
        (" busybox", "spaces"),
        ("busy\nbox", "printable"),
        ("Busybox", "lowercase"),
        ("team/App", "lowercase"),
        ("busybox:", "no tag"),
        ("busybox:-x", "no tag"),
        (f"busybox:{'a' * 129}", "no tag"),
        ("busybox@sha256:1234", "no digest"),
        (f"busybox@{DIGEST.upper()}", "no digest"),
        ("busybox@sha512:" + "0" * 128, "no digest"),
        (DIGEST.removeprefix("sha256:"), "an id of docker's"),
        ("a//b", "no name of an image"),
        ("a/../b", "no name of an image"),
        ("-a", "no name of an image"),
        ("a..b", "no name of an image"),
        ("host.example:port/a", "no name of an image"),
        ("host.example/", "no name of an image"),
        ("docker://", "no name of an image"),
        ("--help", "no name of an image"),
        (f"a/{'b' * 300}", "at most 255"),
        ("https://registry.example/app", "write registry/name:tag"),
        ("oci://srv/images", "no source of images"),
        ("containers-storage:app", "not supported"),
        ("docker-daemon:app:latest", "not supported"),
        ("dir:/srv/app", "not supported"),
        ("sif:/srv/app", "not supported"),
        ("oci:images", "absolute path"),
        ("oci:", "absolute path"),
        ("oci:/srv/../etc", "without '..'"),
        ("oci:/srv/images:", "behind its ':'"),
        ("oci:/srv/images:a b", "no tag of an OCI layout"),
        ("oci:/srv/images:-rf", "no tag of an OCI layout"),
        ("docker-archive:/srv/a.tar:App", "lowercase"),
        (f"docker-archive:/srv/a.tar:app@{DIGEST}", "has a digest"),
    ],
)
def test_what_is_no_image_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_image(text)


def test_a_relative_path_is_taken_from_the_users_folder() -> None:
    """The host has another current folder, and so has another command of the same user."""
    here = Path("/home/me/work")
    assert absolute("oci:images:v1", here) == "oci:/home/me/work/images:v1"
    assert absolute("docker-archive:../a.tar", here) == "docker-archive:/home/me/a.tar"
    assert absolute("oci:/srv/images", here) == "oci:/srv/images"
    assert absolute("busybox:1.36", here) == "busybox:1.36"
    assert absolute("docker:24", here) == "docker:24"


def test_skopeo_is_asked_for_the_manifest_itself() -> None:
    """A tag may move between the resolve and the pull; skopeo takes no reference with both."""
    assert parse_image("app:v1").source() == "docker://docker.io/library/app:v1"
    assert parse_image("app:v1").source(DIGEST) == f"docker://docker.io/library/app@{DIGEST}"
    assert parse_image(f"app:v1@{DIGEST}").source() == f"docker://docker.io/library/app@{DIGEST}"
    assert ImageRef("oci", "/srv/images", "v1").source(DIGEST) == "oci:/srv/images:v1"
