"""A headless Chromium that tests open pages in, driven through the WebDriver protocol of chromedriver (W3C)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import free_port

PACKAGES = ("chromium", "chromium-driver")
INSTALLS = "INSTALL_CHROMIUM"
"""The variable that lets tests install Debian's packages; `.ci/run` sets it."""


def missing_browser() -> str:
    """Why there is no browser; empty where there is one. Installs it as root on Debian where `INSTALLS` is set."""
    found = shutil.which("chromium") and shutil.which("chromedriver")
    if not found and os.environ.get(INSTALLS) and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "timeout": 400}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", *words], env=environment, **quiet)  # type: ignore[call-overload]
        found = shutil.which("chromium") and shutil.which("chromedriver")
    if found:
        return ""
    return f"no chromium and chromedriver: apt-get install {' '.join(PACKAGES)}, or set {INSTALLS}=1 as root on Debian"


class Page:
    """A window; `run` gives what JavaScript returns, as JSON says it."""

    def __init__(self, address: str) -> None:
        self._address = address

    def open(self, file: Path, fragment: str = "") -> None:
        """Loads a file, and waits until it is loaded."""
        url = f"{file.absolute().as_uri()}#{fragment}"
        # With another fragment alone the page would not be loaded again.
        self._post("url", {"url": "about:blank"})
        self._post("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Clicks where the element is, as a mouse does; fails if it is not to be seen there."""
        found = self._post("element", {"using": "css selector", "value": selector})
        self._post(f"element/{next(iter(found.values()))}/click", {})

    def press(self, selector: str, key: str) -> None:
        """Presses a key (as WebDriver numbers them) in the element."""
        found = self._post("element", {"using": "css selector", "value": selector})
        self._post(f"element/{next(iter(found.values()))}/value", {"text": key})

    def errors(self) -> list[str]:
        """What the browser's console says is wrong."""
        found = self._post("se/log", {"type": "browser"})
        return [one["message"] for one in found if one["level"] == "SEVERE"]

    def _post(self, path: str, content: Any) -> Any:
        return _send(f"{self._address}/{path}", content)


def _send(url: str, content: Any, method: str = "POST") -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), method=method)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """A window, which is closed with its browser at the end; it reaches no network."""
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    # Root in a container has no sandbox, and little shared memory; no name resolves.
    options = {
        "args": [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--window-size={width},{height}", "--host-resolver-rules=MAP * ~NOTFOUND"),
        ]
    }
    capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    root, session = f"http://127.0.0.1:{port}/session", ""
    try:
        deadline = time.monotonic() + 60
        while not session:
            try:
                made = _send(root, {"capabilities": {"alwaysMatch": capabilities}})
                session = f"{root}/{made['sessionId']}"
            except urllib.error.URLError:
                assert driver.poll() is None and time.monotonic() < deadline, "chromedriver is gone"
                time.sleep(0.2)
        yield Page(session)
    finally:
        with contextlib.suppress(OSError, AssertionError):
            if session:
                _send(session, {}, "DELETE")
        driver.terminate()
        try:
            driver.wait(20)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
