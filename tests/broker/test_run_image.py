"""`sandbatch run --image`: what reaches the record, and what is refused before anything does."""

import pytest

from worker.spec import Spec


def spec_of(record, done) -> Spec:
    assert done.returncode == 0, done.stderr
    container_id = done.stdout.strip()
    return Spec.model_validate_json(record.spec(container_id)[0])


def test_an_image_is_enqueued_under_its_whole_name_and_its_config_is_left_to_the_host(cli, record, heartbeat):
    heartbeat()
    done = cli("run", "--image", "busybox")
    spec = spec_of(record, done)
    assert (spec.kind, spec.image, spec.pull) == ("spec/v3", "docker.io/library/busybox:latest", "missing")
    assert (spec.args, spec.cwd, spec.ready, spec.writable) == ([], "", "image", "memory")


def test_options_override_the_image(cli, record, heartbeat, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--entrypoint", "sh", "-u", "app:5", "--group-add", "7", "--stop-signal", "int", "--read-only"]
    options += ["--pull", "never", "--cwd", "/srv", "--ready", "none"]
    heartbeat()
    done = cli("run", "--image", "oci:./layout:v1", *options, "--", "-c", "id")
    spec = spec_of(record, done)
    assert (spec.image, spec.pull) == (f"oci:{tmp_path}/layout:v1", "never")
    assert (spec.entrypoint, spec.args, spec.user, spec.groups) == (["sh"], ["-c", "id"], "app:5", [7])
    assert (spec.stop_signal, spec.writable, spec.cwd, spec.ready) == ("SIGINT", "no", "/srv", "none")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--image", "UPPER"], "must be lowercase"),
        (["--image", "containers-storage:x"], "is not supported"),
        (["--image", "a", "--rootfs", "/x"], "a sandbox has one of them"),
        (["--image", "a", "--read-only", "--writable", "disk"], "the contrary"),
        (["--image", "a", "--pull", "often"], "'missing', 'always' or 'never'"),
        (["--image", "a", "--stop-signal", "SIGNONE"], "a signal is needed"),
        (["--image", "a", "--user", "a:b:c"], "USER[:GROUP] is needed"),
        (["--entrypoint", "sh", "--", "x"], "is about an image"),
        (["--user", "app", "--", "x"], "names are looked up in an image"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_enqueued(cli, record, heartbeat, words, why):
    heartbeat()
    done = cli("run", *words)
    assert done.returncode == 2
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert record.ids() == []
