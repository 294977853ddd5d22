"""Flower on the same broker: it finds the worker, turns Celery's events on, and shows what was done where."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from tests.host.system import SERVER, System


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> object:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own URL
            return json.loads(answer.read())
    except (urllib.error.URLError, OSError):
        return None


def test_flower_shows_stage_sandbox_and_host(clean_system: System):
    """An operator reads which stage of which sandbox ran on which host."""
    port = free_port()
    env = {**clean_system.environment, "FLOWER_UNAUTHENTICATED_API": "1"}
    argv = [sys.executable, "-m", "cli", "flower", "--port", str(port)]
    with (clean_system.folder / "flower.log").open("wb") as log:
        flower = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api"
    try:
        clean_system.wait_until(lambda: get(f"{url}/workers?refresh=1"), 30, "answer of Flower")
        told = "Events of group {task} enabled by remote"
        clean_system.wait_until(lambda: told in clean_system.log(), 30, "word of Flower to the worker")
        (container_id,) = clean_system.run("--wait", *SERVER)
        wanted = {
            f"{stage} · {container_id} · test"
            for stage in ("place", "netns", "network", "bundle", "container", "ready")
        }

        def shown() -> set[str]:
            tasks = get(f"{url}/tasks")
            assert isinstance(tasks, dict)
            return {task["args"] for task in tasks.values() if task["state"] == "SUCCESS"}

        clean_system.wait_until(lambda: len(shown()) >= len(wanted), 15, "six tasks in Flower")
        assert {text.replace("any host", "test") for text in shown()} == wanted
    finally:
        os.kill(flower.pid, 15)
        flower.wait(15)


def test_flower_is_not_opened_to_others_without_a_password(clean_system: System):
    """It can start any task on every host."""
    done = clean_system.cli("flower", "--address", "0.0.0.0", check=False)
    assert done.returncode == 2
    assert "FLOWER_BASIC_AUTH" in done.stderr
