"""Real bytes of every kind that is read: files of a host, answers of plugins, messages, a user's files."""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz import keys
from worker.spec import make_spec

TESTS = Path(__file__).parents[1]
ID = "sb-00000000000000f1"
IMAGE_ID = "sha256:" + "ab" * 32
LOG = (
    b"2026-11-25T09:17:55.499000000+00:00 stdout F hello\n2026-11-25T09:17:55.5+00:00 stderr P par\n"
    b"2026-11-25T09:17:55.600000000+00:00 stderr F t\n2026-11-25T09:17:56.499000000+00:00 stdout F \n"
)


@cache
def journals() -> list[bytes]:
    """One that runs, one that is being undone, one that waits to be started anew, one with an image."""
    old = (TESTS / "data/0.1.0/journal.jsonl").read_bytes()
    old = old.replace(b"@NET@", b"10.88.0").replace(b"@FOLDER@", b"/nowhere").replace(b"@BRIDGE@", b"cni0")
    lines = old.splitlines()
    moment = "2026-11-25T09:17:57.000Z"
    undone = [
        {
            "event": "facts",
            "facts": {"wanted": "failed", "error": {"stage": "ready", "message": "x"}, "oom": True},
        },
        {"event": "undo", "stage": "ready"},
        {"event": "undone", "stage": "ready"},
        {"event": "undo-failed", "stage": "container", "message": "no"},
        {"event": "facts", "facts": {"stuck": {"stage": "container", "message": "no"}, "exit_code": 1}},
    ]
    again = [
        {
            "event": "facts",
            "facts": {"restart_at": moment, "restarts": 1, "quick_ends": 1, "ended_at": moment},
        },
        {"event": "attempt", "attempt": 2},
    ]
    asked = [{"event": "facts", "facts": {"stop": {"reason": "stopped", "grace_s": 1.0, "at": moment}}}]
    published = [{"host_ip": "", "host_port": 8080, "container_port": 80, "protocol": "tcp"}]
    asked[0]["facts"]["publish"] = published  # type: ignore[index]

    def with_more(events: list[dict[str, Any]]) -> bytes:
        more = [{"seq": 11 + number, "t": moment, **one} for number, one in enumerate(events, 1)]
        return b"\n".join([*lines, *(json.dumps(one).encode() for one in more), b""])

    head = json.loads(lines[0])
    head["spec"] = make_spec(image="busybox", args=["sh"], on={"zone": "a"}).model_dump()
    image = [
        head,
        {"seq": 1, "t": moment, "event": "begun", "stage": "image", "intent": {"digest": IMAGE_ID}},
        {"seq": 2, "t": moment, "event": "facts", "facts": {"pulling": True, "image_digest": IMAGE_ID}},
        {"seq": 3, "t": moment, "event": "facts", "facts": {"pulling": None, "fetched": True}},
        {
            "seq": 4,
            "t": moment,
            "event": "done",
            "stage": "image",
            "data": {"spec": {"args": ["sh"], "env": {"A": "b"}}, "labels": {"a": "b"}, "digest": IMAGE_ID},
        },
        {"seq": 5, "t": moment, "event": "failed", "stage": "netns", "message": "no"},
    ]
    final = [
        *undone[:1],
        {"event": "facts", "facts": {"final": "failed", "log_until": moment, "stuck": None}},
    ]
    whole = b"\n".join([*(json.dumps(one).encode() for one in image), b""])
    return [b"\n".join([*lines, b""]), *map(with_more, (undone, again, asked, final)), whole]


def specs() -> list[bytes]:
    """Of each kind, with every field in one of them."""
    mount = {"type": "bind", "source": "/srv/data", "target": "/data"}
    made = [
        make_spec(args=["true"]),
        make_spec(
            args=["sh", "-c", "x"],
            env={"A": "b"},
            labels={"a": "b"},
            hosts={"db": "10.0.0.1"},
            networks=[{"name": "a", "ips": ["10.0.0.3"]}, {"name": "b"}],
            egress=["10.0.0.0/8:80/tcp"],
            publish=[{"port": 80, "host_port": 8080}],
            mounts=[mount],
            dns=["10.0.0.1"],
            ready="http:80/x",
            restart="on-failure:3",
            deadline_at="2026-11-25T09:17:55Z",
            memory_bytes=2**28,
            cpus=0.5,
            pids=10,
            on={"zone": "a"},
            user="1:1",
        ),
        make_spec(args=[], image="oci:/srv/images:a", entrypoint=["x"], user="me:us", stop_signal="RTMIN+3"),
    ]
    return [json.dumps(one.model_dump()).encode() for one in made]


def batches() -> list[bytes]:
    """YAML, JSON, JSON Lines."""
    return [
        b"name: a\nsuccess: 90%\nwaves: [1, 10]\ndefaults: &d\n  memory: 64m\n  env: {A: b}\nspecs:\n"
        b"- args: [sleep, '1']\n  count: 3\n- <<: *d\n  args: sh -c true\n  publish: ['8080:80']\n"
        b"  mount: /a:/b:ro\n",
        b'{"name": "a", "defaults": {"cpus": 0.5}, "specs": [{"args": ["true"], "ttl": "1h"}]}',
        b'{"args": ["true"], "networks": ["a", "b"]}\n'
        b'{"args": ["true"], "egress": ["10.0.0.0/8"], "env": {"A": "1"}}\n',
        b"- args: ['true']\n  labels: {a: b}\n  on: {zone: a}\n  user: '0'\n  image: busybox:1\n",
    ]


@cache
def _recorded() -> list[Any]:
    recordings = json.loads((TESTS / "unit/libcni/recordings.json").read_text())
    return [one for runs in recordings.values() for one in runs]


def cni_configs() -> list[bytes]:
    single = {"cniVersion": "1.0.0", "name": "net", "type": "bridge", "ipam": {"type": "host-local"}}
    subnet = {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "ipam": subnet, "capabilities": {"ips": True}}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "dns": {"nameservers": ["10.0.0.1"]}}
    whole = {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.1.0"],
        "name": "net",
        "plugins": [bridge, ports],
    }
    return [json.dumps(one, indent=1).encode() for one in (single, whole)]


def cni_results() -> list[bytes]:
    found = [json.dumps(one["result"]).encode() for one in _recorded() if one.get("result")]
    return sorted(set(found))[:40]


def cni_caches() -> list[bytes]:
    found = [json.dumps(entry).encode() for one in _recorded() for entry in one["cache"].values()]
    return sorted(set(found))[:20]


def exits() -> list[bytes]:
    return [b"0", b"137"]


def logs() -> list[bytes]:
    return [LOG]


def cursors() -> list[bytes]:
    return [b"1234 2026-11-25T09:17:55.499000000+00:00 120 01", b"0  0 00"]


def messages() -> list[bytes]:
    """As they lie in a queue: signed by alice, and by the host itself with tasks that follow."""
    order = {"kind": "order/v1", "container_id": ID, "attempt": 1}
    found = []
    for signer, task, kwargs, embedded in (
        ("user-alice", "place", {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}),
        ("user-alice", "unwind", {"final": "cancelled"}, {}),
        ("host-h1", "netns", {}, {"chain": [{"task": "sandbatch.network", "args": [order]}]}),
    ):
        body = base64.b64encode(json.dumps([[order], kwargs, embedded]).encode()).decode()
        message = {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": f"sandbatch.{task}", "id": "a", "retries": 0, "argsrepr": "x"},
            "properties": {
                "delivery_tag": "t",
                "delivery_info": {"exchange": "", "routing_key": "host.h1"},
                "body_encoding": "base64",
            },
        }
        found.append(json.dumps(keys.guard(signer).sign("host.h1", message)).encode())
    return found


def orders() -> list[bytes]:
    order = {"kind": "order/v1", "container_id": ID, "attempt": 1}
    pull = {"kind": "pull/v1", "pull_id": "pull-0123456789abcdef"}
    words = {"final": "failed", "reason": "stopped", "grace_s": 1.5, "digest": IMAGE_ID, "is_admitted": True}
    return [json.dumps(one).encode() for one in (order, pull, words)]


def tokens() -> list[bytes]:
    signer = keys.signer("user-alice")
    return [signer.sign("call", ["h1", "{}"]).encode()]


def calls() -> list[bytes]:
    call_id = "0" * 32
    logs_of = {"verb": "logs", "call_id": call_id, "container_id": ID, "tail": 1, "cursor": "1 a 2 00"}
    execute = {"verb": "exec", "call_id": call_id, "container_id": ID, "args": ["sh"], "env": {"A": "b"}}
    remove = {"verb": "image-rm", "call_id": call_id, "digest": IMAGE_ID}
    return [json.dumps({"kind": "call/v1", **one}).encode() for one in (logs_of, execute, remove)]


def entries() -> list[bytes]:
    return [
        json.dumps(one).encode()
        for one in ({"t": "stdin", "n": "1", "d": "x"}, {"t": "ack", "n": "2", "d": "9"})
    ]


def records() -> list[bytes]:
    """Fields of a record, and what lies beside it."""
    spec = json.loads(specs()[1])
    hidden = {**spec, "kind": "spec/v4", "env": {"A": None}}
    run = {"name": "netns", "verb": "do", "state": "done", "started_at": "2026-11-25T09:17:55.499Z"}
    fields = {
        "id": ID,
        "batch": "b",
        "state": "running",
        "attempt": "1",
        "host": "h1",
        "exit_code": "1",
        "spec": json.dumps(hidden),
        "stages": json.dumps([run]),
        "ips": '["10.0.0.2"]',
        "links": "[]",
        "limits": '{"pids":1}',
        "restarts": "2",
        "error": '{"stage":"a","message":"b"}',
        "notes": "[]",
        "publish": "[]",
        "args": '["sh"]',
        "image_labels": '{"a":"b"}',
        "oom": "1",
        "beside": json.dumps({"kind": "sealed/v1", "env": {"A": "b"}, "token": None}),
    }
    return [json.dumps(fields).encode()]


def references() -> list[bytes]:
    names = ("busybox", "docker://registry:5000/team/name:1.0", f"a/b@{IMAGE_ID}", "oci:/srv/a:tag")
    return [name.encode() for name in (*names, "docker-archive:/srv/a.tar:busybox:1", "oci-archive:/a/b.tar")]


def manifests() -> list[bytes]:
    kind = "application/vnd.oci.image.config.v1+json"
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": IMAGE_ID, "size": 10}
    manifest = {"config": {"mediaType": kind, "digest": IMAGE_ID, "size": 7}, "layers": [layer]}
    platform = {"os": "linux", "architecture": "amd64"}
    index = {"manifests": [{"digest": IMAGE_ID, "size": 1, "platform": platform}]}
    return [json.dumps(one).encode() for one in (manifest, index)]


def configs() -> list[bytes]:
    config = {
        "User": "me:us",
        "Env": ["PATH=/bin", "A=b"],
        "Cmd": ["sh"],
        "Entrypoint": ["x"],
        "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}, "90-99/udp": {}},
        "Labels": {"a": "b"},
        "StopSignal": "SIGQUIT",
    }
    return [json.dumps({"os": "linux", "architecture": "amd64", "config": config}).encode()]


def passwds() -> list[bytes]:
    """Both files in one, as the target splits them."""
    return [
        b"root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n\x1cus:x:7:me,root\nme:x:1000:\n"
    ]


def words() -> list[bytes]:
    """What a user writes for sizes, times, ports and the like."""
    return [
        *(b"512m", b"1.5g", b"90", b"1h30m", b"500ms", b"2027-01-31T12:00:00Z", b"10m", b"in=1m,out=2m"),
        *(
            b"127.0.0.1:8080:80/tcp",
            b"[::1]:1:2/udp",
            b"net:ip=10.0.0.2,mac=02:00:00:00:00:01",
            b"/tmp:size=1m",
        ),
        *(b"/a:/b:ro", b"memory:1g", b"db:10.0.0.5", b"10.0.0.0/8:443,[fd00::/8]:53/udp", b"SIGRTMIN+3"),
    ]


def settings_files() -> list[bytes]:
    return [
        b'host = "h1"\nmemory = "16g"\nlabels = "gpu=true,zone=a"\nrootfs_allow = ["/srv"]\nslots = 4\n',
        b'broker_url = "rediss://worker:secret@h:6379"\ndefault_memory = 0\npublish_ports = "1-2"\n',
    ]


def fields() -> list[bytes]:
    """One record, its fields as JSON of texts."""
    made = {
        "spec": '{"args": ["true"], "networks": [{"name": "net"}]}',
        "stages": '[{"name": "netns", "verb": "do", "state": "done"}]',
        "ips": '["10.0.0.2"]',
        "publish": '[{"host_port": 1, "port": 2, "protocol": "tcp", "host_ip": null}]',
        "error": '{"stage": "netns", "message": "no"}',
        "limits": '{"pids": 7}',
        "exit_code": "3",
        "memory": "7",
        "line": "any|spec/v1|0|net",
        "restarts": "1",
        "attempt": "2",
    }
    return [json.dumps(made).encode()]


def store_files() -> list[bytes]:
    """The description of an image of the store, and a reference to one."""
    digest = "sha256:" + "ab" * 32
    sizes = {"size_bytes": 1, "files": 1, "dropped": 0, "fingerprint": "f", "pulled_at": 1.5}
    entry = {"kind": "image/v1", "digest": digest, "config": {}, **sizes}
    return [
        json.dumps(entry).encode(),
        json.dumps({"reference": "a:b", "digest": digest, "at": 1.0}).encode(),
    ]
