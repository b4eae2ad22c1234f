"""A headless Chromium, driven over its debugging protocol; nothing is downloaded for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import pytest

from edit_ray.page.run_server import HLS_JS

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

AXE = HLS_JS.parents[2] / "axe-core" / "axe.min.js"
"""axe-core, where `make page` installs it."""

_FINDINGS = "axe.run().then((r) => r.violations.map((v) => [v.id, v.impact, v.nodes.map((n) => n.html).slice(0, 3)]))"


def require(name: str, there: bool, says: str) -> None:
    """Skips the test where something is missing, unless $EDIT_RAY_REQUIRE (comma-separated) names it."""
    if not there:
        required = name in os.environ.get("EDIT_RAY_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(says)


class Page:
    """One page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.errors = []  # what the browser's console shows as one, once `Runtime` and `Log` are enabled

    async def call(self, method: str, **parameters):
        number = next(self._ids)
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            reply = json.loads((await self._socket.receive(timeout=30)).data)
            self._note(reply)
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    def _note(self, message) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"].get("exception", told["exceptionDetails"])["description"])
        if message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    async def value(self, expression: str):
        """What a JavaScript expression gives."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def until(self, expression: str, timeout_s: float) -> None:
        """Waits until the expression is true."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.value(expression):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            text = await self.value("document.body.innerText")
            raise AssertionError(f"{expression} did not come true within {timeout_s} s on: {text}") from None

    async def open(self, url: str, script: str = "") -> None:
        """Loads a page, with a script before its own, and notes what its console shows as errors."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'", 30)

    async def check_look(self) -> None:
        """No finding of axe-core and nothing wider than the window, on a phone and a desktop, light and dark."""
        await self.value(f"{AXE.read_text()};0")
        for width, height in ((390, 844), (1280, 900)):
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            await self.call("Emulation.setDeviceMetricsOverride", **screen)
            for theme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": theme}]
                await self.call("Emulation.setEmulatedMedia", features=features)
                assert await self.value(_FINDINGS) == [], (width, theme)
            assert await self.value("document.documentElement.scrollWidth") <= width

    async def screenshot(self, path: Path) -> None:
        reply = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(reply["data"]))


@contextlib.asynccontextmanager
async def page(folder: Path, width: int = 900, height: int = 900):
    """An empty page of a new browser, whose files are below `folder`."""
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio")
    quiet = ("--no-first-run", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required")
    places = (f"--user-data-dir={folder}", "--remote-debugging-port=0", f"--window-size={width},{height}")
    with (folder.parent / "chromium.log").open("w") as log:
        browser = subprocess.Popen([PROGRAM, *options, *quiet, *places, "about:blank"], stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not (folder / "DevToolsActivePort").exists():
                assert browser.poll() is None, (folder.parent / "chromium.log").read_text()
                await asyncio.sleep(0.05)
            port = (folder / "DevToolsActivePort").read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                (target,) = [target for target in await reply.json() if target["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
                yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(20)


async def picture(url: str, ready: str, file: Path) -> None:
    """Takes the picture of a page once a JavaScript expression is true."""
    with tempfile.TemporaryDirectory() as folder:
        async with page(Path(folder) / "browser", 900, 860) as opened:
            await opened.call("Page.navigate", url=url)
            await opened.until("document.readyState === 'complete' && location.href !== 'about:blank'", 30)
            await opened.until(ready, 60)
            await opened.screenshot(file)


if __name__ == "__main__":  # e.g. of `edit-ray serve RUN`: URL "document.querySelector('video').currentTime > 4" FILE
    asyncio.run(picture(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
