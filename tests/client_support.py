"""What the tests of the client need: both clients behind one interface, and a proxy that misbehaves on purpose.

`Driver` makes the asynchronous client look like the blocking one, so that one test holds both to the same promises.
`Proxy` stands between a client and a real server and does to each request what the test says: so what the server did
can be compared with what the client returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from support import ROOT, ServerProcess, clean_environment

from keypool.client import AsyncKeyPool, KeyPool, NameTaken, Retry, SecretExists, UnknownKey

KINDS = ("sync", "async")
QUICK = Retry(seconds=30, first=0.01, most=0.05)
SECRET, USER = "sk-live-0123456789abcdef", "somebody@example.org"
ITEM = {"secret": SECRET, "name": "acct-17", "labels": {"region": "eu"}, "data": {"user": USER, "limit": 5}}


class Driver:
    """A client of one of the two kinds. Every call of KeyPool is a method here."""

    def __init__(self, kind: str, url: str, token: str | None = None, **options: Any) -> None:
        self.kind = kind
        options.setdefault("retry", QUICK)
        self._runner: asyncio.Runner | None = None
        if kind == "sync":
            self.pool: KeyPool | AsyncKeyPool = KeyPool(url, token, **options)
        else:
            self._runner = asyncio.Runner()
            self.pool = AsyncKeyPool(url, token, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.wait(getattr(self.pool, name)(*args, **options))

    def of_pool(self, name: str) -> Driver:
        """Another pool of the same client."""
        made = object.__new__(Driver)
        vars(made).update(vars(self), pool=self.pool.pool(name))
        return made

    def wait(self, result: Any) -> Any:
        """The result of a call, awaited if it has to be; a generator becomes a list."""
        if inspect.isasyncgen(result):
            return self.wait(_collected(result))
        if self._runner is not None and inspect.isawaitable(result):
            return self._runner.run(_awaited(result))
        return list(result) if inspect.isgenerator(result) else result

    def lease(self, **options: Any) -> contextlib.AbstractContextManager[Any]:
        """`with` or `async with pool.lease(…)`."""
        return self.entered(self.pool.lease(**options))

    @contextlib.contextmanager
    def entered(self, lease: Any) -> Iterator[Any]:
        """`with` or `async with` for a context manager of this pool."""
        if self.kind == "sync":
            with lease as key:
                yield key
            return
        key = self.wait(lease.__aenter__())
        error: BaseException | None = None
        try:
            yield key
        except BaseException as raised:
            error = raised
        self.wait(lease.__aexit__(type(error) if error else None, error, None))
        if error is not None:
            raise error

    def close(self) -> None:
        """Close it, and the loop it ran on; fails if a task was left on that."""
        self.wait(self.pool.close())
        if self._runner is not None:
            left = self._runner.run(_other_tasks())
            self._runner.close()
            assert not left, f"tasks left behind: {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def change_one_key(pool: Driver) -> Any:
    """Import ITEM and a second key into an empty pool, find, change and replace the first; its answer."""
    made = pool.import_key(**ITEM)
    assert (made.existed, made.name, made.expires_in, made.hint) == (False, "acct-17", None, "sk-l…cdef")
    assert pool.import_key(SECRET).existed
    other = pool.import_key("sk-other")
    with pytest.raises(NameTaken):
        pool.import_key("sk-third", name="acct-17")
    with pytest.raises(NameTaken):
        pool.update(other.id, name="acct-17")
    for text in (SECRET, f"id:{made.id}", "acct-17", made.hint):
        assert pool.find(text).id == made.id
    with pytest.raises(UnknownKey):
        pool.find("nobody")
    with pytest.raises(SecretExists):
        pool.replace(other.id, SECRET)
    row = pool.update(made.id, labels={"region": "us"}, data={})
    assert (row.labels, row.name) == ({"region": "us"}, "acct-17")
    assert pool.reveal(made.id).data == {}
    assert pool.update(made.id, name="").name is None
    assert pool.replace(made.id, "sk-new").id == made.id
    assert pool.reveal(made.id).secret == "sk-new"
    return made


async def _awaited(result: Any) -> Any:
    return await result


async def _collected(rows: Any) -> list[Any]:
    return [row async for row in rows]


async def _other_tasks() -> list[str]:
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def url_of(server: ServerProcess) -> str:
    """Where a client finds it."""
    return f"http://{server.host}"


def clean(server: ServerProcess, token: str | None = None) -> None:
    """Leave no key, whoever made it."""
    with KeyPool(url_of(server), token) as pool:
        pool.delete_many([row.id for row in pool.rows()])


# ------------------------------------------------------------------------------------------------------- the proxy


class Proxy:
    """Passes requests on to a server, but does `faults`, one a request, first.

    | fault | what the client sees | what the server gets |
    | --- | --- | --- |
    | reset | a reset instead of an answer | nothing |
    | swallow | an orderly end instead of an answer | nothing |
    | lose | a reset instead of the answer | the request |
    | cut | half of the answer, then the end | the request |
    | mute | no answer at all | nothing |
    | trickle | a byte now and then | nothing |
    | garbage | something that isn't HTTP | nothing |
    | 502, 503, 504, … | that status, from a proxy | nothing |
    | 503 N | the same with Retry-After: N | nothing |
    | 200 TEXT | that text as a body | nothing |
    """

    def __init__(self, server: ServerProcess | None, port: int = 0) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            reader = sock.makefile("rb")
            while request := _read_request(reader):
                self.requests.append(request.split(b"\r\n", 1)[0].decode())
                fault = self.faults.pop(0) if self.faults else "pass"
                if not self._do(fault, sock, request):
                    break
            reader.close()
        self._sockets.discard(sock)
        sock.close()

    def _do(self, fault: str, sock: socket.socket, request: bytes) -> bool:
        """Whether the connection goes on."""
        word, _, more = fault.partition(" ")
        if word == "reset":
            _reset(sock)
        elif word == "lose":
            self._ask(request)
            _reset(sock)
        elif word == "cut":
            answer = self._ask(request)
            sock.sendall(answer[: len(answer) // 2])
        elif word == "mute":
            self._closed.wait()
        elif word == "trickle":
            while not self._closed.wait(0.2):
                sock.sendall(b"H")
        elif word == "garbage":
            sock.sendall(b"\x00\x01 this is no HTTP\r\n\r\n")
        elif word == "pass":
            sock.sendall(self._ask(request))
            return True
        elif word.isdigit():
            sock.sendall(_canned(int(word), more))
            return True
        return False

    def _ask(self, request: bytes) -> bytes:
        """The server's answer, as bytes."""
        assert self._server is not None
        with socket.create_connection((self._server.address, self._server.port), timeout=30) as upstream:
            upstream.sendall(request)
            response = http.client.HTTPResponse(upstream)
            response.begin()
            body = response.read()
            response.close()
        head = [f"HTTP/1.1 {response.status} {response.reason}"]
        head += [f"{name}: {value}" for name, value in response.getheaders()]
        return "\r\n".join([*head, "", ""]).encode("latin-1") + body

    def close(self) -> None:
        """End it with all its connections."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_request(reader: Any) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            return b""
        head += line
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ),
        0,
    )
    return head + (reader.read(length) if length else b"")


def _canned(status: int, more: str) -> bytes:
    headers = f"Retry-After: {more}\r\n" if more and status != 200 else ""
    body = (more if status == 200 else "<html>not a keypool server</html>").encode()
    return f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def unused_port() -> int:
    """A port that nobody listens on, for now."""
    return ports_in_a_row(1)


def ports_in_a_row(count: int) -> int:
    """The first of so many consecutive free ports, below those that the system gives to others meanwhile.

    Each process of tests (xdist numbers them gw0, gw1, …) looks among a thousand of its own.
    """
    low = 11_000 + 1000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8)
    while True:
        first = random.randrange(low, low + 1000 - count)
        if all(_free(first + number) for number in range(count)):
            return first


def _free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# ----------------------------------------------------------------------------------------------------- processes


def environment(server: ServerProcess | None = None, **more: str) -> dict[str, str]:
    """What a client process is started with."""
    found = clean_environment({"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TERM": "xterm"})
    if server is not None:
        found["KEYPOOL_URL"] = url_of(server)
    return found | more


def keypool(
    server: ServerProcess | None, *words: str, stdin: str | None = None, limit: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "keypool", *words],
        input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL, capture_output=True, text=True,
        env=environment(server, **env), timeout=limit, cwd=ROOT / "tests", check=False,
    )  # fmt: skip


def start(
    server: ServerProcess | None, arguments: Sequence[str | Path], **options: Any
) -> subprocess.Popen[str]:
    """Start a Python process whose output is read line by line; it has a session of its own."""
    options.setdefault("stdout", subprocess.PIPE)
    env = environment(server) | options.pop("more", {})
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=env, cwd=ROOT / "tests", start_new_session=True, **options,
    )  # fmt: skip


@contextlib.contextmanager
def started(
    server: ServerProcess | None, arguments: Sequence[str | Path], **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """The same, and it is gone at the end."""
    process = start(server, arguments, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
