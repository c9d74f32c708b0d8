"""Firefox and WebKit for the tests, driven by what Debian's packages bring and by nothing from elsewhere.

Firefox speaks WebDriver BiDi itself, over a websocket; WebKit comes with a driver that speaks the older WebDriver
over HTTP, and needs a screen, which Xvfb is. Both take input as the same lists of actions, and from them the browser
makes events as it does from a mouse and a keyboard. `Tab` is all that tests see of either.

Every call has a time limit. A browser that doesn't answer is killed with all that it started, its test fails, and the
next one gets a new browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

from support import clean_environment, eventually, kill_group, lifeline
from tornado.websocket import websocket_connect
from valkeys import give_back, hold_ports

T = TypeVar("T")

PATIENCE: Final = 60.0
"""Seconds after which a browser that gives no answer is taken to hang."""
WITHIN: Final = 30.0
"""Seconds that a page has to come to what a test waits for."""
KEYS: Final = {"\n": "\ue007", "Escape": "\ue00c", "Control": "\ue009"}
SIZE: Final = (1280, 800)

_SHOWN: Final = """(selector, text) => [...document.querySelectorAll(selector)].filter(
    each => each.checkVisibility({ visibilityProperty: true }) && each.textContent.includes(text))"""
_AIM: Final = f"""(selector, text) => {{
    const [found] = ({_SHOWN})(selector, text);
    if (!found) return null;
    found.scrollIntoView({{ block: "center", inline: "center", behavior: "instant" }});
    const {{ left, top, width, height }} = found.getBoundingClientRect();
    const [x, y] = [Math.floor(left + width / 2), Math.floor(top + height / 2)];
    const hit = document.elementFromPoint(x, y);
    return hit && (found.contains(hit) || hit.contains(found)) ? [x, y] : null;
}}"""

# WebKit's driver has no log: a script that runs before those of each page keeps what its console would show.
_KEEP_ERRORS: Final = """{
    const keep = text => {
        try {
            sessionStorage.errors = JSON.stringify([...JSON.parse(sessionStorage.errors ?? "[]"), String(text)]);
        } catch {}  // about:blank has no storage
    };
    for (const kind of ["error", "warn", "assert"]) {
        const plain = console[kind];
        console[kind] = (...said) => {
            if (kind !== "assert" || !said[0]) keep(said.join(" "));
            plain.apply(console, said);
        };
    }
    addEventListener("error", ({ message, target }) => keep(message ?? `not loaded: ${target.outerHTML}`), true);
    addEventListener("unhandledrejection", ({ reason }) => keep(`unhandled: ${reason}`));
    addEventListener("securitypolicyviolation", event => keep(`${event.violatedDirective}: ${event.blockedURI}`));
}"""


class Refused(Exception):
    """The browser answered with an error: a script failed, or its page went away meanwhile."""


class Tab(ABC):
    """A page in a profile of its own."""

    @abstractmethod
    def open(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""

    @abstractmethod
    def back(self) -> None:
        """Go one entry of the history back."""

    @abstractmethod
    def reload(self) -> None:
        """Load the page again."""

    @abstractmethod
    def resize(self, width: int, height: int) -> None:
        """Make the page so large, in CSS pixels."""

    @abstractmethod
    def errors(self) -> list[str]:
        """The errors and warnings in the console since the tab was opened."""

    @abstractmethod
    def close(self) -> None:
        """End the page and its profile."""

    @abstractmethod
    def _evaluate(self, expression: str) -> str:
        """The text that the promise of an expression comes to. Raises Refused."""

    @abstractmethod
    def _act(self, source: Mapping[str, Any]) -> None:
        """Perform the actions of one source of input, as both protocols write them."""

    def evaluate(self, function: str, *args: object) -> Any:
        """What a JavaScript function, or the promise that it returns, comes to, as JSON. Raises Refused."""
        call = f"({function})(...{json.dumps(args)})"
        return json.loads(self._evaluate(f"(async () => JSON.stringify((await {call}) ?? null))()"))

    def wait(self, function: str, *args: object, within: float = WITHIN) -> Any:
        """The first truthy result of a JavaScript function, called again and again, also across pages."""
        refused: Refused | None = None

        def result() -> Any:
            nonlocal refused
            try:
                return self.evaluate(function, *args)
            except Refused as error:  # between two pages; or for good, and then its message is shown
                refused = error
                return None

        try:
            return eventually(result, f"{function} of {args}", within)
        except AssertionError:
            if refused:
                raise AssertionError(f"in {within} s never came true: {function} of {args}") from refused
            raise

    def see(self, selector: str, text: str = "") -> None:
        """Wait until an element that has this text is in sight."""
        self.wait(f"(...what) => ({_SHOWN})(...what).length > 0", selector, text)

    def miss(self, selector: str, text: str = "") -> None:
        """Wait until no element that has this text is in sight."""
        self.wait(f"(...what) => ({_SHOWN})(...what).length === 0", selector, text)

    def point(self, selector: str, text: str = "") -> None:
        """Move the mouse over the middle of an element that has this text, once it stands still."""
        self._mouse(*self._place(selector, text))

    def point_away(self) -> None:
        """Move the mouse to the corner of the page."""
        self._mouse(0, 0)

    def click(self, selector: str, text: str = "") -> None:
        """Click on an element that has this text, once it stands still with nothing above it."""
        x, y = self._place(selector, text)
        self._mouse(x, y, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def write(self, selector: str, text: str) -> None:
        """Click on a field, and type."""
        self.click(selector)
        self.wait("selector => document.activeElement.matches(selector)", selector)
        self.press(*text)

    def press(self, *keys: str, control: bool = False) -> None:
        """Press keys one after the other, by name or as what they write."""
        values = [KEYS.get(key, key) for key in keys]
        strokes = [{"type": kind, "value": each} for each in values for kind in ("keyDown", "keyUp")]
        if control:
            down, up = ({"type": kind, "value": KEYS["Control"]} for kind in ("keyDown", "keyUp"))
            strokes = [down, *strokes, up]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def _place(self, selector: str, text: str) -> tuple[int, int]:
        """The middle of an element, seen there twice in a row."""
        seen: Any = None

        def still() -> Any:
            nonlocal seen
            before = seen
            with contextlib.suppress(Refused):
                seen = self.evaluate(_AIM, selector, text)
            return seen if seen == before else None

        x, y = eventually(still, f"{selector} {text!r} can be pressed", WITHIN)
        return x, y

    def _mouse(self, x: int, y: int, *more: Mapping[str, Any]) -> None:
        move = {"type": "pointerMove", "x": x, "y": y, "duration": 0, "origin": "viewport"}
        kind = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self._act({**kind, "actions": [move, *more]})


class Browser(ABC):
    """A browser that is started when it is first needed, and again after it was killed."""

    name: str

    def __init__(self) -> None:
        self._all = ExitStack()
        self.running = False
        """Whether it has been started, and was neither ended nor killed since."""

    @staticmethod
    @abstractmethod
    def lacking() -> str:
        """What isn't installed here that it needs; empty if nothing is."""

    @abstractmethod
    def _start(self, everything: ExitStack, home: Path) -> None:
        """Start what it takes, and leave to `everything` how that ends."""

    @abstractmethod
    def _tab(self) -> Tab:
        """A new tab of the browser, which runs."""

    def tab(self) -> Tab:
        """A new tab in a new profile."""
        if not self.running:
            with ExitStack() as everything:
                home = everything.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"keypool-{self.name}-", ignore_cleanup_errors=True)
                )
                self._start(everything, Path(home))
                self._all = everything.pop_all()
            self.running = True
        return self._tab()

    def close(self) -> None:
        """End it and all that it started, whatever state it is in."""
        self.running = False
        self._all.close()

    def _hangs(self, call: str) -> AssertionError:
        """Kill it, as it gave no answer to this call."""
        self.close()
        return AssertionError(f"{self.name} gave no answer to {call} within {PATIENCE} s, and was killed")


class Program:
    """A program in a session of its own: whatever it started ends with it."""

    def __init__(self, command: list[str], home: Path, env: Mapping[str, str]) -> None:
        self._name = Path(command[0]).name
        self._output = home / f"{self._name}.txt"
        own = {"HOME": str(home), "TMPDIR": str(home), "XDG_RUNTIME_DIR": str(home)}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=home,
                env=clean_environment(own | dict(env)), start_new_session=True,
            )  # fmt: skip
        self._lifeline = lifeline(self._process.pid)

    def printed(self, pattern: str) -> str:
        """The first group of this pattern, once the program has printed what fits it."""

        def found() -> re.Match[str] | None:
            text = self._output.read_text("utf-8", "replace")
            match = re.search(pattern, text)
            assert match or self._process.poll() is None, f"{self._name} ended: {text}"
            return match

        match = eventually(found, f"{self._name} prints {pattern}", PATIENCE)
        assert match
        return match[1]

    def end(self) -> None:
        """Ask it to end, wait a little, and kill what is left."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        kill_group(self._process.pid)
        self._process.wait()
        self._lifeline.kill()
        self._lifeline.communicate()


# -------------------------------------------------------------------------------------------------- Firefox


class Firefox(Browser):
    """Firefox without a window; one process for all tabs."""

    name = "firefox"

    @staticmethod
    def _path() -> str | None:
        return shutil.which("firefox-esr") or shutil.which("firefox")

    @staticmethod
    def lacking() -> str:
        return "" if Firefox._path() else "there is no firefox-esr in PATH"

    def _start(self, everything: ExitStack, home: Path) -> None:
        path = self._path()
        assert path
        command = [path, "--headless", "--no-remote", "--remote-debugging-port=0", "--profile", str(home)]
        program = Program(command, home, {"MOZ_CRASHREPORTER_DISABLE": "1"})
        everything.callback(program.end)
        self._number = itertools.count(1)
        self.heard: list[dict[str, Any]] = []
        """The events that came, oldest first."""
        self._loop = asyncio.new_event_loop()
        everything.callback(self._loop.close)
        url = program.printed(r"WebDriver BiDi listening on (ws://\S+)") + "/session"
        self._socket = self._run(_connect(url), url)
        everything.callback(lambda: self._loop.run_until_complete(self._hang_up()))
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["log.entryAdded"])

    async def _hang_up(self) -> None:
        self._socket.close()  # on its loop: elsewhere it would make one, which nobody closes

    def _tab(self) -> Tab:
        return _FirefoxTab(self)

    def call(self, method: str, **params: object) -> Any:
        """The result of a command. Raises Refused."""
        number = next(self._number)
        message = json.dumps({"id": number, "method": method, "params": params})
        return self._run(self._answer(number, message), method)

    async def _answer(self, number: int, message: str) -> Any:
        await self._socket.write_message(message)
        while True:
            received = await self._socket.read_message()
            assert received is not None, "firefox is gone"
            answer = json.loads(received)
            if answer["type"] == "event":
                self.heard.append(answer)
            elif answer["id"] == number:
                break
        if answer["type"] == "error":
            raise Refused(f"{answer['error']}: {answer['message']}")
        return answer["result"]

    def _run(self, work: Coroutine[Any, Any, T], what: str) -> T:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, PATIENCE))
        except TimeoutError:
            raise self._hangs(what) from None


async def _connect(url: str) -> Any:
    return await websocket_connect(url)


class _FirefoxTab(Tab):
    def __init__(self, firefox: Firefox) -> None:
        self._firefox = firefox
        self._profile = firefox.call("browser.createUserContext")["userContext"]
        made = firefox.call("browsingContext.create", type="tab", userContext=self._profile)
        self._context = made["context"]
        self.resize(*SIZE)

    def _call(self, method: str, **params: object) -> Any:
        return self._firefox.call(method, context=self._context, **params)

    def open(self, url: str) -> None:
        self._call("browsingContext.navigate", url=url, wait="complete")

    def back(self) -> None:
        self._call("browsingContext.traverseHistory", delta=-1)

    def reload(self) -> None:
        self._call("browsingContext.reload", wait="complete")

    def resize(self, width: int, height: int) -> None:
        self._call("browsingContext.setViewport", viewport={"width": width, "height": height})

    def errors(self) -> list[str]:
        self.evaluate("() => null")  # so that the events that came before its answer are read
        entries = [event["params"] for event in self._firefox.heard if event["method"] == "log.entryAdded"]
        return [
            str(entry["text"])
            for entry in entries
            if entry["source"].get("context") == self._context and entry["level"] in ("error", "warn")
        ]

    def close(self) -> None:
        self._firefox.call("browser.removeUserContext", userContext=self._profile)

    def _evaluate(self, expression: str) -> str:
        answer = self._firefox.call(
            "script.evaluate", expression=expression, target={"context": self._context}, awaitPromise=True
        )
        if answer["type"] == "exception":
            raise Refused(answer["exceptionDetails"]["text"])
        return str(answer["result"]["value"])

    def _act(self, source: Mapping[str, Any]) -> None:
        self._call("input.performActions", actions=[source])


# --------------------------------------------------------------------------------------------------- WebKit

# The window of WebKit's own small browser can't be narrower than its bar, whose field is taken back by this.
_BAR: Final = "entry { margin-left: -80px; margin-right: -80px; }"


class WebKit(Browser):
    """WebKitGTK in the browser that comes with its driver; a process for each tab, without a lasting profile."""

    name = "webkit"

    @staticmethod
    def lacking() -> str:
        absent = [each for each in ("WebKitWebDriver", "Xvfb") if shutil.which(each) is None]
        return f"there is no {' and no '.join(absent)} in PATH" if absent else ""

    def _start(self, everything: ExitStack, home: Path) -> None:
        style = home / ".config/gtk-3.0/gtk.css"
        style.parent.mkdir(parents=True)
        style.write_text(_BAR)
        self._script = home / "keep-errors.js"
        self._script.write_text(_KEEP_ERRORS)
        display = everything.enter_context(_screen(home))
        [self._port] = hold_ports(1)
        everything.callback(give_back, self._port)
        program = Program(
            ["WebKitWebDriver", f"--port={self._port}"], home, {"DISPLAY": display, "GDK_BACKEND": "x11"}
        )
        everything.callback(program.end)
        eventually(self._listens, "WebKitWebDriver listens", PATIENCE)

    def _listens(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return bool(self.call("GET", "/status")["ready"])
        return False

    def _tab(self) -> Tab:
        return _WebKitTab(self, self._script)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The value that a call of the driver is answered with. Raises Refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            content = json.dumps(body or {}) if method == "POST" else None
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        except TimeoutError:
            raise self._hangs(f"{method} {path}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(f"{value['error']}: {value['message']}")
        return value


@contextlib.contextmanager
def _screen(home: Path) -> Iterator[str]:
    """A screen that nobody sees; its name. Xvfb takes the first number that is free, and prints it."""
    program = Program(
        ["Xvfb", "-displayfd", "1", "-nolisten", "tcp", "-screen", "0", "1600x1200x24"], home, {}
    )
    try:
        yield ":" + program.printed(r"(?m)^(\d+)$")
    finally:
        program.end()


class _WebKitTab(Tab):
    def __init__(self, webkit: WebKit, script: Path) -> None:
        self._webkit = webkit
        options = {"args": ["--automation", f"--user-script-at-start={script}"]}
        wanted = {"browserName": "MiniBrowser", "webkitgtk:browserOptions": options}
        made = webkit.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{made['sessionId']}"
        try:
            self.resize(*SIZE)
        except BaseException:
            self.close()  # or the driver would have no room for another one
            raise

    def _post(self, path: str, **body: object) -> Any:
        return self._webkit.call("POST", self._path + path, body)

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def back(self) -> None:
        self._post("/back")

    def reload(self) -> None:
        self._post("/refresh")

    def resize(self, width: int, height: int) -> None:
        def fits() -> bool:
            """The window is as much larger as its bar; the page follows it after a while."""
            inner = self.evaluate("() => [innerWidth, innerHeight]")
            outer = self._webkit.call("GET", f"{self._path}/window/rect")
            if inner != [width, height]:
                self._post("/window/rect", width=width, height=outer["height"] + height - inner[1])
            return bool(inner == [width, height])

        eventually(fits, f"the page is {width} x {height}", WITHIN)

    def errors(self) -> list[str]:
        found: list[str] = self.evaluate("() => JSON.parse(sessionStorage.errors ?? '[]')")
        return found

    def close(self) -> None:
        self._webkit.call("DELETE", self._path)

    def _evaluate(self, expression: str) -> str:
        return str(self._post("/execute/sync", script=f"return {expression}", args=[]))

    def _act(self, source: Mapping[str, Any]) -> None:
        self._post("/actions", actions=[source])
