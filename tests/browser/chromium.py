"""A headless Chromium, as far as the tests need one: open a page, ask it things, point at places, take a picture.

https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

START_S = 60


class Browser:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; what the page complains of or asks for meanwhile is kept."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), START_S)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    async def open(self, place: Path | str) -> None:
        """Open a file or a URL, in a document of its own, and wait until all of it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.do(f"{domain}.enable")
        url = place.absolute().as_uri() if isinstance(place, Path) else place
        # From another hash of the same page it would only be a jump.
        await self.do("Page.navigate", url="about:blank")
        await self.do("Page.navigate", url=url)
        await self.wait_for(f"document.readyState === 'complete' && location.protocol === '{url.partition(':')[0]}:'")

    async def wait_for(self, expression: str) -> Any:
        """Wait until an expression is true on the page, and return what it then is."""
        for _ in range(10 * START_S):
            # An element is an empty object by value.
            if await self.ask(f"!!({expression})"):
                return await self.ask(expression)
            await asyncio.sleep(0.05)
        raise AssertionError(f"{expression} was never true; on the page: {await self.ask('document.body.innerText')}")

    async def press(self, *keys: str) -> None:
        """Press keys one after the other, by the names that `KeyboardEvent.key` has."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            about = {"key": key, "windowsVirtualKeyCode": {"Enter": 13, "Escape": 27}.get(key, 0)}
            await self.do("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            await self.do("Input.dispatchKeyEvent", type="keyUp", **about)

    async def click(self, element: str) -> None:
        """Click the middle of an element, given as an expression, where it is seen."""
        await self.point_at(element)
        x, y = await self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getClientRects()[0])")
        for kind in ("mousePressed", "mouseReleased"):
            await self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def ask(self, expression: str) -> Any:
        """Return what an expression is on the page."""
        reply = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def point_at(self, element: str) -> None:
        """Move the mouse over the middle of an element, given as an expression."""
        await self.ask(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = await self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getClientRects()[0])")
        await self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def show_as(self, width: int, scheme: str) -> None:
        """Take the width of a screen (a phone's has a mobile browser), and a color scheme."""
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        await self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def look_at(self, element: str) -> bytes:
        """Return an element, given as an expression, as PNG."""
        x, y, width, height = await self.ask(
            f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])({element}.getBoundingClientRect())"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        reply = await self.do("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(reply["data"])

    async def picture(self) -> bytes:
        """Return the page as PNG."""
        return base64.b64decode((await self.do("Page.captureScreenshot"))["data"])

    def _hear(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Log.entryAdded" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])


@asynccontextmanager
async def running(program: str) -> AsyncIterator[Browser]:
    """Start a browser on a free port of loopback; nothing of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="rt-chromium-", ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", "--window-size=1200,900", f"--user-data-dir={home}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            port = await asyncio.wait_for(asyncio.to_thread(_port, process), START_S)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    tab = next(tab for tab in await reply.json() if tab["type"] == "page")
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Browser(socket)
        finally:
            process.terminate()
            process.wait(START_S)


def _port(process: "subprocess.Popen[str]") -> int:
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
            return int(match[1])
    raise AssertionError(f"Chromium ended with {process.wait()} before it listened")
