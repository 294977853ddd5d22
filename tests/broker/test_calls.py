"""Conversations over a real broker: nothing is lost, doubled or piled up, and nothing stays."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tasks import caller, calls, signing, wire
from tasks.caller import Conversation, new_call_id
from tasks.calls import CallService
from tasks.wire import WINDOW_BYTES, Entry, Numbers, call_key, calls_key
from tests.broker.conftest import HOST
from worker.calls import Call, make_call, read_call
from worker.errors import HostAway, Lost, Refused, SandbatchError
from worker.settings import Settings

ID = "sb-0123456789abcdef"
BIG = 5 * WINDOW_BYTES


class Handlers:
    """What a host does in these tests: the first word of the command says it."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []

    async def run(self, ready: asyncio.Event) -> None:
        ready.set()
        await asyncio.Event().wait()

    async def handle(self, call: Any, talk: Any) -> dict[str, Any]:
        word = call.args[0]
        self.began.append(word)
        try:
            if word == "echo":
                while (data := await talk.input()) is not None:
                    await talk.output("stdout", data)
                    await talk.took(len(data))
            elif word == "flood":
                for _ in range(BIG // 65536):
                    await talk.output("stderr", b"x" * 65536)
            elif word == "refuse":
                raise SandbatchError(ID, "no", "ask another")
            elif word == "break":
                raise KeyError("a defect")
            elif word == "wait":
                await talk.output("stdout", b"waiting")
                await asyncio.Event().wait()
            return {"exit_code": 7}
        finally:
            self.ended.append(word)


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
def serve(broker: Settings, client: "redis.Redis", handlers: Handlers) -> Iterator[Callable[[], CallService]]:
    """Start the host's end; stopped after the test."""
    made: list[CallService] = []

    def start() -> CallService:
        made.append(CallService(broker, lambda: handlers))
        made[-1].start()
        return made[-1]

    yield start
    for service in made:
        service.stop()


def call(word: str, **fields: Any) -> Call:
    return make_call("exec", call_id=new_call_id(), container_id=ID, args=[word], **fields)


def until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def talk_to_the_end(
    settings: Settings, asked: Any, on_output: Callable[[], Any] = lambda: None
) -> list[Entry]:
    """The replies; `on_output` is called at each part of an output."""
    replies = []
    with Conversation(settings, HOST, asked) as talk:
        for reply in talk.replies():
            replies.append(reply)
            if reply.kind == "stdout":
                on_output()
    return replies


def interrupt() -> None:
    raise KeyboardInterrupt


def test_input_and_output_are_whole_both_ways_and_nothing_stays(broker, serve, client):
    """Five times what may be on its way at once."""
    serve()
    parts = [bytes([number % 256]) * 60_000 for number in range(BIG // 60_000)]
    with Conversation(broker, HOST, call("echo", stdin=True)) as talk:
        feeder = threading.Thread(target=lambda: [talk.feed(part) for part in (*parts, b"")])
        feeder.start()
        replies = list(talk.replies())
        feeder.join()
    assert b"".join(one.data for one in replies if one.kind == "stdout") == b"".join(parts)
    assert replies[-1].document() == {"exit_code": 7}
    assert client.keys("sandbatch:call:*") == []
    assert client.xlen(calls_key(HOST)) == 0


def test_a_slow_client_makes_the_host_wait(broker, serve, client, handlers):
    """Neither is anything lost, nor does the broker hold more than the window."""
    serve()
    asked, most = call("flood"), 0
    got = 0
    with Conversation(broker, HOST, asked) as talk:
        for reply in talk.replies():
            got += len(reply.data) if reply.kind == "stderr" else 0
            if got <= 10 * 65536:
                time.sleep(0.03)
            most = max(most, client.memory_usage(call_key(asked.call_id, "out")) or 0)
            assert got >= BIG - WINDOW_BYTES - wire.ACK_BYTES or not handlers.ended
    assert got == BIG
    assert most < 2 * WINDOW_BYTES


def test_the_hosts_error_is_the_clients(broker, serve):
    serve()
    with pytest.raises(Refused, match="no; ask another"):
        talk_to_the_end(broker, call("refuse"))
    with pytest.raises(Refused, match="a defect"):
        talk_to_the_end(broker, call("break"))
    assert talk_to_the_end(broker, call("nothing"))[-1].kind == "end"  # it goes on


def test_a_client_that_leaves_ends_what_runs_for_it(broker, serve, handlers):
    serve()
    with pytest.raises(KeyboardInterrupt):
        talk_to_the_end(broker, call("wait"), interrupt)
    until(lambda: handlers.ended == ["wait"])


def test_a_silent_client_is_given_up_and_its_keys_expire(broker, serve, handlers, client, monkeypatch):
    """Its machine may have gone without a word."""
    monkeypatch.setattr(calls, "CLIENT_SILENT_S", 0.5)
    monkeypatch.setattr(calls, "PING_S", 0.2)
    serve()
    asked = call("wait")
    client.xadd(call_key(asked.call_id, "in"), Entry("ping", 1).fields())
    client.xadd(calls_key(HOST), wire.call_fields(asked, HOST))
    until(lambda: handlers.ended == ["wait"])
    assert 0 < client.ttl(call_key(asked.call_id, "out")) <= wire.EXPIRE_S


def test_a_host_that_does_not_answer_is_named(broker, client, monkeypatch):
    monkeypatch.setattr("tasks.caller.STALE_S", 0.5)
    monkeypatch.setattr("tasks.caller.BLOCK_S", 0.2)
    asked = call("wait")
    with pytest.raises(HostAway, match=f"host {HOST}: it does not answer"):
        talk_to_the_end(broker, asked)
    assert 0 < client.ttl(call_key(asked.call_id, "in")) <= wire.EXPIRE_S
    assert 0 < client.ttl(calls_key(HOST)) <= wire.EXPIRE_S


def test_a_call_that_was_given_up_is_not_begun(broker, client, handlers, serve, monkeypatch):
    """A worker that comes late must not run what nobody waits for."""
    given_up, gone, wanted = call("flood"), call("wait"), call("nothing")
    for asked in (given_up, wanted):
        client.xadd(call_key(asked.call_id, "in"), Entry("ping", 1).fields())
    client.xadd(call_key(given_up.call_id, "in"), Entry("cancel", 2).fields())
    for asked in (given_up, gone, wanted):
        client.xadd(calls_key(HOST), wire.call_fields(asked, HOST))
    client.xadd(calls_key(HOST), {"call": '{"verb": "exec", "kind": "call/v9"}'})
    serve()
    until(lambda: client.xlen(calls_key(HOST)) == 0)
    until(lambda: handlers.ended == ["nothing"])
    assert handlers.began == ["nothing"]


def test_a_call_waits_for_a_worker_that_starts_in_time(broker, serve):
    """A restart of the worker is no error."""
    later = threading.Timer(0.5, serve)
    later.start()
    assert talk_to_the_end(broker, call("nothing"))[-1].kind == "end"
    later.join()


def test_a_worker_that_stops_says_so(broker, serve, handlers):
    service = serve()
    with pytest.raises(HostAway, match="its worker stops"):
        talk_to_the_end(broker, call("wait"), service.stop)
    assert handlers.ended == ["wait"]


def test_a_worker_that_was_killed_is_missed_when_the_next_begins(broker, client, serve):
    """Without waiting for its silence."""
    asked = call("wait")
    client.xadd(call_key(asked.call_id, "out"), Entry("begin", 1).fields())
    client.xadd(call_key(asked.call_id, "out"), Entry("stdout", 2, b"x").fields())

    def restart() -> None:
        client.delete(calls_key(HOST))  # the one before had taken the call
        serve()

    with pytest.raises(HostAway, match="started anew"):
        talk_to_the_end(broker, asked, restart)


def test_what_came_twice_is_taken_once_and_a_gap_is_noticed():
    """A connection may break between the broker's act and its answer; then the act is repeated."""
    numbers = Numbers()
    assert [numbers.is_new(Entry("stdout", number)) for number in (1, 2, 2, 1, 3)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(Lost, match="lost a part"):
        numbers.is_new(Entry("stdout", 5))


def test_a_client_that_speaks_nonsense_ends_its_call_alone(broker, client, serve, handlers):
    serve()
    asked = call("wait")
    client.xadd(call_key(asked.call_id, "in"), {"t": "ack", "n": 1, "d": "no number"})
    client.xadd(calls_key(HOST), wire.call_fields(asked, HOST))
    until(lambda: "error" in [entry["t"] for _, entry in client.xrange(call_key(asked.call_id, "out"))])
    assert talk_to_the_end(broker, call("nothing"))[-1].kind == "end"


def test_many_calls_at_once_take_one_thread(broker, serve):
    serve()
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(Conversation(broker, HOST, call("wait"))) for _ in range(30)]
        for talk in talks:
            assert next(talk.replies()).data == b"waiting"
        assert threading.active_count() - len(talks) <= before  # each client has one, which pings


# -- a host with keys ----------------------------------------------------------------------------------


class Keys:
    """The settings of a host that listens to alice alone, and of some who call it."""

    def __init__(self, broker: Settings, folder: Path, handlers: Handlers) -> None:
        for who in ("user-alice", f"host-{HOST}"):
            signing.make_key(folder, who)
        (folder / "others").mkdir()
        signing.make_key(folder / "others", "user-alice")
        (folder / "run").mkdir()
        url = f"redis+socket://{broker.broker_socket}"
        self._plain = broker.model_copy(update={"broker_url": url, "run_dir": folder / "run"})
        self.host = self._with(folder / f"host-{HOST}.key", folder)
        self.alice, self.mallory = (self._with(one / "user-alice.key") for one in (folder, folder / "others"))
        self.nobody = self._with(None)
        self.service = CallService(self.host, lambda: handlers)

    def _with(self, key: Path | None, trusted: Path | None = None) -> Settings:
        return self._plain.model_copy(update={"signing_key": key, "trusted_keys": trusted})


@pytest.fixture
def keys(broker: Settings, client: "redis.Redis", handlers: Handlers, tmp_path: Path) -> Iterator[Keys]:
    found = Keys(broker, tmp_path, handlers)
    found.service.start()
    yield found
    found.service.stop()


def test_a_host_with_keys_answers_who_signs_and_nobody_else(keys: Keys, handlers: Handlers) -> None:
    assert talk_to_the_end(keys.alice, call("at once"))[-1].document() == {"exit_code": 7}
    for who, words in (
        (keys.nobody, "it is not signed; set signing_key"),
        (keys.mallory, "not of user-alice"),
    ):
        with pytest.raises(Refused, match=words):
            talk_to_the_end(who, call("echo"))
    assert handlers.began == ["at once"]


def test_a_call_is_answered_once_and_by_the_host_that_it_was_made_for(
    keys: Keys, handlers: Handlers, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever could read the stream of a host could else have its calls made again."""
    made: list[dict[Any, Any]] = []

    def keep(asked: Call, host: str, signer: Any) -> dict[Any, Any]:
        made.append(wire.call_fields(asked, host, signer))
        return made[0]

    monkeypatch.setattr(caller, "call_fields", keep)
    asked = call("at once")
    talk_to_the_end(keys.alice, asked)
    until(lambda: not keys.service._live)
    with pytest.raises(Refused, match="this host has taken it before; is it a replay"):
        talk_to_the_end(keys.alice, asked)
    assert handlers.began == ["at once"]

    made[:] = [wire.call_fields(call("at once"), "another", signing.signer(keys.alice))]
    with pytest.raises(Refused, match="or it was changed since"):
        talk_to_the_end(keys.alice, read_call(made[0]["call"].encode()))
    made[:] = [wire.call_fields(call("at once"), HOST, signing.signer(keys.alice))]
    made[0]["call"] = made[0]["call"].replace("at once", "echo")
    with pytest.raises(Refused, match="or it was changed since"):
        talk_to_the_end(keys.alice, read_call(made[0]["call"].encode()))
    assert handlers.began == ["at once"]
