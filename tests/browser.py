"""Headless Chromium through its driver's HTTP protocol (W3C WebDriver), with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PATIENCE_S = 600
TAB, ENTER, SPACE, CONTROL = "\ue004", "\ue007", " ", "\ue009"


class Browser:
    """A page in a browser."""

    def __init__(self, session: str):
        self._session = session

    def go(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page and return what it returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Press keys one after the other; those of one string together."""
        actions = []
        for chord in keys:
            actions += [{"type": "keyDown", "value": key} for key in chord]
            actions += [{"type": "keyUp", "value": key} for key in reversed(chord)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def size(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def wait(self, script: str, wanted: Callable[[Any], bool] = bool) -> Any:
        """Run a script until it returns what is wanted."""
        until = time.monotonic() + PATIENCE_S
        while not wanted(found := self.run(script)):
            assert time.monotonic() < until, f"{script} still returns {found!r}"
            time.sleep(0.05)
        return found

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return call(method, self._session + path, body)


def call(method: str, address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)["value"]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; skip the test where there is none."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    session = None
    try:
        assert process.stdout is not None
        while not (port := re.search(r"started successfully on port (\d+)", process.stdout.readline())):
            assert process.poll() is None
        options = {
            "binary": binary,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        address = f"http://127.0.0.1:{port[1]}/session"
        session = f"{address}/{call('POST', address, wanted)['sessionId']}"
        yield Browser(session)
    finally:
        if session is not None:
            with contextlib.suppress(urllib.error.URLError):
                call("DELETE", session)
        process.terminate()
        process.communicate()
