"""A headless Chromium that a test drives over the DevTools protocol, through two pipes; no driver is needed.

    with Browser(folder) as page:
        page.open("http://127.0.0.1:7860/")
        page.wait("document.querySelector('textarea')")

`page.requests` are the addresses that it asked for, `page.told` what its console said.
"""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from report_content import CHROMIUM

QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --remote-debugging-pipe
--disable-background-networking --disable-component-update --disable-sync --disable-default-apps""".split()


class Browser:
    """One page in a fresh profile."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 1000, dark: bool = False) -> None:
        self.requests: list[str] = []
        self.told: list[str] = []
        self._number, self._buffer, self._session = 0, b"", None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4
        shell = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        command = ["bash", "-c", shell, str(to_read), str(to_write), str(CHROMIUM), *QUIET]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Log", "Runtime", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.look(width, height, dark)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            assert answer is not None, f"{method}: no answer"
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Takes a size and a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression, promises awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; the page says {self.run('document.body.innerText')}"
            self._next(0.1)
        return value

    def settle(self, seconds: float = 1) -> None:
        """Waits until the page has asked and received nothing for so long.

        Gradio's page loses an event that begins in the moment in which it closes its stream of events.
        """
        while self._next(seconds) is not None:
            pass

    def choose_files(self, selector: str, *files: Path) -> None:
        """Chooses files in a file field, as its dialog would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type(self, text: str) -> None:
        """Text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """The key."""
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def picture(self, file: Path, whole: bool = True) -> None:
        """A screenshot as PNG, of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, noted where it is an event; None where none comes in time."""
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds)[0]:
                return None
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, event: dict[str, Any]) -> None:
        """Keeps what an event tells of requests and of the console."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(event["url"])
        elif method == "Log.entryAdded":
            self.told.append(event["entry"]["text"] + " " + event["entry"].get("url", ""))
        elif method == "Runtime.exceptionThrown":
            self.told.append(json.dumps(event["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
            self.told.append(" ".join(str(one.get("value", one.get("description"))) for one in event["args"]))
