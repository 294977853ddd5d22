"""gVisor's CNI tutorial, three times at once, start to end: what `make demo` shows."""

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

from cli import render
from cli.client import Client
from cli.output import out, say
from tasks.broker import is_alive
from tasks.state import State
from tasks.submit import remove, submit
from worker.audit import audit
from worker.errors import BrokerError, HostNotReady, SandbatchError
from worker.process import last_words
from worker.settings import Settings
from worker.setup import setup
from worker.spec import make_spec
from worker.stages import STAGES

COUNT = 3
PORT = 8000
START_S = 60.0
END_S = 60.0
ANSWER = "Hello World!"


def run_demo(settings: Settings) -> int:
    """Install what is missing, launch, fetch, show, remove, audit; 0 only if all of it went well."""
    setup(settings, say)
    with _host(settings):
        client = Client(settings)
        spec = make_spec(
            args=["python3", "-m", "http.server", str(PORT)],
            cwd="/var/www/html",
            ready=f"http:{PORT}/",
            host=settings.host,
            labels={"demo": "tutorial"},
        )
        client.validate(spec)
        sender = client.app()
        _, ids = submit(sender, client.record, settings, [spec] * COUNT)
        try:
            answers = _launch_and_fetch(client, ids)
        finally:
            remove(sender, client.record, client.record.get_all(ids))
            client.wait(ids, "gone", END_S)
    findings = audit(settings)
    for one in findings:
        say(f"left over: {one.kind} {one.name}: {one.problem} ({one.detail})")
    say("audit: clean" if not findings else f"audit: {len(findings)} found")
    return 0 if answers == COUNT and not findings else 1


def _launch_and_fetch(client: Client, ids: list[str]) -> int:
    say(f"launching {len(ids)} sandboxes: python3 -m http.server {PORT} in /var/www/html")
    client.wait(ids, "running", START_S)
    rows, answers = client.record.get_all(ids), 0
    for row in rows:
        if row["state"] != State.RUNNING:
            error = row["error"] or {"stage": row["stage"], "message": f"is {row['state']}"}
            say(f"sandbatch: {row['id']}: {error['stage']}: {error['message']}")
            continue
        with urllib.request.urlopen(f"http://{row['ip']}:{PORT}/", timeout=10) as answer:
            text = answer.read().decode().strip()
        out.print(f"{row['id']}  http://{row['ip']}:{PORT}/  {text}")
        answers += text == ANSWER
    out.print(_times(rows))
    return answers


def _times(rows: list[dict[str, Any]]) -> Any:
    seen = {run["name"] for row in rows for run in row["stages"]}
    names = [stage.name for stage in STAGES if stage.name in seen]
    table = render.table("SANDBOX", *(f"{name} s" for name in names), "SUM s")
    for row in rows:
        seconds = {run["name"]: run["duration_s"] or 0.0 for run in row["stages"] if run["verb"] == "do"}
        cells = [f"{seconds[name]:.3f}" if name in seconds else "-" for name in names]
        table.add_row(row["id"], *cells, f"{sum(seconds.values()):.3f}")
    return table


@contextlib.contextmanager
def _host(settings: Settings) -> Iterator[None]:
    """This machine's worker: the one that runs, or one of ours, stopped afterwards."""
    if not settings.is_broker_embedded or is_alive(settings):
        if settings.host not in Client(settings).record.live_hosts():
            raise HostNotReady(
                f"host {settings.host}", "a broker runs, but no worker", "start sandbatch worker"
            )
        say(f"using the worker of host {settings.host} that runs already")
        yield
        return
    settings.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    log_path = settings.run_dir / "demo.log"
    with log_path.open("w") as log:
        argv = [sys.executable, "-m", "cli", "up", "--host", settings.host]
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_host(settings, process)
            yield
        except HostNotReady as error:
            words = last_words(log_path.read_text())
            raise HostNotReady(error.what, f"{error.why}: {words}", f"see {log_path}") from None
        finally:
            process.terminate()
            process.wait()


def _wait_for_host(settings: Settings, process: "subprocess.Popen[bytes]") -> None:
    """Until the worker's first heartbeat, or its end."""
    for _ in range(int(START_S * 10)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            raise HostNotReady("sandbatch up", f"ended with status {process.returncode}", "")
        with contextlib.suppress(BrokerError, SandbatchError):
            if is_alive(settings) and settings.host in Client(settings).record.live_hosts():
                return
    raise HostNotReady("sandbatch up", f"no heartbeat within {START_S:g} s", "")
