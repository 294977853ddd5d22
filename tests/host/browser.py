"""A headless Chromium, driven by W3C WebDriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",  # it is root, and its pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,900",
)
# Resolves once ARGUMENT is true; looks again at every change of the page.
UNTIL = """
const done = arguments[arguments.length - 1];
const look = () => { try { return ARGUMENT } catch (error) { return null } };
const found = look();
if (found) { done(found) } else {
  const watch = new MutationObserver(() => {
    const now = look();
    if (now) { watch.disconnect(); done(now) }
  });
  watch.observe(document, {childList: true, subtree: true, attributes: true, characterData: true});
}
"""


class Browser:
    """One window."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        options = {"args": [*FLAGS], "binary": "/usr/bin/chromium"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "timeouts": {"script": 15_000}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", self._session + "/url", {"url": url})

    def until(self, script: str) -> Any:
        """The value of a JavaScript expression, once it is true."""
        body = {"script": UNTIL.replace("ARGUMENT", script), "args": []}
        return self._ask("POST", self._session + "/execute/async", body)

    def run(self, script: str) -> Any:
        return self._ask("POST", self._session + "/execute/sync", {"script": script, "args": []})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", self._session + "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", self._session)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, method=method)  # noqa: S310 - our own URL
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own URL
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from None


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium with all that it writes below `folder`; nothing of it runs on."""
    env = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    argv = ["chromedriver", "--port=0"]
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as driver:
        try:
            assert driver.stdout is not None
            port = (
                next(line for line in driver.stdout if "successfully on port" in line).split()[-1].strip(".")
            )
            page = Browser(f"http://127.0.0.1:{port}")
            try:
                yield page
            finally:
                page.close()
        finally:
            os.killpg(driver.pid, signal.SIGKILL)
