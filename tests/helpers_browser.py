"""Chromium, driven by its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) without a library."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")


class Browser:
    """One tab; ``errors`` is what its console said or threw, ``requests`` the addresses that it asked for."""

    def __init__(self, folder: Path) -> None:
        words = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's sandbox refuses root
        words += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([CHROMIUM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number, self._events = 0, []
        self._socket, self._session = self.loop.run_until_complete(self._connect(folder))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    async def _connect(self, folder: Path) -> tuple[aiohttp.ClientWebSocketResponse, aiohttp.ClientSession]:
        ready, ends = folder / "DevToolsActivePort", time.monotonic() + 120
        while not (ready.exists() and ready.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < ends, "chromium did not start"
            await asyncio.sleep(0.05)
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{ready.read_text().split()[0]}/json") as answer:
            tab = next(target for target in await answer.json() if target["type"] == "page")
        return await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0), session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        return self.loop.run_until_complete(asyncio.wait_for(self._send(method, params), 120))

    async def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(" ".join(str(word.get("value")) for word in params["args"]))
        elif method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, *, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """Load a file into a window of this size, and wait until it has been loaded."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.media(scheme=scheme)
        self._events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self.send("Runtime.evaluate", expression="1")

    def media(self, kind: str = "", scheme: str = "light") -> None:
        """What style sheets see: kind "print" or the screen's, and the preferred colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=kind, features=features)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def choose(self, selector: str, value: str | int) -> None:
        """Choose in a select element, as a person does."""
        self.js(
            f"(() => {{ const s = document.querySelector({selector!r}); s.value = {str(value)!r}; "
            "s.dispatchEvent(new Event('change', {bubbles: true})); return 1; })()"
        )

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.loop.run_until_complete(self._end())
        self.loop.close()
        self.process.terminate()
        self.process.wait(30)

    async def _end(self) -> None:
        await self._socket.close()
        await self._session.close()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in ``folder``, closed at the end."""
    tab = Browser(folder)
    try:
        yield tab
    finally:
        tab.close()
