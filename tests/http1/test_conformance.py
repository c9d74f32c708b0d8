"""The server reads any request stream as RFC 9112 demands, however it is cut.

The streams are those that the test suites of other servers send, and the oracle is a reader written from the RFC
alone. Both lie beside the repository: without them these tests are skipped. KEYPOOL_MUTATIONS sets how many mutated
streams are read, for a longer run than the suite's.
"""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from http1.harness import seeds
from http1.in_process import END, WORDS, Outcome, Reader, behind_each_head, cut, mutated

CONFORMANCE = Path(__file__).resolve().parents[2].parent / "shared" / "conformance"
MUTATIONS = int(os.environ.get("KEYPOOL_MUTATIONS", "1500"))
SEEDS = 10
TOO_MUCH = {413, 414, 431}

pytestmark = pytest.mark.skipif(not CONFORMANCE.is_dir(), reason=f"there is no {CONFORMANCE}")


@cache
def corpus() -> list[tuple[str, bytes]]:
    """Name and bytes of every stream."""
    with gzip.open(CONFORMANCE / "corpus.jsonl.gz", "rt") as lines:
        next(lines)  # the names of the suites
        entries = [json.loads(line) for line in lines]
    return [(f"{suite}: {name}", text.encode("latin-1")) for suite, name, text in entries]


@cache
def oracle() -> Any:
    """The module."""
    spec = importlib.util.spec_from_file_location("oracle", CONFORMANCE / "oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuts(stream: bytes, rng: random.Random) -> Iterator[tuple[str, list[bytes]]]:
    """The ways in which a stream is sent."""
    yield "whole", [stream]
    yield "behind each head", behind_each_head(stream)
    yield "at random", cut(stream, rng)


def origin_form(target: bytes) -> bytes:
    """A target as the application is given it."""
    if target.lower().startswith((b"http://", b"https://")):
        rest = target.partition(b"//")[2]
        at = min((rest.find(mark) for mark in (b"/", b"?") if mark in rest), default=len(rest))
        path = rest[at:]
        return path if path.startswith(b"/") else b"/" + path
    return target


COMPLETIONS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n\r\n",
    b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\nHost: a\r\n\r\n",
    b": a\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n0\r\n\r\n",
)
"""What is most often missing at the end of a stream."""


def may_become_a_request(stream: bytes, found: int) -> bool:
    """Whether a stream that ends too early can be continued so that it certainly contains another request."""
    whole = (oracle().read(stream + rest, 10_000)[0] for rest in COMPLETIONS)
    return any(len(requests) > found and not may_be_refused(stream, requests[found]) for requests in whole)


def may_be_refused(stream: bytes, request: dict[str, Any]) -> bool:
    """Whether the server, or its parser, is stricter than the RFC here on purpose."""
    trailers = {name for name, _ in request["trailers"]}
    if request["may"] or trailers & {b"content-length", b"transfer-encoding"}:
        return True
    return re.search(rb"(?i)transfer-encoding:[^\r\n]*\t", stream) is not None


def fault(
    stream: bytes, expected: tuple[list[dict[str, Any]], tuple[Any, ...]], outcome: Outcome
) -> str | None:
    """The error in the server's reading of a stream, or None.

    A server may refuse more than it must, where the oracle has a reason (`may`) or its limits are exceeded. It must
    never take for a request what isn't one, or read one otherwise.
    """
    found, end = expected
    for number, taken in enumerate(outcome.taken):
        if number >= len(found):
            return f"took a request that there isn't: {taken}"
        wanted = found[number]
        if taken != (wanted["method"], origin_form(wanted["target"]), wanted["body"]):
            return f"read {taken}, not {wanted}"
    refused = bool(outcome.refused) or outcome.ended
    if set(outcome.refused) & TOO_MUCH:
        return None
    if len(outcome.taken) < len(found):
        missed = found[len(outcome.taken)]
        if not refused:
            return f"waits, though there is {missed}"
        return None if may_be_refused(stream, missed) else f"refused {outcome.refused} {missed}"
    if end[0] == "wait":
        hasty = refused and not end[2] and may_become_a_request(stream, len(found))
        return f"refused {outcome.refused} what may still become a request" if hasty else None
    if end[0] == "end":
        return f"ended {outcome.refused} behind the last request" if refused else None
    return None if refused else f"goes on, though the stream is at its end: {end}"


async def faults(streams: list[tuple[str, bytes]], rng: random.Random) -> list[str]:
    """Read every stream in every cut; the faults."""
    reader = Reader()
    wrong = []
    for name, stream in streams:
        expected = oracle().read(stream, 10_000)
        for how, pieces in cuts(stream, rng):
            outcome = await reader.read(pieces)
            if expected[1][0] == "reject" and not (outcome.refused or outcome.ended):
                outcome = await reader.read([*pieces, END])  # some heads are refused when they are whole
            if why := fault(stream, expected, outcome):
                wrong.append(f"{name}, {how} ({[len(piece) for piece in pieces]}): {stream!r}: {why}")
    return wrong


def test_every_stream_of_the_corpus_is_read_as_the_rfc_has_it() -> None:
    """Whole, cut behind each head, and cut at random."""
    wrong = asyncio.run(faults(corpus(), random.Random(1)))
    assert not wrong, f"{len(wrong)} wrong; the first: {wrong[:3]}"


@pytest.mark.parametrize("seed", seeds(SEEDS, 3))
def test_mutations_of_the_corpus_are_read_as_the_rfc_has_it(seed: int) -> None:
    """Streams with a few random changes."""
    rng = random.Random(seed)
    originals = [stream for _, stream in corpus() if len(stream) < 5000]
    streams = [
        (f"mutation {number}", mutated(rng.choice(originals), rng, originals, WORDS))
        for number in range(MUTATIONS // SEEDS)
    ]
    wrong = asyncio.run(faults(streams, rng))
    assert not wrong, f"{len(wrong)} wrong; the first: {wrong[:3]}"
