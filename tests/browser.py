"""Headless Chromium through the DevTools protocol, over a pipe: no package is needed, only the browser itself.

    with Browser() as browser:
        browser.open("http://127.0.0.1:8000/", width=375, dark=True)
        browser.run("document.title")              # the value of JavaScript; a promise is awaited
        browser.screenshot("page.png")
        browser.faults, browser.requests           # what the console reports, and the addresses that were asked for
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT = "there is no Chromium here (chromium, chromium-browser or google-chrome)"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync"]


class Browser:
    """A tab of a browser of its own. seconds: how long it may take to answer."""

    def __init__(self, seconds: float = 30):
        self.seconds = seconds
        self.faults: list[str] = []
        self.requests: list[str] = []
        self._loaded: set[str] = set()  # documents

    def __enter__(self) -> Browser:
        self._folder = TemporaryDirectory(ignore_cleanup_errors=True)
        (to_read, self._out), (self._in, to_write) = os.pipe(), os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._folder.name}", "--remote-debugging-pipe", "about:blank"]
        redirect = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'  # the two descriptors that it reads and writes
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, *command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()

    def open(self, url: str, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        """Wait until the page is loaded."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=scheme)
        document = self.call("Page.navigate", url=url)["loaderId"]
        end = time.monotonic() + self.seconds
        while document not in self._loaded:
            self._receive(end)

    def run(self, script: str) -> object:
        """The value of a JavaScript expression. RuntimeError if it throws."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def screenshot(self, file: str | Path) -> None:
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: object) -> dict:
        """A command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end, number = time.monotonic() + self.seconds, self._number
        while (answer := self._receive(end)).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self, end: float) -> dict:
        """The next message. Events are noted."""
        os.set_blocking(self._in, False)
        while b"\0" not in self._buffer:
            try:
                part = os.read(self._in, 1 << 16)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"Chromium did not answer within {self.seconds:g} seconds") from None
                time.sleep(0.002)
                continue
            if not part:
                raise RuntimeError("Chromium ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, details: dict) -> None:
        if event == "Page.lifecycleEvent" and details["name"] == "load":
            self._loaded.add(details["loaderId"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.faults.append(str(details["exceptionDetails"])[:500])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.faults.append(details["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.faults.append("a dialog: " + details["message"])
