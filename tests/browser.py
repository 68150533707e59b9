"""A real browser for tests: Chromium, where it is installed, driven over a pipe in its own protocol (DevTools), or told to write down a page."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (package chromium)")
_ABOVE_STANDARD = 10
"""Pipes get numbers from here on, so that they can be put at 3 and 4, where the browser looks for them."""


class Tab:
    """One tab of a browser of its own. What it asks of the network, what its policy refuses and what its console says are kept.

    Args:
        folder: for its profile.
        size: of the window, pixels.

    Attributes:
        requested: addresses that were asked for.
        complaints: errors and violations of the content policy, as the console says them.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1200, 900)) -> None:
        assert CHROMIUM is not None
        (there, self._commands), (self._answers, back) = _pipe(), _pipe()
        flags = [*FLAGS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", CHROMIUM, *flags,
             "--remote-debugging-pipe", "about:blank"],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self._held, self._number, self._session = b"", 0, None
        self.requested: list[str] = []
        self.complaints: list[str] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def open(self, address: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it becomes."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < ends, (
                f"not within {seconds:g} s: {condition}\n{self.run('document.body.innerText')}"
            )
            time.sleep(0.03)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key, one of `_KEYS`, where the focus is."""
        code, text = _KEYS[key]
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Insert a text where the focus is."""
        self.call("Input.insertText", text=text)

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input, as the dialogue of the system does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """Write down what is seen of the page, all of it."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message)

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attach(self) -> None:
        (target, *_) = [
            each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def _read(self, seconds: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._answers], [], [], seconds)[0], "the browser does not answer"
            piece = os.read(self._answers, 2**16)
            assert piece, "the browser has ended"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, message: dict[str, Any]) -> None:
        method, said = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(said["request"]["url"])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"].get("exception", said)))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.complaints.append(str(said["args"]))


_KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
"""Name -> code of a key, and the text that it makes."""


def _pipe() -> tuple[int, int]:
    """Ends to read from and to write to, with numbers beyond those that the browser uses."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _ABOVE_STANDARD) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]
