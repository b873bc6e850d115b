"""Drives a headless Chromium over the DevTools protocol, through a pair of pipes: no port, no further package."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage")  # fmt: skip


class Browser:
    """One Chromium; `open` gives a new tab. Close it when done."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "downloads").mkdir(parents=True, exist_ok=True)
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, answers)]  # clear of 3 and 4
        self._process = subprocess.Popen(
            [BROWSER, "--headless", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", *QUIET],
            preexec_fn=lambda: [os.dup2(end, to) for end, to in zip(ends, (3, 4), strict=True)],
            close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs, answers, *ends):
            os.close(end)
        self._buffer, self._count, self.events = b"", 0, []
        behaviour = {"behavior": "allow", "downloadPath": str(folder / "downloads"), "eventsEnabled": True}
        self.call("Browser.setDownloadBehavior", **behaviour)

    def call(self, method, session=None, **params):
        """Send one command and wait for its answer; what happens meanwhile is kept in `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(
            self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        number, deadline = self._count, time.monotonic() + 60
        while time.monotonic() < deadline:
            answer = self._receive(1)
            if answer and answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
        raise TimeoutError(f"{method}: Chromium did not answer within 60 s")

    def _receive(self, patience):
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], patience)[0]:
                return None
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("Chromium closed its pipe")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, address, **options):
        return Tab(self, address, **options)

    def downloaded(self, name):
        """The bytes of a file that the page has saved, once it is whole."""
        path, deadline = self.folder / "downloads" / name, time.monotonic() + 20
        while time.monotonic() < deadline:
            if path.exists() and path.stat().st_size:
                content = path.read_bytes()
                path.unlink()
                return content
            self._receive(0.05)
        raise TimeoutError(f"{name} was not saved; there are {sorted(path.parent.iterdir())}")

    def close(self):
        with contextlib.suppress(RuntimeError, OSError):
            self.call("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)


class Tab:
    """One page. `problems` are errors and warnings of its console, `requests` the addresses it asked for."""

    def __init__(self, browser, address, *, width=1280, height=900, dark=False, touch=False):
        self.browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height, touch)
        self.media(dark)
        self.go(address)

    def go(self, address):
        """Load an address, until all of it is there."""
        failed = self.call("Page.navigate", url=address).get("errorText")
        if failed:
            raise RuntimeError(f"{address}: {failed}")
        self.until("document.readyState === 'complete'")

    def call(self, method, **params):
        return self.browser.call(method, self._session, **params)

    def size(self, width, height, touch=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )

    def media(self, dark=False, kind=""):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def run(self, script):
        """The value of an expression of JavaScript, awaited; an exception there is one here."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", answer))
        return answer["result"].get("value")

    def until(self, condition, patience=20):
        deadline = time.monotonic() + patience
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {patience} s: {condition}")
            time.sleep(0.02)

    def click(self, selector):
        """A real click of the mouse in the middle of what `selector` finds, once that stands still."""
        middle = f"""(async () => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{ block: "center", behavior: "instant" }});
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            const {{ x, y, width, height }} = found.getBoundingClientRect();
            return [x + width / 2, y + height / 2];
        }})()"""
        before, now = None, self.run(middle)
        while now != before:
            before, now = now, self.run(middle)
        self.click_at(*now)

    def click_at(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key, text="", shift=False):
        """A key press; `text` is what the key writes, such as "\\r" for Enter."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        common = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": codes[key],
            "modifiers": 8 * shift,
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, whole=False):
        """A PNG of what is in sight, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self):
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def _seen(self, *methods):
        return [event["params"] for event in self.browser.events
                if event.get("sessionId") == self._session and event["method"] in methods]  # fmt: skip

    @property
    def problems(self):
        self.run(
            "new Promise(done => setTimeout(done))"
        )  # by then Chromium has told of what has just happened
        console = [
            e for e in self._seen("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")
        ]
        return console + self._seen("Runtime.exceptionThrown", "Log.entryAdded")

    @property
    def requests(self):
        asked = (event["request"]["url"] for event in self._seen("Network.requestWillBeSent"))
        return {url for url in asked if not url.startswith(("data:", "blob:", "about:"))}

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self._target)
