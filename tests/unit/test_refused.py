"""What other launchers have to weaken a sandbox is refused, in words that say what is there instead."""

import pytest
from typer.testing import CliRunner

from cli import refused
from cli.batch_specs import BadFile, read
from cli.main import app
from cli.words import WORDS
from tasks.app import make_app
from worker.errors import BadInput, BadNetwork
from worker.settings import Settings


@pytest.mark.parametrize(
    "args",
    [
        ["--privileged"],
        ["--cap-add", "ALL"],
        ["--cap-add=SYS_ADMIN"],
        ["--cap-drop", "ALL"],
        ["--security-opt", "seccomp=unconfined"],
        ["--pid", "host"],
        ["--pid=container:x"],
        ["--ipc=host"],
        ["--userns", "host"],
        ["--device", "/dev/kvm"],
        ["--gpus", "all"],
        ["--sysctl", "a=b"],
    ],
)
def test_an_option_that_would_weaken_a_sandbox(args):
    done = CliRunner().invoke(app, ["run", *args, "--", "true"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    name = args[0].partition("=")[0]
    why, todo = refused.REFUSED[name[2:].replace("-", "_")]
    assert line == f"sandbatch: {name}: {why}; {todo}"


def test_an_option_that_nobody_has_is_still_no_such_option():
    done = CliRunner().invoke(app, ["run", "--prvileged", "--", "true"])
    assert done.exit_code == 2
    assert "No such option: --prvileged" in done.stderr


@pytest.mark.parametrize("word", ["privileged", "cap_add", "cap-add", "security_opt", "devices", "pid"])
def test_the_same_words_in_a_batch_file(word):
    text = f"- command: [sleep, '1']\n  {word}: true\n"
    with pytest.raises(BadFile) as bad:
        read(text.encode(), "web.yaml", "net", {})
    (line,) = bad.value.lines
    why, todo = refused.REFUSED[word.replace("-", "_")]
    assert line == f"web.yaml line 2: {word}: {why}; {todo}"


def test_no_word_of_ours_is_among_them():
    assert not set(WORDS) & set(refused.REFUSED)


@pytest.mark.parametrize("name", ["host", "none"])
def test_a_network_that_is_none_of_cni_s(name):
    error = refused.explain_network(BadNetwork(f"network {name}", "there is none", "known: a"))
    assert refused.NETWORKS[name][1] in str(error)


@pytest.mark.parametrize("error", [BadNetwork("network web", "no", "x"), BadInput("bind host", "no", "x")])
def test_other_errors_stay_as_they_are(error):
    assert refused.explain_network(error) is error


@pytest.mark.parametrize("owner", ["client", "h1"])
def test_json_is_all_that_is_taken_or_sent(owner, tmp_path):
    """Pickle from a broker would be code of whoever can write to it."""
    made = make_app(Settings(host="h1", run_dir=tmp_path), owner)
    for name in ("accept_content", "result_accept_content"):
        assert made.conf[name] == ["json"], name
    for name in ("task_serializer", "result_serializer", "event_serializer"):
        assert made.conf[name] == "json", name
    assert list(made.control.mailbox.accept) == ["json"]
