"""A headless Chromium, spoken to in its DevTools protocol. aiohttp comes with `datasets`."""

import asyncio
import itertools
import shutil
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# A machine that is busy may need as long to start it.
PATIENCE_S = 120


class Page:
    """
    One page of the browser.

    Attributes:
        errors (`list[str]`): What the page's scripts raised.
    """

    def __init__(self, socket, downloads):
        self.socket, self.downloads, self.errors = socket, downloads, []
        self._numbers = itertools.count(1)

    async def send(self, method, **params):
        """Sends a command, and returns its result."""
        number = next(self._numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json()
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression):
        """The value of an expression in JavaScript."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def press(self, key, code, text=""):
        """Presses a key and lets it go."""
        kind = "keyDown" if text else "rawKeyDown"
        for each in (kind, "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=each, key=key, windowsVirtualKeyCode=code, text=text)

    async def downloaded(self, name):
        """The content of a file, when its download is complete."""
        path = self.downloads / name
        await wait_for(path.exists)
        return path.read_bytes()


async def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "the browser does not answer"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def opened(path: Path, folder: Path, width: int = 1280, height: int = 900):
    """
    A [`Page`] that shows a file.

    Args:
        path (`Path`): The file.
        folder (`Path`): An empty folder for the browser's profile and what it downloads.
        width and height (`int`, *optional*): Size of the window in pixels.
    """
    profile, downloads = folder / "profile", folder / "downloads"
    downloads.mkdir(parents=True)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
    process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        await wait_for(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2)
        address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/json") as answer:
                targets = await answer.json()
            (target,) = [target for target in targets if target["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket, downloads)
                await page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
                await page.send("Runtime.enable")
                await page.send("Emulation.setFocusEmulationEnabled", enabled=True)
                await page.send("Page.navigate", url=path.as_uri())
                while await page.value("document.readyState + location.protocol") != "completefile:":
                    await asyncio.sleep(0.05)
                yield page
                await page.send("Browser.close")
    finally:
        process.kill()
        process.wait()
