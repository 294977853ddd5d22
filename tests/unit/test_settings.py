"""Where settings come from, and what a wrong one is told."""

import os
from pathlib import Path

import pytest

from worker.errors import BadInput
from worker.settings import load_settings


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The settings file of the test; the environment of whoever runs the tests counts for nothing."""
    for name in [name for name in os.environ if name.startswith("SANDBATCH_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "sandbatch.toml"
    monkeypatch.setenv("SANDBATCH_CONFIG", str(file))
    return file


def refusal(**flags: object) -> str:
    with pytest.raises(BadInput) as caught:
        load_settings(**flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flag_before_environment_before_file_before_default(file, monkeypatch):
    """The nearer to the command, the stronger; a flag that is None was not given."""
    default = load_settings().reconcile_s
    file.write_text("reconcile_s = 1\n")
    assert (default, load_settings().reconcile_s) == (15.0, 1.0)
    monkeypatch.setenv("SANDBATCH_RECONCILE_S", "2")
    assert load_settings(reconcile_s=None).reconcile_s == 2.0
    assert load_settings(reconcile_s=3).reconcile_s == 3.0


def test_a_host_needs_no_settings():
    """Broker of this machine, its name, room by its memory and cores."""
    settings = load_settings()
    assert settings.is_broker_embedded
    assert settings.broker_socket == Path("/run/sandbatch/broker.sock")
    assert settings.host
    assert settings.capacity > 0
    assert settings.slots == 2 * os.cpu_count()


def test_what_we_do_not_know_in_the_environment_is_not_ours_to_judge(monkeypatch):
    """SANDBATCH_CONFIG and those of the tests are no settings."""
    monkeypatch.setenv("SANDBATCH_OF_NOBODY", "1")
    assert load_settings().network == "sandbatch"


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().host = "other"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("host", "", "letters, digits"),
        ("host", "a b", "letters, digits"),
        ("host", "-a", "letters, digits"),
        ("host", "a" * 64, "at most 63"),
        ("host", "a\n", "letters, digits"),
        ("capacity", "0", "greater than 0"),
        ("capacity", "many", "valid integer"),
        ("slots", "-1", "greater than 0"),
        ("memory", "some", "512m"),
        ("memory", "1m", "greater than or equal to"),
        ("labels", "gpu", "gpu=true,zone=a"),
        ("labels", "gpu=a b", "letters, digits"),
        ("labels", "a=b,a=c", "twice"),
        ("labels", '{"a": 1}', "valid string"),
        ("labels", '{"a"', "delimiter"),
        ("state_dir", "", "absolute path"),
        ("run_dir", "run", "absolute path"),
        ("cni_conf_dir", "./net.d", "absolute path"),
        ("cni_cache_dir", "cni", "absolute path"),
        ("rootfs_allow", '["here"]', "absolute path"),
        ("image_allow", '["here"]', "absolute path"),
        ("mount_allow", '["/a", "b"]', "absolute path"),
        ("rootfs_allow", "/a:/b", "JSON list"),
        ("cni_timeout_s", "0", "greater than 0"),
        ("cni_timeout_s", "inf", "finite"),
        ("runsc_timeout_s", "nan", "finite"),
        ("runsc_platform", "gpu", "systrap|ptrace|kvm"),
        ("runsc_network", "bridge", "sandbox|host|none"),
        ("reconcile_s", "-1", "greater than 0"),
        ("allow_faults", "perhaps", "boolean"),
        ("metrics_port", "65536", "65535"),
        ("metrics_address", "localhost", "IP address"),
        ("broker_url", "http://h", "redis://, rediss://, redis+socket://, unix://"),
        ("broker_url", "h:6379", "redis://"),
        ("broker_url", " redis://h", "redis://"),
        ("broker_url", "redis://h:port", "no URL"),
        ("broker_url", "redis://[h", "no URL"),
        ("broker_url", "rediss://h?ssl_cert_reqs=none", "always looked at"),
        ("broker_url", "rediss://h/0?a=b&ssl_check_hostname=False", "always looked at"),
        ("broker_ca", "ca.crt", "absolute path"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(monkeypatch, name, value, allowed):
    """At start, in one line: nobody should meet it as a traceback an hour later."""
    monkeypatch.setenv(f"SANDBATCH_{name.upper()}", value)
    words = refusal()
    assert words.startswith(f"setting {name}: ")
    assert f"SANDBATCH_{name.upper()}" in words
    assert allowed in words


@pytest.mark.parametrize(
    "url",
    ["", "redis://h", "redis://u:p@h:6379/1", "rediss://h", "redis+socket:///run/b.sock", "unix:///b.sock"],
)
def test_a_broker_is_named_as_redis_and_kombu_name_one(url):
    assert load_settings(broker_url=url).broker_url == url


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("capacity = 0\n", "setting capacity: 0 is not allowed"),
        ("capasity = 1\n", "setting capasity: 1 is not allowed (Extra inputs"),
        ("capacity = \n", "line 1"),
        ('host = "\udcff"\n', "can't decode"),
    ],
)
def test_a_wrong_file_is_named(file, text, words):
    """With --config it is not the one that the documentation names."""
    file.write_text(text, errors="surrogateescape")
    assert str(file) in refusal()
    assert words in refusal()


def test_faults_are_refused_unless_allowed(monkeypatch):
    """They break sandboxes: a variable that was left set must not."""
    monkeypatch.setenv("SANDBATCH_FAULTS", "stage.netns.do.before:kill")
    assert "SANDBATCH_ALLOW_FAULTS=1" in refusal()
    monkeypatch.setenv("SANDBATCH_ALLOW_FAULTS", "1")
    assert load_settings().faults
    assert "'nonsense' is no point:action" in refusal(faults="nonsense")


@pytest.mark.parametrize(
    "text",
    [
        'broker_url = "http://:hunter2@h"\n',
        'broker_url = "redis://:hunter2@h:port"\n',
        'broker_url = "redis://:a/hunter2@h"\n',
        'broker_url = ["redis://u:hunter2@h"]\n',
        'broker_url = "http://h?password=hunter2"\n',
        'broker_ulr = "redis://:hunter2@h"\n',
        'broker_url = redis://:hunter2@h"\n',
        'broker_url = "redis://:hunter2@h"\ncapacity = 0\n',
        'broker_url = "redis://:hunter2@h"\nfaults = "x"\n',
    ],
)
def test_no_error_shows_the_password_of_the_broker(file, text):
    """It would be in logs and in issues; a mistake nearby or in the name itself is the usual case."""
    file.write_text(text)
    words = refusal()
    assert "hunter2" not in words
    assert "setting" in words


@pytest.mark.parametrize("value", ["", ".", "..", "a/b", "/a", "memory.max", "tasks", "a b", "x" * 65])
def test_a_parent_of_cgroups_is_a_plain_name(monkeypatch, value):
    """It becomes a folder in each hierarchy, beside the kernel's own files."""
    monkeypatch.setenv("SANDBATCH_CGROUP_PARENT", value)
    assert "one plain name is needed" in refusal()
    monkeypatch.setenv("SANDBATCH_CGROUP_PARENT", "sandbatch-2")
    assert load_settings().cgroup_parent == "sandbatch-2"


def test_limits_may_have_units_and_zero_is_none(monkeypatch):
    """As docker has them on its command line."""
    defaults = load_settings()
    assert (defaults.default_memory, defaults.default_cpus, defaults.default_pids) == (None, None, 1024)
    monkeypatch.setenv("SANDBATCH_DEFAULT_MEMORY", "512m")
    monkeypatch.setenv("SANDBATCH_DEFAULT_CPUS", "0.5")
    monkeypatch.setenv("SANDBATCH_DEFAULT_PIDS", "0")
    settings = load_settings()
    assert (settings.default_memory, settings.default_cpus, settings.default_pids) == (2**29, 0.5, None)


def test_a_ca_without_tls_is_refused(monkeypatch):
    """Whoever names one wants nobody to read along; a URL of redis:// would let everybody."""
    monkeypatch.setenv("SANDBATCH_BROKER_CA", "/ca.crt")
    for url in ("", "redis://u:secret@h"):
        monkeypatch.setenv("SANDBATCH_BROKER_URL", url)
        assert "broker_url is none of rediss://" in refusal()
        assert "secret" not in refusal()
    monkeypatch.setenv("SANDBATCH_BROKER_URL", "rediss://h")
    assert load_settings().broker_ca == Path("/ca.crt")


def test_keys_of_a_user_may_lie_in_a_home(monkeypatch, tmp_path):
    """The file of `sandbatch keys` is made before anybody knows whose home it is copied to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(broker_url="rediss://h", broker_ca="~/ca.crt", signing_key="~/user-a.key")
    assert (settings.broker_ca, settings.signing_key) == (tmp_path / "ca.crt", tmp_path / "user-a.key")


def test_a_default_with_which_nothing_starts_is_refused(monkeypatch):
    monkeypatch.setenv("SANDBATCH_DEFAULT_MEMORY", "8m")
    assert "24m" in refusal()
    monkeypatch.setenv("SANDBATCH_DEFAULT_MEMORY", "much")
    assert "512m" in refusal()
    monkeypatch.delenv("SANDBATCH_DEFAULT_MEMORY")
    monkeypatch.setenv("SANDBATCH_DEFAULT_CPUS", "0.001")
    assert "0.01" in refusal()


def test_labels_of_a_host_are_pairs_a_json_object_or_a_table(file, monkeypatch):
    """By whatever an administrator sets its host up with; a flag takes the place of all of them."""
    assert load_settings().labels == {}
    file.write_text('[labels]\ngpu = "true"\n"example.com/zone" = "a"\n')
    assert load_settings().labels == {"gpu": "true", "example.com/zone": "a"}
    monkeypatch.setenv("SANDBATCH_LABELS", "gpu=false, zone=b,")
    assert load_settings().labels == {"gpu": "false", "zone": "b"}
    monkeypatch.setenv("SANDBATCH_LABELS", '{"gpu": "maybe"}')
    assert load_settings().labels == {"gpu": "maybe"}
    assert load_settings(labels='{"a": "b"}').labels == {"a": "b"}


def test_memory_for_sandboxes_is_most_of_the_machine_unless_said(monkeypatch):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert load_settings().memory == int(total * 0.8)
    monkeypatch.setenv("SANDBATCH_MEMORY", "16g")
    assert load_settings().memory == 16 * 2**30


def test_lists_of_thousands_of_levels_in_the_file_are_told_in_words(file):
    file.write_text("network = " + "[" * 5000)
    assert "settings file" in refusal()


@pytest.mark.parametrize("name", ["memory", "default_memory", "images_bytes", "image_max_bytes"])
def test_a_size_without_end_is_refused(name):
    """As a float it is infinite, and has no integer."""
    assert name in refusal(**{name: "9" * 400})


@pytest.mark.parametrize("url", ["redis:/me:secret@h", "me:secret@h:6379", "rediss:me:secret@h"])
def test_a_mistyped_url_does_not_show_its_password(url):
    """Also where nobody can say which part of it the password is."""
    assert "secret" not in refusal(broker_url=url)
