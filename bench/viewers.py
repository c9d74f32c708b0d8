"""What the dashboard costs: the browser that shows it, and the server that many watch.

    python -m bench.viewers [--quick]

1. 100,000 keys and 2,000 calls a second, one page in a real Chromium: how much of a core its processes
   use while it is visible, and how many frames a second arrive.
   it is visible, and how many frames a second arrive.
2. As many calls as one client can make, with nobody watching and with 200 viewers: what they cost the calls.
   The viewers read in a process of their own. Where there are few cores they take processor time from the
   server merely by reading, which is not what the feed costs, so the server's own time a call is told too.
3. One viewer that never reads: how much larger the server is for it.

Take ratios from a shared machine, not figures. The browser's part is left out where there is no Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
HANDSHAKE = (
    b"GET /api/v1/feed HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
KEYS, CALLS, VIEWERS = 100_000, 2_000, 200


@dataclass
class Server:
    """A server of this checkout, in memory."""

    process: subprocess.Popen[str]
    port: int

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        return cpu_of(self.process.pid)

    def resident(self) -> int:
        """Bytes of memory in use."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "server.py"), "--data=:memory:", "--port=0", *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"ready on http://[^:]+:(\d+)/", line)
            if found:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield Server(process, int(found[1]))
                return
        raise RuntimeError("the server never said that it was ready")
    finally:
        process.terminate()
        process.wait()


def cpu_of(pid: int) -> float:
    """Seconds of processor time of one process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class Caller:
    """A connection that sends many requests before it reads their answers."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def call(self, requests: list[tuple[str, str, object]]) -> list[object]:
        """The answers to these calls, in order; None for those without a body."""
        wire = b""
        for method, path, body in requests:
            text = b"" if body is None else json.dumps(body).encode()
            head = f"{method} /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}"
            wire += head.encode() + b"\r\n\r\n" + text
        self._socket.sendall(wire)
        return [self._answer() for _ in requests]

    def _answer(self) -> object:
        length = 0
        while (line := self._file.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return json.loads(self._file.read(length)) if length else None


def fill(port: int, keys: int) -> None:
    """Generate so many keys."""
    caller = Caller(port)
    for _ in range(keys // 1000):
        caller.call([("POST", "/batch", {"op": "generate", "count": 1000})])


def work(port: int, seconds: float, rate: float | None) -> int:
    """Acquire, keep alive and unblock, 30 calls at a time, `rate` a second or all it can: how many."""
    caller, done, started = Caller(port), 0, time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if rate is not None and done > rate * passed:
            time.sleep(0.002)
            continue
        leases = caller.call([("POST", "/keys/acquire", {"owner": "bench"})] * 10)
        ids = [lease["id"] for lease in leases if isinstance(lease, dict)]
        caller.call(
            [("POST", f"/keys/id:{key}/{act}", None) for key in ids for act in ("keepalive", "unblock")]
        )
        done += 30
    return done


# -- viewers, in a process of their own


def watch(port: int, count: int, ready: object, stop: object) -> None:
    """Open so many viewers, read all they are sent, say how many frames a second each had."""
    asyncio.run(_watch(port, count, ready, stop))


async def _watch(port: int, count: int, ready: object, stop: object) -> None:
    frames = [0] * count

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        while True:
            head = await reader.readexactly(2)
            length = head[1] & 0x7F
            if length > 125:
                length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8), "big")
            await reader.readexactly(length)
            frames[number] += 1

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    while min(frames) == 0:  # noqa: ASYNC110 - an event would be set for every frame
        await asyncio.sleep(0.05)
    ready.set()  # type: ignore[attr-defined]
    started, before = time.monotonic(), sum(frames)
    while not stop.is_set():  # type: ignore[attr-defined]  # noqa: ASYNC110 - another process sets it
        await asyncio.sleep(0.1)
    rate = (sum(frames) - before) / (time.monotonic() - started) / count
    print(f"   {count} viewers: {rate:.2f} frames a second each")
    for task in tasks:
        task.cancel()


@contextmanager
def viewers(port: int, count: int) -> Iterator[None]:
    """So many viewers, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=watch, args=(port, count, ready, stop))
    process.start()
    ready.wait(30)
    try:
        yield
    finally:
        stop.set()
        process.join()


def throughput(seconds: float, rounds: int) -> None:
    """Calls a second, and the server's processor time a call, without viewers and with them, turn by turn."""
    print(f"2. {VIEWERS} viewers, one client that makes all the calls it can")
    alone: list[tuple[float, float]] = []
    watched: list[tuple[float, float]] = []
    with serving() as server:
        fill(server.port, 10_000)
        work(server.port, 1, None)

        def measure() -> tuple[float, float]:
            before, started = server.cpu(), time.monotonic()
            done = work(server.port, seconds, None)
            return done / (time.monotonic() - started), (server.cpu() - before) / done * 1e6

        for _ in range(rounds):
            alone.append(measure())
            with viewers(server.port, VIEWERS):
                watched.append(measure())
    for name, results in (("nobody", alone), (f"{VIEWERS} viewers", watched)):
        calls, cost = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"   {name}: {calls:,.0f} calls a second, {cost:.1f} µs of the server's processor each")
    lost = 1 - statistics.median(w[0] for w in watched) / statistics.median(a[0] for a in alone)
    own = 1 - statistics.median(a[1] for a in alone) / statistics.median(w[1] for w in watched)
    print(
        f"   {lost:.1%} fewer calls; of the server's own time the feed takes {own:.1%} (wanted: at most 10%)"
    )


def never_reads(seconds: float) -> None:
    """What viewers who never read cost the server, in bytes each."""
    count = 20
    print("3. Viewers that never read")
    with serving() as server:
        fill(server.port, 10_000)
        work(server.port, 3, CALLS)
        before = server.resident()
        sleepers = []
        for _ in range(count):
            sleeper = socket.socket()
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sleeper.connect(("127.0.0.1", server.port))
            sleeper.sendall(HANDSHAKE)
            sleepers.append(sleeper)
        work(server.port, seconds, CALLS)
        grown = (server.resident() - before) / count
        print(f"   {grown / 1000:,.0f} kB each after {seconds:.0f} s under load (wanted: at most 1,000)")


# -- the browser


def browser(seconds: float) -> None:
    """The processor time of a Chromium that shows the page, by process."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    print(f"1. A page over {KEYS:,} keys at {CALLS:,} calls a second")
    if path is None:
        print("   there is no Chromium here")
        return
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only this part needs it

    arguments = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    with serving("--keepalive-seconds=3600") as server, sync_playwright() as playwright:
        fill(server.port, KEYS)
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        page = chromium.new_page(viewport={"width": 1360, "height": 900})
        page.add_init_script(
            """window.frames_ = 0;
            const Real = WebSocket;
            window.WebSocket = class extends Real {
                constructor(...given) {
                    super(...given);
                    this.addEventListener("message", () => { window.frames_ += 1; });
                }
            };"""
        )
        load = multiprocessing.get_context("spawn").Process(target=work, args=(server.port, 3600, CALLS))
        load.start()
        try:
            for name in ("/", "/keys", "/keys?tab=blocked", "/events"):
                page.goto(f"http://127.0.0.1:{server.port}{name}")
                page.wait_for_selector('#pill[data-state="live"]')
                page.wait_for_timeout(3000)
                before, frames = chromium_cpu(path), page.evaluate("window.frames_")
                started = time.monotonic()
                page.wait_for_timeout(seconds * 1000)
                passed = time.monotonic() - started
                after = chromium_cpu(path)
                shown = (page.evaluate("window.frames_") - frames) / passed
                spent = {kind: (after[kind] - before.get(kind, 0)) / passed for kind in after}
                parts = ", ".join(
                    f"{kind} {part:.1%}" for kind, part in sorted(spent.items()) if part >= 0.001
                )
                print(
                    f"   {name}: {sum(spent.values()):.1%} of a core ({parts}), {shown:.2f} frames a second"
                )
        finally:
            load.kill()
            chromium.close()
    print("   (wanted: the page's process under 10%, 4 frames a second)")


def chromium_cpu(path: str) -> dict[str, float]:
    """Processor time of all processes of this browser, by their kind."""
    spent: dict[str, float] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            line = re.split(rb"[\0 ]", (folder / "cmdline").read_bytes())  # its children write it with spaces
        except OSError:
            continue
        if b"chromium" not in line[0] and os.fsencode(path) not in line[0]:
            continue
        kind = next((word[7:].decode() for word in line if word.startswith(b"--type=")), "browser")
        spent[kind] = spent.get(kind, 0.0) + cpu_of(int(folder.name))
    return spent


QUICK = ["--quick"]


def main(arguments: Sequence[str]) -> int:
    """All three. Figures to read: it judges nothing."""
    parser = argparse.ArgumentParser(prog="bench viewers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    scale = 0.2 if parser.parse_args(arguments).quick else 1.0
    browser(20 * scale)
    throughput(8 * scale, 3)
    never_reads(20 * scale)
    return 0
