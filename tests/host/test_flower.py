"""Flower, as an operator has it: which stage of which sandbox on which host failed, and why, in one page."""

import base64
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from tests.host.browser import Browser, browser
from tests.host.system import SERVER, System

STAGES = ("place", "netns", "network", "bundle", "container", "ready")
LOGIN = "admin:a1b2c3"
ON, OFF = (f"Events of group {{task}} {word} by remote" for word in ("enabled", "disabled"))
ROWS = """[...document.querySelectorAll('#tasks-table tbody tr[id]')].map(
  row => [...row.querySelectorAll('td')].map(cell => cell.textContent))"""
DRAWN = "document.querySelector('#tasks-table tbody tr') && jQuery.active === 0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status(url: str, login: str = "", body: bytes | None = None) -> int:
    """Of the answer; 0 if there is none."""
    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
    request = urllib.request.Request(url, body, headers)  # noqa: S310 - our own URL
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - our own URL
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def rows_of(page: Browser, url: str, search: str, count: int, system: System) -> list[list[str]]:
    """The page's rows for a search, once there are `count`: the page itself asks only when it is opened."""
    found: list[list[str]] = []

    def are_there() -> bool:
        page.open(f"{url}/tasks")
        page.until(DRAWN)
        page.run(f"jQuery('#tasks-table').DataTable().search({json.dumps(search)}).draw()")
        page.until(DRAWN)
        found[:] = page.run(f"return {ROWS}")
        return len(found) >= count

    system.wait_until(are_there, 20, f"{count} rows for {search}")
    return found


def test_the_page_shows_what_was_done_where_and_what_failed_why(chromium, make_system, tmp_path, artefacts):
    """Rows read `stage · sandbox · host`; a failed one has the words of the plugin, runsc or the probe."""
    system = make_system(FLOWER_BASIC_AUTH=LOGIN)
    port = free_port()
    system.up = ("--flower", "--flower-port", str(port))
    system.faulty_plugin("ADD exit1")
    system.network("broken", chain=("faulty",))
    system.start()
    url = f"http://127.0.0.1:{port}"
    system.wait_until(lambda: ON in system.log(), 30, "word of Flower to the worker")

    (well,) = system.run("--wait", *SERVER)
    (without_network,) = system.run("--network", "broken", "--", "sleep", "60")
    (without_program,) = system.run("--", "/no/such/program")
    (silent,) = system.run("--ready", "tcp:1", "--ready-timeout", "1", "--", "sleep", "60")
    system.wait([without_network, without_program, silent], "terminal", 30)

    with browser(tmp_path) as page:
        page.open(url.replace("//", f"//{LOGIN}@"))
        rows = rows_of(page, url, f"state:SUCCESS args:{well}", len(STAGES), system)
        page.screenshot(artefacts / "flower-launched.png")
        assert {row[0] for row in rows} == {f"{stage} · {well} · test" for stage in STAGES}

        rows_of(page, url, "state:FAILURE", 3, system)
        page.run("document.querySelector('[data-task-state=FAILURE]').click()")
        page.until(DRAWN)
        failed = {row[0]: row[2] for row in page.run(f"return {ROWS}")}
        page.screenshot(artefacts / "flower-failed.png")
        assert set(failed) == {
            f"network · {without_network} · test",
            f"container · {without_program} · test",
            f"ready · {silent} · test",
        }
        assert "CNI ADD by plugin faulty" in failed[f"network · {without_network} · test"]
        assert "no such moon" in failed[f"network · {without_network} · test"]
        assert "/no/such/program" in failed[f"container · {without_program} · test"]
        assert "no answer to tcp:1 within 1 s" in failed[f"ready · {silent} · test"]
        assert "Traceback" not in str(failed)

        page.run("document.querySelector('#tasks-table tbody a[href*=\"/task/\"]').click()")
        page.until("document.querySelector('#task-page .task-traceback-copy')")
        page.screenshot(artefacts / "flower-task.png")

    assert {path: status(url + path) for path in ("/", "/tasks", "/broker", "/metrics", "/api/tasks")} == {
        "/": 401,
        "/tasks": 401,
        "/broker": 401,
        "/metrics": 401,
        "/api/tasks": 401,
    }, "without a password"
    assert status(url + "/metrics", LOGIN) == 200
    assert status(url + "/api/task/send-task/sandbatch.unwind", LOGIN, b"{}") == 403, "it is to read"

    system.cli("rm", "--all")
    assert system.audit() == []
    system.stop()
    assert status(url + "/healthcheck") == 0, "Flower ends with `up`"


def test_flower_that_ends_leaves_no_events(clean_system: System):
    """A worker sends events for who reads them: they cost a third of its main process."""
    flower = flower_of(clean_system)

    flower.terminate()

    assert flower.wait(10) == 0
    clean_system.wait_until(lambda: OFF in clean_system.log(), 10, "word of Flower to the worker")
    assert "Traceback" not in (clean_system.folder / "flower.log").read_text()


def test_flower_ends_though_its_broker_has_gone(make_system):
    """Its threads wait for the broker for ever, and Python would wait for them."""
    system = make_system()
    system.start()
    flower = flower_of(system)
    system.stop()
    log = system.folder / "flower.log"
    system.wait_until(lambda: "Failed to capture events" in log.read_text(), 10, "word of the lost broker")

    flower.terminate()

    assert flower.wait(10) == 0
    assert "the workers go on to send events" in log.read_text()


def flower_of(system: System) -> "subprocess.Popen[bytes]":
    """A `sandbatch flower` that has turned the worker's events on."""
    argv = [sys.executable, "-m", "cli", "flower", "--port", str(free_port())]
    with (system.folder / "flower.log").open("wb") as log:
        flower = subprocess.Popen(argv, env=system.environment, stdout=log, stderr=log)
    try:
        system.wait_until(lambda: ON in system.log(), 30, "word of Flower to the worker")
    except BaseException:
        flower.kill()
        raise
    return flower


def test_up_starts_nothing_where_flower_could_not(clean_system: System):
    """Not even a look at the host comes before it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in (("up", "--flower", "--flower-port", port), ("flower", "--port", port)):
            done = clean_system.cli(*command, check=False)
            assert done.returncode == 2
            assert (
                f"127.0.0.1, port {port}: Flower cannot listen there: Address already in use" in done.stderr
            )
