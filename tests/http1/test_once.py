"""Every byte is read once, and the result doesn't depend on how the bytes are cut.

KEYPOOL_MUTATIONS sets how many mutated streams are read, for a longer run than the suite's.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence

import pytest

from http1.harness import chunked, request, seeds
from http1.in_process import WORDS, Outcome, Reader, Taken, behind_each_head, cut, mutated
from keypool.http.http1.reader import RequestReader

MUTATIONS = int(os.environ.get("KEYPOOL_MUTATIONS", "1500"))
SEEDS = 10
INSIDE = b"GET /inside HTTP/1.1\r\nHost: localhost\r\n\r\n"
UNKNOWN = b"BREW /inside HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPGRADE = ("Connection: Upgrade", "Upgrade: other")

STREAMS = (
    request("/1") * 4,
    request("/1", body=b"abc") + request("/2") + request("/3", body=INSIDE),
    request("/1", "A: b") + INSIDE * 3 + request("/1", "A: b"),
    chunked("/1", b"abc", INSIDE, UNKNOWN, b"\r\n\r\n", b"\r\n", trailer=b"A: b\r\n") + request("/2"),
    request("/1", body=UNKNOWN + INSIDE) + UNKNOWN,
    request("/1", *UPGRADE) + request("/2"),
    request("/1", *UPGRADE, body=INSIDE) + request("/2", body=INSIDE) + INSIDE,
    chunked("/1", INSIDE, lines=UPGRADE) + request("/2", *UPGRADE, body=b"0\r\n\r\n"),
    b"\r\n\r\n" + request("/1") + b"\r\n" + UNKNOWN + request("/2"),
    request("/1", "Connection: close", body=b"abc") + INSIDE,
    request("/1", body=b"abc").replace(b"HTTP/1.1", b"HTTP/1.0") + INSIDE,
    request("/1", "Expect: 100-continue", body=b"abc") + request("/2"),
    request("localhost:80", method="CONNECT") + INSIDE,
    request("*", method="OPTIONS") + request("http://localhost/1"),
    b"POST / RTSP/1.0\r\nHost: localhost\r\n\r\n" + INSIDE,
)


@pytest.fixture
def eaten(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes that the parser was given and those that were found in the cache, in order."""
    steps: list[bytes] = []
    parse, try_cached = RequestReader._parse, RequestReader.try_cached

    def parsing(reader: RequestReader, step: bytes | memoryview) -> int:
        consumed = parse(reader, step)
        steps.append(bytes(step[:consumed]))
        return consumed

    def looking(reader: RequestReader, data: bytes, start: int = 0) -> int:
        end = try_cached(reader, data, start)
        steps.append(data[start:end])
        return end

    monkeypatch.setattr(RequestReader, "_parse", parsing)
    monkeypatch.setattr(RequestReader, "try_cached", looking)
    return steps


async def read(reader: Reader, pieces: Sequence[bytes], eaten: list[bytes]) -> Outcome:
    """The outcome of a stream. Fails unless each byte was consumed once, and all of them if it didn't end early."""
    eaten.clear()
    outcome = await reader.read(pieces)
    consumed, stream = b"".join(eaten), b"".join(pieces)
    assert consumed == stream[: len(consumed)], f"{pieces} was consumed as {eaten}"
    assert outcome.ended or consumed == stream, f"{pieces}: only {eaten} was consumed"
    outcome.sent = b""  # it has the time in it
    return outcome


@pytest.mark.parametrize("seed", seeds(SEEDS, 3))
def test_mutated_streams_are_read_alike_however_they_are_cut(seed: int, eaten: list[bytes]) -> None:
    """Mutated streams whole, byte by byte, cut behind each head, and at random: the same requests, the same end."""
    rng = random.Random(seed)

    async def test() -> None:
        reader = Reader()
        for _ in range(MUTATIONS // SEEDS):
            stream = rng.choice(STREAMS)
            if rng.random() < 0.9:
                stream = mutated(stream, rng, STREAMS, WORDS)
            whole = await read(reader, [stream], eaten)
            for pieces in (
                [bytes([byte]) for byte in stream],
                behind_each_head(stream),
                cut(stream, rng),
                [stream],  # once more: now header sections are known
            ):
                outcome = await read(reader, pieces, eaten)
                assert outcome == whole, f"{stream!r} cut as {pieces}"

    asyncio.run(test())


@pytest.mark.parametrize("seed", seeds(SEEDS, 3))
def test_no_byte_of_a_body_becomes_a_request(seed: int, eaten: list[bytes]) -> None:
    """Bodies made of requests, known and unknown, in pipelines that end in an unknown method."""
    rng = random.Random(seed)

    def body() -> bytes:
        parts = [INSIDE, UNKNOWN, b"A", b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"{}", INSIDE[:20], 9000 * b"x"]
        return b"".join(rng.choice(parts) for _ in range(rng.randint(0, 4)))

    def message(content: bytes) -> bytes:
        lines = rng.choice(((), (), ("A: b",), UPGRADE))
        if rng.random() < 0.5:
            return request("/outside", *lines, method="POST", body=content)
        at = rng.randrange(len(content) + 1)
        return chunked("/outside", *(part for part in (content[:at], content[at:]) if part), lines=lines)

    async def test() -> None:
        reader = Reader()
        for _ in range(MUTATIONS // SEEDS // 3):
            bodies = [body() for _ in range(rng.randint(1, 6))]
            stream = b"".join(map(message, bodies)) + UNKNOWN + INSIDE
            for pieces in ([stream], behind_each_head(stream), cut(stream, rng), cut(stream, rng, 40)):
                outcome = await read(reader, pieces, eaten)
                assert outcome.taken == [Taken(b"POST", b"/outside", one) for one in bodies]
                assert outcome.refused == [501]
                assert outcome.ended

    asyncio.run(test())
