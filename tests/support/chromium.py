"""A real browser for tests: headless Chromium, driven over chromedriver's plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-quic", "--no-first-run", "--no-default-browser-check", "--disable-default-apps"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
    ),
    *("--disable-features=OptimizationHints,MediaRouter,Translate", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


def missing() -> str | None:
    """Why there is no browser, None if there is one."""
    if not _binary():
        return "no chromium binary (apt-get install chromium chromium-driver)"
    return None if shutil.which("chromedriver") else "no chromedriver (apt-get install chromium-driver)"


def _binary() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One window of it."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of that size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", features=scheme)
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._call("POST", "/url", url=page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page; elements are handed on."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def find(self, selector: str) -> list[dict[str, str]]:
        """The elements of a CSS selector."""
        found: list[dict[str, str]] = self._call("POST", "/elements", using="css selector", value=selector)
        return found

    def point_at(self, element: dict[str, str]) -> None:
        """Moves the mouse over an element, scrolled to first."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "origin": element, "x": 0, "y": 0, "duration": 0}
        self._act("mouse", "pointer", [move])

    def touch(self, element: dict[str, str]) -> None:
        """Taps on an element, scrolled to first."""
        self.run("arguments[0].scrollIntoView({block: 'start'})", element)
        move = {"type": "pointerMove", "origin": element, "x": 0, "y": 0, "duration": 0}
        tap = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._act("touch", "pointer", tap)

    def press(self, *keys: str) -> None:
        """Presses keys one after the other."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._act("keyboard", "key", strokes)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def messages(self, kind: str = "browser") -> list[dict[str, Any]]:
        """What was logged since the last call: the console's, or `performance`, network requests among it."""
        logged: list[dict[str, Any]] = self._call("POST", "/se/log", type=kind)
        return logged

    def requests(self, page: str) -> list[str]:
        """What a page has asked for since the last call, itself first."""
        logged = [json.loads(entry["message"])["message"] for entry in self.messages("performance")]
        asked = [m["params"] for m in logged if m["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked if one["documentURL"] == page]

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def _act(self, name: str, kind: str, actions: list[dict[str, Any]]) -> None:
        source: dict[str, Any] = {"type": kind, "id": name, "actions": actions}
        if kind == "pointer":
            source["parameters"] = {"pointerType": name}
        self._call("POST", "/actions", actions=[source])

    def _call(self, method: str, path: str, **body: Any) -> Any:
        return _request(method, self._session + path, body if method == "POST" else None)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A fresh browser with its profile in a folder; gone when the block is left."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )
    try:
        assert driver.stdout is not None
        port = next(
            line.split("on port ")[1].split(".")[0]
            for line in driver.stdout
            if "successfully on port" in line
        )
        root = f"http://127.0.0.1:{port}"
        options = {"binary": _binary(), "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        asked = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        answer = _request("POST", f"{root}/session", {"capabilities": {"alwaysMatch": asked}})
        session = f"{root}/session/{answer['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _request("DELETE", session, None)
    finally:
        driver.terminate()
        driver.communicate()


def _request(method: str, address: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    # Straight to this machine, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{method} {address}: {error.read().decode()[:500]}") from None
