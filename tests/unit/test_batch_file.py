"""Batch files as people write them: every format, every word, and every line that is wrong."""

import json
from pathlib import Path

import pytest

from cli import batch_specs
from cli.batch_specs import BadFile
from cli.words import WORDS
from tasks.batch import BatchPlan
from worker.errors import BadInput
from worker.spec import Spec

PLAN = """\
name: nightly
success: 90%
max_in_flight: 5
waves: [1, 2]
fail_fast: yes
defaults:
  memory: 512m
  env: {A: 1, B: b}
specs:
  - command: echo "a b"
    count: 2
  - command: [sleep, 0060]
    env: {B: null, C: no}
    memory: null
"""


def read(text: str, name: str = "-", **options: str) -> batch_specs.Batch:
    return batch_specs.read(text.encode(), name, "net", options)


def lines(text: str, name: str = "jobs.yaml", **options: str) -> list[str]:
    """What is said of a file with something wrong in it."""
    with pytest.raises(BadFile) as caught:
        read(text, name, **options)
    return caught.value.lines


def test_defaults_specs_and_a_plan_make_a_batch():
    batch = read(PLAN)
    assert (batch.name, batch.plan) == ("nightly", BatchPlan("90%", 5, (1, 2), True))
    first, second, third = batch.specs
    assert first is second  # read once
    assert (first.args, first.env, first.memory_bytes) == (["echo", "a b"], {"A": "1", "B": "b"}, 512 << 20)
    # What is written is meant: no octal number, no bool. A null takes away what the defaults say.
    assert (third.args, third.env, third.memory_bytes) == (["sleep", "0060"], {"A": "1", "C": "no"}, None)
    assert {one.network for one in batch.specs} == {"net"}


def test_the_example_of_the_readme_is_one():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    batch = read(readme.split("```yaml\n")[1].split("```")[0])
    assert (batch.name, len(batch.specs)) == ("nightly", 101)
    assert (batch.plan.success, batch.plan.waves, batch.plan.fail_fast) == ("95%", (1, 10, 100), True)
    assert {one.env["SUITE"] for one in batch.specs} == {"nightly"}


def test_the_options_of_the_command_line_win():
    batch = read(PLAN, success="3", waves="1,10", fail_fast="False")
    assert batch.plan == BatchPlan("3", 5, (1, 10), False)
    assert read("- command: 'true'").plan == BatchPlan("all")


SPECS = [{"command": "true", "count": 2, "isolate": True}, {"args": ["sleep", "1"], "on": {"gpu": True}}]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (json.dumps(SPECS), "-"),
        (json.dumps(SPECS, indent=1), "x.json"),
        (json.dumps({"specs": SPECS}), "-"),
        (json.dumps({"specs": SPECS}, indent="\t"), "-"),
        ("\n".join(map(json.dumps, SPECS)) + "\n\n", "-"),
        ("\r\n".join(map(json.dumps, SPECS)), "x.jsonl"),
        ("\ufeff" + json.dumps(SPECS), "x.json"),
        ("- {command: 'true', count: 2, isolate: yes}\n- args: [sleep, 1]\n  on:\n    gpu: true\n", "x.yml"),
    ],
)
def test_every_format_says_the_same(text, name):
    one, same, other = read(text, name).specs
    assert one is same
    assert (one.args, one.isolate) == (["true"], True)
    assert (other.args, other.on) == (["sleep", "1"], {"gpu": "true"})


def test_a_single_line_of_json_is_a_spec_unless_it_has_specs():
    assert read('{"command": "true"}').specs[0].args == ["true"]
    assert read('{"specs": [{"command": "true"}]}').specs[0].args == ["true"]


def test_yaml_has_anchors_and_merges():
    text = "defaults: &d {cpus: 2, cwd: /a}\nspecs:\n- <<: *d\n  command: 'true'\n  cwd: /b\n"
    (spec,) = read(text).specs
    assert (spec.cpus, spec.cwd) == (2.0, "/b")


def test_every_word_of_run_and_of_a_spec_is_known():
    """What `show --json` prints as a spec can be pasted into a file."""
    assert {name for name in Spec.model_fields if name not in WORDS} == set()
    spec = Spec(
        args=["a", "b"],
        publish=[{"port": 80}],
        mounts=[{"type": "tmpfs", "target": "/x", "size_bytes": 4096}],
        egress=[],
        bandwidth={"ingress_rate": 8000},
        ttl_s=1.5,
        deadline_at="2027-01-31T12:00:00Z",
        reschedule=True,
        hosts={"db": "10.0.0.1"},
    )
    for text in (json.dumps([spec.model_dump()]), f"- {spec.model_dump_json()}"):
        assert read(text).specs == [spec]


def test_the_words_are_those_of_the_command_line():
    words = {
        "network": "mine:ip=10.0.0.5",
        "publish": ["8080:80", "53/udp"],
        "env": ["A=1", "B=2"],
        "label": "team=red",
        "volume": "/a:/b",
        "mount": ["/c:/d"],
        "tmpfs": "/e:size=1m",
        "writable": "memory:2m",
        "bandwidth": "in=10m",
        "egress": "10.0.0.0/8:443,8.8.8.8:53/udp",
        "add-host": "db:10.0.0.5",
        "ready": "tcp:80",
        "ready-timeout": "1m30s",
        "ttl": "1h",
        "stop_grace": 0.5,
        "keep": "1d",
        "rm": True,
        "command": "true",
    }
    (spec,) = read(json.dumps([words])).specs
    assert (spec.networks[0].name, spec.networks[0].ips) == ("mine", ["10.0.0.5"])
    assert [(one.host_port, one.port, one.protocol) for one in spec.publish] == [
        (8080, 80, "tcp"),
        (0, 53, "udp"),
    ]
    assert (spec.env, spec.labels) == ({"A": "1", "B": "2"}, {"team": "red"})
    assert [one.target for one in spec.mounts] == ["/b", "/d", "/e"]
    assert (spec.writable, spec.writable_bytes, spec.remove) == ("memory", 2 << 20, True)
    assert spec.egress == ["10.0.0.0/8:443", "8.8.8.8:53/udp"]
    assert (spec.ready_timeout_s, spec.ttl_s, spec.stop_grace_s, spec.keep_s) == (90, 3600, 0.5, 86400)


def test_the_deadline_of_a_batch_holds_for_its_specs_but_an_earlier_one_stays():
    text = "deadline: 2030-01-01T00:00:00Z\nspecs:\n" + "".join(
        f"- command: 'true'\n  deadline: {one}\n" for one in ("2029-01-01T00:00:00Z", "2031-01-01T00:00:00Z")
    )
    assert [one.deadline_at[:4] for one in read(text).specs] == ["2029", "2030"]
    assert read(text, deadline="2028-01-01T00:00:00Z").plan.deadline_at == "2028-01-01T00:00:00Z"


def test_every_bad_line_is_named_with_its_number_and_its_field():
    text = """\
sucess: all
waves: [1, x]
deadline: soon
defaults:
  cpus: many
  memory: 5x
specs:
  - command: 'true'
    memry: 1g
  - command: 'true'
    cpus: 1
    publish: [80, 70000:1]
    env:
      A-B: hunter2
  - {}
  - 5
  - command: 'true'
    count: 0
    command: 'false'
"""
    assert [(one.split(": ")[0], one.split(": ")[1].split(" ")[0]) for one in lines(text)] == [
        ("jobs.yaml line 1", "sucess"),
        ("jobs.yaml line 2", "waves"),
        ("jobs.yaml line 3", "deadline"),
        ("jobs.yaml line 5", "cpus"),
        ("jobs.yaml line 6", "memory"),
        ("jobs.yaml line 9", "memry"),
        ("jobs.yaml line 12", "publish.1.host_port"),
        ("jobs.yaml line 13", "env"),
        ("jobs.yaml line 15", "command"),
        ("jobs.yaml line 16", "spec"),
        ("jobs.yaml line 18", "count"),
        ("jobs.yaml line 19", "command"),
    ]
    assert "hunter2" not in str(lines(text))
    assert "did you mean success?" in lines(text)[0]


def test_bad_lines_of_json_are_named_as_well():
    text = json.dumps([{"command": "true", "cpus": "x"}, {"command": "true", "memry": 1}], indent=1)
    words = ["jobs line 4: cpus", "jobs line 8: memry"]
    assert [one[: len(word)] for one, word in zip(lines(text, "jobs"), words, strict=True)] == words
    text = '{"command": "true"}\n{"command": tru}\n[]\n\n{"command": "a", "command": "b"}\n{"cpus": 1}\n'
    assert [one.split(":")[0] for one in lines(text, "jobs.jsonl")] == [
        f"jobs.jsonl line {number}" for number in (2, 3, 5, 6)
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: specs: there are none"),
        ("[]", "line 1: specs: there are none"),
        ("name: x", "line 1: specs: there are none"),
        ("specs: 5", "line 1: specs: it is no list"),
        ("specs: []", "specs: there are none"),
        ("just words", "specs: there are none"),
        ("specs: [{command: x}]\ndefaults: []", "line 2: defaults: it is no mapping"),
        ("- {command: x, cpu: 1}", "did you mean cpus?"),
        ("- {command: x, memory: 1m, memory_bytes: 1}", "memory_bytes: it means the same as memory"),
        ("- {command: x, volume: /a:/b, tmpfs: [/b]}", "two have the same target"),
        ("- {command: x, host: a, reschedule: true}", "reschedule: host a leaves it no other host"),
        ("- {command: x, count: 1000001}", "asks for more than 1000000"),
        ("- {command: x, count: 99999999999999}", "count 99999999999999: a number is needed"),
        ("- {command: x, count: [1]}", "count"),
        ("- {command: [x, [y]]}", "command.1: Input should be a valid string"),
        ("- {command: x, ttl: [1]}", "ttl: a text or a number is needed"),
        ("- {command: x, ttl: soon}", "ttl soon: a time is needed; for example 90, 10m or 1h30m"),
        ("- {command: 'a \"b'}", "command: No closing quotation"),
        ("- {command: x, env: &e {A: *e}}", "it contains itself"),
        ("- {command: !!python/name:os.system x}", "no tag"),
        ("- {? [a] : b, command: x}", "a key is no text"),
        ("- {<<: 5, command: x}", "<<: it names no mapping"),
        ("success: 3\nspecs: [{command: x}]", "line 1: success 3: there are 1 sandboxes"),
        ("success: most\nspecs: [{command: x}]", "line 1: success 'most': all, N or N% is needed"),
        ("max_in_flight: 0\nspecs: [{command: x}]", "max_in_flight 0: at least 1"),
        ("name: a b\nspecs: [{command: x}]", "line 1: name 'a b'"),
        ("fail_fast: perhaps\nspecs: [{command: x}]", "fail_fast perhaps: true or false"),
        ("{name: {a: b}, specs: [{command: x}]}", "name: a text or a number"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    assert words in "\n".join(lines(text))


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"specs:\n  - {command: x\n", "a.yaml", "a.yaml line 3: no YAML"),
        (b"a: 1\n\tb: 2", "a.yaml", "a.yaml line 2: no YAML"),
        (b"- command: x\n- command: \x01", "a.yaml", "a.yaml line"),
        (b"a: b\n---\nc: d", "a.yaml", "no YAML"),
        (b'[\n{"command": "x"},\n]', "a.json", "a.json line 3: no JSON"),
        (b"- command: x\n- command: \xff", "a.yaml", "a.yaml line 2: it is no UTF-8"),
        (b"- *nobody", "a.yaml", "a.yaml line 1: no YAML: found undefined alias"),
        (b"[" * 100_000, "a.json", "a.json"),
        (b"[" * 100_000, "a.yaml", "a.yaml"),
        (b"- [" + b"[" * 900 + b"]" * 901, "-", "no mapping"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_cannot_be_read_at_all_is_one_error(data, name, words):
    with pytest.raises((BadInput, BadFile)) as caught:
        batch_specs.read(data, name, "net", {})
    assert words in "\n".join([str(caught.value), *getattr(caught.value, "lines", ())])


def test_a_few_lines_that_mean_billions_are_refused():
    """Else the check of one spec would take the machine's memory."""
    text = "- command: x\n  env: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"- command: x\n  env: &a{number} [{','.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 12)
    )
    assert any("values are too many" in one for one in lines(text))


def test_a_wrong_option_is_named_as_an_option():
    with pytest.raises(BadInput, match=r"^--max-in-flight x: a number is needed"):
        read(PLAN, max_in_flight="x")
    with pytest.raises(BadInput, match=r"^success 9: there are 3"):
        read(PLAN, success="9")


def test_needs_are_looked_at_once_and_name_all_their_lines():
    batch = read("".join(f"- command: [echo, '{one}']\n  network: moon\n" for one in range(5)))
    looked = []

    def validate(spec: Spec) -> None:
        looked.append(spec)
        raise BadInput("network moon", "no host has it", "known: none")

    with pytest.raises(BadFile) as caught:
        batch_specs.check_needs(batch, validate)
    assert len(looked) == 1
    assert caught.value.lines == ["- lines 2, 4, 6, 8, 10: network moon: no host has it; known: none"]
    batch = read("".join(f"- command: [echo, '{one}']\n  network: moon\n" for one in range(10_000)))
    with pytest.raises(BadFile) as caught:
        batch_specs.check_needs(batch, validate)
    assert len(looked) == 2
    assert "98, 100 and 9950 more: network moon" in caught.value.lines[0]


def test_an_image_in_the_defaults_needs_no_command_and_a_spec_may_do_without_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own, bare, entry = read(
        "defaults: {image: 'oci:layout:v1', read_only: yes}\n"
        "specs:\n- {command: serve}\n- {image: null, writable: null, command: [id]}\n"
        "- {entrypoint: sh, user: app, groups: [5]}\n"
    ).specs
    assert (own.image, own.args, own.writable) == (f"oci:{tmp_path}/layout:v1", ["serve"], "no")
    assert (bare.image, bare.kind) == (None, "spec/v1")
    assert (entry.args, entry.entrypoint, entry.user, entry.groups) == ([], ["sh"], "app", [5])


def test_what_is_wrong_with_an_image_names_its_line():
    assert lines("specs:\n- image: A/B\n- {image: a, read_only: perhaps}\n- {image: a, rootfs: /x}\n") == [
        "jobs.yaml line 2: image: 'A/B': 'B' is no repository: its name must be lowercase; correct it",
        "jobs.yaml line 3: read_only: true or false is needed; or say it by writable: no, memory, disk",
        "jobs.yaml line 4: spec: image and rootfs: a sandbox has one of them; correct it",
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml", "a"])
@pytest.mark.parametrize("text", ["{}", '[{{"args": ["true"], "pids": {}}}]', '{{"pids": {}, "specs": []}}'])
def test_a_number_of_thousands_of_digits_is_wrong_as_any_other(text, name):
    """Python refuses to read one, with an error of its own."""
    with pytest.raises((BadInput, BadFile)):
        read(text.format("1" * 5000), name)
