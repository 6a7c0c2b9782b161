"""Chromium without a window, told what to do through a pipe (the DevTools protocol)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--no-first-run", "--remote-debugging-pipe",
)  # fmt: skip


@dataclass
class Browser:
    """A page of a browser; what it is told is read from descriptor 3, its answers go to 4."""

    to: Any
    back: Any
    session: str = ""
    number: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Have something done and return its result; what happens meanwhile is in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        return dict(json.loads(content))

    def open(self, address: str, key: str, width: int, height: int = 900) -> None:
        """Open a page with a key as its password, in a window of so many pixels."""
        coded = base64.b64encode(f"me:{key}".encode()).decode()
        self.call("Network.enable")
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {coded}"})
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url=address)
        self.run("new Promise(done => document.readyState == 'complete' ? done() : onload = done)")

    def run(self, script: str) -> Any:
        """Return what a script on the page gives, when it is there."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """Return a picture of the whole page, as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    @property
    def complaints(self) -> list[str]:
        """What the browser has found wrong with the page."""
        entries = [event["params"] for event in self.events if event["method"] == "Log.entryAdded"]
        thrown = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        return [one["entry"]["text"] for one in entries] + [str(one["params"]) for one in thrown]


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    from_us, to_us = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$0" "$@" 3<&{from_us[0]} 4>&{to_us[1]}'
        process = subprocess.Popen(
            ["bash", "-c", script, program, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(from_us[0], to_us[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us[0])
        os.close(to_us[1])
        with os.fdopen(from_us[1], "wb") as to, os.fdopen(to_us[0], "rb") as back:
            found = Browser(to, back)
            target = found.call("Target.createTarget", url="about:blank")["targetId"]
            attached = found.call("Target.attachToTarget", targetId=target, flatten=True)
            found.session = attached["sessionId"]
            try:
                yield found
            finally:
                process.terminate()
                process.wait(30)
