"""How bytes are cut into reads changes nothing about the answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest
from tornado import web

from http1.harness import Client, chunked, request, seeds, serve, turns
from keypool.http.http1 import RawDelegate, Request

from .test_hostile import REFUSED


class Told(web.RequestHandler):
    def _tell(self) -> None:
        self.set_header("Date", "now")
        self.write(f"{self.request.method} {self.request.uri} {len(self.request.body)}")

    get = post = put = delete = _tell


@web.stream_request_body
class Streamed(web.RequestHandler):
    def initialize(self) -> None:
        self.size = 0

    async def data_received(self, chunk: bytes) -> None:
        await asyncio.sleep(0)
        self.size += len(chunk)

    def post(self) -> None:
        self.set_header("Date", "now")
        self.write(str(self.size))


class Application(web.Application):
    """Answers some requests raw, some by handlers, some late."""

    def __init__(self) -> None:
        handlers: list[tuple[str, type[web.RequestHandler]]] = [
            ("/stream", Streamed),
            ("/.*", Told),
        ]
        super().__init__(handlers, log_function=lambda handler: None)

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        if request.target.startswith((b"/raw", b"/late")):
            return Raw(request)
        return None


class Raw(RawDelegate):
    def __init__(self, request: Request) -> None:
        self.request = request

    def run(self, body: bytes) -> None:
        text = b"%b %b %d" % (self.request.method, self.request.target, len(body))
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
        if self.request.target.startswith(b"/late"):
            asyncio.get_running_loop().call_soon(self.request.respond, answer)
        else:
            self.request.respond(answer)

    def hung_up(self) -> None:
        pass


def messages(rng: random.Random) -> Iterator[bytes]:
    """Yield requests of all kinds; sometimes the last is one that is refused."""
    for number in range(rng.randint(1, 12)):
        path = rng.choice(["/raw", "/late", "/told", "/stream"]) + f"?{number}"
        body = rng.randbytes(rng.choice([0, 1, 100, 5000, 20_000]))
        lines = [f"X-{i}: {'v' * rng.randint(0, 300)}" for i in range(rng.randint(0, 5))]
        method = "POST" if path.startswith("/stream") else rng.choice(["POST", "PUT", "DELETE"])
        form = rng.randint(0, 3)
        if form == 0 and not path.startswith("/stream"):
            yield request(path, *lines, method="GET")
        elif form == 1:
            size = rng.choice([1, 7, 4000])
            chunks = [body[i : i + size] for i in range(0, len(body), size)][:500]
            yield chunked(path, *chunks, lines=tuple(lines), trailer=rng.choice([b"", b"A: b\r\n"]))
        elif form == 2:
            lines += ["Connection: Upgrade", "Upgrade: other"]
            yield request(path, *lines, method=method, body=body)
        else:
            yield request(path, *lines, method=method, body=body)
    if rng.random() < 0.5:
        yield rng.choice(list(REFUSED.values()))
    else:
        yield request("/told?last", "Connection: close")


async def converse(client: Client, pieces: list[bytes]) -> bytes:
    """Send pieces as reads of their own, and return all that comes back."""
    answer = asyncio.ensure_future(client.ended())
    for piece in pieces:
        client.writer.write(piece)
        await turns(2)
    received = await answer
    return b"\r\n".join(line for line in received.split(b"\r\n") if not line.startswith(b"Date: "))


@pytest.mark.parametrize("seed", seeds(40, 10))
async def test_splitting_changes_nothing(seed: int) -> None:
    """The same bytes, whole, in a few pieces, in many, give the same bytes."""
    rng = random.Random(seed)
    data = b"".join(messages(rng))
    async with serve("http1", Application()) as served:
        whole = await converse(await served.connect(), [data])
        assert whole.count(b"HTTP/1.1 ") > 1
        for cuts in (1, 3, 20, 300):
            places = sorted(rng.randrange(len(data) + 1) for _ in range(cuts))
            pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
            assert await converse(await served.connect(), pieces) == whole


@pytest.mark.parametrize("seed", seeds(20, 5))
async def test_noise_never_breaks_the_server(seed: int) -> None:
    """Requests with random bytes changed are answered somehow, and the next client is served."""
    rng = random.Random(1000 + seed)
    async with serve("http1", Application()) as served:
        for _ in range(20):
            data = bytearray(b"".join(messages(rng)))
            for _ in range(rng.randint(1, 10)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            client = await served.connect()
            client.writer.write(data)
            await turns(3)
            client.half_close()
            with contextlib.suppress(ConnectionError):
                await client.ended()
        assert (await (await served.connect()).get("/raw")).status == 200


async def test_single_bytes_give_the_same(kind: str) -> None:
    """The extreme, on either server."""
    data = request("/told?1", "A: b", method="GET") + chunked("/stream", b"abc", b"defg")
    data += request("/told?2", method="POST", body=b"xyz")
    async with serve(kind, Application()) as served:
        client = await served.connect()
        for byte in data:
            client.writer.write(bytes([byte]))
            await turns(2)
        for expected in (b"GET /told?1 0", b"7", b"POST /told?2 3"):
            assert (await client.response()).body == expected
