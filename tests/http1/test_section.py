"""A header section that was read before is not parsed again, and the answers are the same."""

from __future__ import annotations

import random

import pytest

from http1.harness import Client, request, serve
from keypool.config.limits import Limits
from keypool.http.http1 import RawDelegate, Request
from keypool.http.http1.reader import RequestReader

from .test_hostile import HOST, REFUSED, SMUGGLED
from .test_split import Application, converse

PLAIN = b"POST /raw HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\n"
BARE = b"GET /raw HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pieces that go through the parser."""
    pieces: list[bytes] = []
    feed = RequestReader.feed

    def noted(reader: RequestReader, piece: bytes | memoryview, at: int = 0) -> int:
        pieces.append(bytes(piece))
        return feed(reader, piece, at)

    monkeypatch.setattr(RequestReader, "feed", noted)
    return pieces


async def ask(client: Client, data: bytes) -> bytes:
    """Send a request whole; the body of its answer."""
    await client.send(data)
    answer = await client.response()
    assert answer.status == 200
    return answer.body


async def test_a_second_request_with_the_same_lines_is_not_parsed(parsed: list[bytes]) -> None:
    """Whatever its method, target and body, and on whichever connection."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        assert await ask(client, PLAIN + b"abc") == b"POST /raw 3"
        assert await ask(client, BARE) == b"GET /raw 0"
        assert parsed == [PLAIN + b"abc", BARE]
        other = await served.connect()
        for target in (b"/raw", b"/raw/~a:b.c-d_e?f=1&g=%20", b"/late", b"/told"):
            for who in (client, other):
                shown = await ask(who, PLAIN.replace(b"/raw", target) + b"xyz")
                assert shown == b"POST %b 3" % target
                shown = await ask(who, BARE.replace(b"GET /raw", b"DELETE " + target))
                assert shown == b"DELETE %b 0" % target
        assert parsed == [PLAIN + b"abc", BARE]


ATTEMPT = b"POST /raw HTTP/1.1\r\n" + HOST + b"Idempotency-Key: %b\r\nContent-Length: 3\r\n\r\nabc"


class Noted(Application):
    """Keeps the header lines of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[bytes, bytes]] = []

    def start_raw_request(self, request: Request) -> RawDelegate | None:
        self.seen.append(dict(request.headers))
        return super().start_raw_request(request)


async def test_the_header_that_varies_is_no_part_of_a_section(parsed: list[bytes]) -> None:
    """Requests that differ in their Idempotency-Key only, or have none, are parsed once."""
    app = Noted()
    async with serve("http1", app) as served:
        client = await served.connect()
        values = [b"a", b"b" * 64, b"!~:,", b"a"]
        for value in values:
            await ask(client, ATTEMPT % value)
            await ask(client, (ATTEMPT % value).replace(b"Idempotency-Key", b"idempotency-key"))
        await ask(client, ATTEMPT.replace(b"Idempotency-Key: %b\r\n", b""))
        assert parsed == [ATTEMPT % b"a"]
        seen = [headers.pop(b"idempotency-key", None) for headers in app.seen]
        assert seen == [value for value in values for _ in range(2)] + [None]
        assert all(headers == app.seen[0] for headers in app.seen)
        assert len(served.server.sections._by_bytes) == len(served.server.sections._by_lines) == 1


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        (b"Idempotency-Key: " + b"c" * 65, b"c" * 65),
        (b"Idempotency-Key:", b""),
        (b"Idempotency-Key: a b", b"a b"),
        (b"Idempotency-Key: \xe4", b"\xe4"),
        (b"Idempotency-Key: a \t", b"a"),
        (b"IDEMPOTENCY-KEY: a", b"a"),
        (b"Idempotency-Key:a", b"a"),
        (b"X-Idempotency-Key: a", None),
        (b"X: 1\r\nIdempotency-Key-: a", None),
        (b"Idempotency-Key: a\r\nIdempotency-Key: b", b"b"),
        (b"X: Idempotency-Key: a", None),
    ],
)
async def test_such_a_header_in_another_form_is_parsed(
    parsed: list[bytes], lines: bytes, seen: bytes | None
) -> None:
    """It is read as it stands, and nothing of it sticks to the requests that come later."""
    app = Noted()
    data = (ATTEMPT % b"a").replace(b"Idempotency-Key: a", lines)
    async with serve("http1", app) as served:
        client = await served.connect()
        for _ in range(2):
            await ask(client, ATTEMPT % b"z")
            await ask(client, data)
        assert [headers.get(b"idempotency-key") for headers in app.seen] == [b"z", seen, b"z", seen]
        assert parsed.count(data) == 2


async def test_a_line_that_continues_the_header_that_varies_is_not_cut_off() -> None:
    """A line that begins with white space belongs to the one before it, and is refused."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        await ask(client, ATTEMPT % b"z")
        await client.send(ATTEMPT % b"z\r\n z")
        received = await client.ended()
        assert received.startswith(b"HTTP/1.1 400 ")


async def test_what_is_not_the_same_is_parsed(parsed: list[bytes]) -> None:
    """Other methods, odd targets, versions, and lines that differ in a letter's case."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        for data in (
            BARE,
            BARE.replace(b"GET", b"PUT"),
            BARE.replace(b"/raw", b"/raw/[]"),
            BARE.replace(b"/raw", b"http://localhost/raw"),
            BARE.replace(b"Host", b"HOST"),
        ):
            await ask(client, data)
            assert parsed[-1] == data
        await client.send(BARE.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await client.response())["content-length"] == "10"
        assert await client.closed()


@pytest.mark.parametrize(
    "lines",
    [b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: other\r\n", b"Expect: 100-continue\r\n"],
)
async def test_lines_that_decide_about_more_than_the_request_are_parsed(
    lines: bytes, parsed: list[bytes]
) -> None:
    """The end of a connection, a change of protocol, a body that has to be asked for."""
    data = PLAIN[:-2] + lines + b"\r\nabc"
    async with serve("http1", Application()) as served:
        for _ in range(2):
            client = await served.connect()
            await client.send(data)
            assert (await client.response()).body == b"POST /raw 3"
        assert parsed.count(data) == 2


@pytest.mark.parametrize(
    "before", [b"P", b"PO", b"POST", b"POST /raw", b"\r\nP", b"\0", b"GET /r HTTP/1.1\r\nA"]
)
async def test_a_cached_request_behind_a_part_of_another_is_not_taken(before: bytes) -> None:
    """The bytes before it belong to it, and make nonsense of it."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        for _ in range(2):
            await ask(client, BARE)
        await client.dribble(before, BARE)
        received = await client.ended()
        assert received.count(b"HTTP/1.1 ") == 1
        assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))


async def test_a_cached_request_inside_a_body_is_not_taken() -> None:
    """Even where the body comes in reads of its own."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        for _ in range(2):
            await ask(client, BARE)
        head = PLAIN.replace(b"Length: 3", b"Length: %d" % (2 * len(BARE)))
        await client.dribble(head, BARE, BARE)
        assert (await client.response()).body == b"POST /raw %d" % (2 * len(BARE))
        assert await ask(client, BARE) == b"GET /raw 0"


@pytest.mark.parametrize("seed", range(40))
async def test_cached_requests_are_answered_as_others(seed: int) -> None:
    """Many requests with few sets of lines, a read each, cut anywhere, or all at once."""
    rng = random.Random(seed)
    sections = [
        tuple(f"X-{i}: {'v' * rng.randint(0, 90)}" for i in range(rng.randint(0, 3))) for _ in range(3)
    ]
    messages = []
    for number in range(40):
        target = rng.choice(["/raw", "/late", "/told", "/stream"]) + rng.choice(["", f"?{number}"])
        lines = rng.choice(sections) + rng.choice([(), (), (), ("Connection: Upgrade", "Upgrade: other")])
        body = rng.choice([b"", b"abc", b"GET / HTTP/1.1\r\n\r\n"])
        method = "POST" if target.startswith("/stream") else rng.choice(["GET", "POST", "PUT", "DELETE"])
        messages.append(request(target, *lines, method=method, body=body))
    messages.append(request("/told?last", "Connection: close"))
    data = b"".join(messages)
    async with serve("http1", Application()) as served:
        whole = await converse(await served.connect(), [data])
        assert whole.count(b"HTTP/1.1 ") == len(messages)
        assert await converse(await served.connect(), messages) == whole
        for cuts in (10, 60):
            places = sorted(rng.randrange(len(data) + 1) for _ in range(cuts))
            pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
            assert await converse(await served.connect(), pieces) == whole


@pytest.mark.parametrize("name", REFUSED)
async def test_hostile_requests_are_refused_behind_cached_ones(name: str) -> None:
    """Twice, in case the server caches anything of the first."""
    async with serve("http1", Application()) as served:
        for _ in range(2):
            client = await served.connect()
            await ask(client, SMUGGLED.replace(b"/smuggled", b"/raw"))
            await client.dribble(REFUSED[name], SMUGGLED)
            received = await client.ended()
            assert received.startswith(b"HTTP/1.1 4")
            assert b"smuggled" not in received


async def test_the_cache_is_bounded() -> None:
    """It keeps a limited number of sections, and no long ones."""
    async with serve("http1", Application()) as served:
        client = await served.connect()
        sections = served.server.sections
        for number in range(1200):
            await ask(client, request("/raw", f"X: {number}", method="GET"))
        assert 0 < len(sections._by_lines) <= 512
        assert 0 < len(sections._by_bytes) <= 512
        sections._by_lines.clear()
        sections._by_bytes.clear()
        for _ in range(2):
            await ask(client, request("/raw", "X: " + 1100 * "y", method="GET"))
        assert not sections._by_lines
        assert not sections._by_bytes


async def test_a_body_over_the_limit_is_not_taken_past_the_parser() -> None:
    """A body limit that the application sets for one request does not apply to the next."""

    class Lenient(Application):
        def start_raw_request(self, request: Request) -> RawDelegate | None:
            if request.target == b"/raw/large":
                request.set_max_body_size(1000)
            return super().start_raw_request(request)

    async with serve("http1", Lenient(), limits=Limits(body_bytes=10)) as served:
        large = request("/raw/large", method="POST", body=100 * b"x")
        client = await served.connect()
        for _ in range(2):
            assert await ask(client, large) == b"POST /raw/large 100"
        await client.send(large.replace(b"/raw/large", b"/raw/small"))
        assert (await client.response()).status == 413
