"""Pages in a headless browser, controlled over its debugging pipe: what it fetches, reports and lays out.

python -m tests.chromium PAGE PICTURE.png [WIDTH [dark]]    (PAGE: a file or an address)
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SWITCHES = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
)  # fmt: skip
_ANSWER_S = 60.0
# Windows' numbers of keys, which browsers take.
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class _Navigated(Exception):
    """The page that was asked is gone: another one has begun."""


class Browser:
    """One page. `fetched`: requested URLs; `complaints`: errors of scripts, console and network."""

    def __init__(self, to: int, out: int) -> None:
        self._to, self._out = to, out
        self._ids = itertools.count(1)
        self._rest = b""
        self.fetched: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, page: Path | str, width: int, height: int = 900, dark: bool = False) -> None:
        """Load the page, a file or an address, at a window size."""
        self.resize(width, height)
        self.scheme(dark)
        self.fetched, self.complaints, self._loaded = [], [], False
        self._call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        deadline = time.monotonic() + _ANSWER_S
        while not self._loaded:
            self._next(deadline)

    def resize(self, width: int, height: int) -> None:
        """Another window size."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                   mobile=width < 600)  # fmt: skip

    def scheme(self, dark: bool) -> None:
        """Whether the user prefers dark pages."""
        wanted = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[wanted])

    def evaluate(self, script: str) -> Any:
        """Evaluate an expression in the page; the value of a promise once it is known."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, within_s: float = 120.0) -> Any:
        """Evaluate until the result is true, and return it."""
        deadline = time.monotonic() + within_s
        while not (found := self._evaluate_in_any(script)):
            assert time.monotonic() < deadline, f"not within {within_s} s: {script}; complaints: {self.complaints}"
            time.sleep(0.02)
        return found

    def _evaluate_in_any(self, script: str) -> Any:
        """None if the page gave way to another one meanwhile."""
        try:
            return self.evaluate(script)
        except _Navigated:
            return None

    def press(self, key: str) -> None:
        """Press a key, such as Tab, Enter or ArrowDown."""
        code = _KEYS[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, whole: bool = True) -> bytes:
        """The page as PNG: the whole of it, or what the window shows."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"] if whole else {}
        clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            found = self._next(deadline)
            if found.get("id") == number:
                if "navigated" in str(found.get("error", "")):
                    raise _Navigated
                assert "error" not in found, found
                return dict(found["result"])

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._out, 1 << 20)
            assert data, "the browser is gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        self._note(found.get("method", ""), found.get("params", {}))
        return found

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.fetched.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"].get("text")))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event == "Page.loadEventFired":
            self._loaded = True


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with its own profile."""
    assert BINARY, "no chromium here"
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    # The debugging pipe is descriptor 3 for commands, 4 for answers.
    script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        argv = ["bash", "-c", script, "_", BINARY, *_SWITCHES, f"--user-data-dir={profile}"]
        with subprocess.Popen(argv, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env={**os.environ, "HOME": profile},
                              start_new_session=True) as process:  # fmt: skip
            os.close(theirs_in)
            os.close(theirs_out)
            try:
                yield Browser(ours_out, ours_in)
            finally:
                os.close(ours_out)  # which ends it
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                # Its helper processes exit a little later.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                os.close(ours_in)


def main(argv: list[str]) -> int:
    with browser() as found:
        page = argv[0] if argv[0].startswith("http") else Path(argv[0])
        found.open(page, int(argv[2]) if len(argv) > 2 else 900, dark="dark" in argv[3:])
        Path(argv[1]).write_bytes(found.picture())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
