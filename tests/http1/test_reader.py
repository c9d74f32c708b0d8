"""The reader alone, without a loop, a transport or a connection: bytes in, calls of its sink out."""

from __future__ import annotations

from typing import Any

import pytest

from http1.harness import chunked, request
from keypool.config.limits import Limits
from keypool.http.http1.reader import HOLDING, READING, STOPPED, RequestReader
from keypool.http.http1.request import Request
from keypool.http.http1.responses import Refusal
from keypool.http.http1.section import Sections


class Sink:
    """Notes what a reader calls, and answers no request."""

    def __init__(self, sections: Sections | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.reader = RequestReader(self, Limits(body_bytes=10), sections or Sections(), keeps_alive=True)

    def request_started(self, request: Request) -> None:
        self.calls.append(("started", request.method, request.target))

    def advance(self, request: Request) -> None:
        assert request.received
        self.calls.append(("received", b"" if request.body is None else request.body.take()))

    def refuse(self, refusal: Refusal) -> None:
        self.reader.stop()
        self.calls.append(("refused", refusal.status))

    def too_large(self, request: Request) -> bool:
        return False


STREAM = request("/1") + request("/2", body=b"abc", method="POST") + chunked("/3", b"de", b"f")
CALLS = [
    ("started", b"GET", b"/1"),
    ("received", b""),
    ("started", b"POST", b"/2"),
    ("received", b"abc"),
    ("started", b"POST", b"/3"),
    ("received", b"def"),
]


@pytest.mark.parametrize("size", [1, 2, 7, 50, len(STREAM)])
def test_the_calls_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    """And every byte is consumed."""
    sink = Sink()
    for at in range(0, len(STREAM), size):
        piece = STREAM[at : at + size]
        assert sink.reader.feed(piece) == len(piece)
    assert sink.calls == CALLS
    assert sink.reader.state == READING
    assert not sink.reader.begun


def test_a_header_section_is_taken_from_the_cache_when_it_was_read_before() -> None:
    """On whichever connection; with the same calls as by the parser."""
    sections = Sections()
    first, second = Sink(sections), Sink(sections)
    one = request("/2", body=b"abc", method="POST")
    assert first.reader.try_cached(one) == 0
    first.reader.feed(one)
    assert second.reader.try_cached(one) == len(one)
    assert first.calls == second.calls == CALLS[2:4]


def test_an_upgrade_holds_what_follows() -> None:
    """Until it was answered as HTTP: then that is read as the next request."""
    sink = Sink()
    upgrade = request("/1", "Connection: Upgrade", "Upgrade: other")
    assert sink.reader.feed(upgrade + request("/2")) == len(upgrade)
    assert sink.reader.state == HOLDING
    sink.reader.go_on()
    sink.reader.feed(request("/2"))
    assert [call[-1] for call in sink.calls if call[0] == "started"] == [b"/1", b"/2"]


@pytest.mark.parametrize(
    ("stream", "calls"),
    [
        (request("/1", "Connection: close"), CALLS[:2]),
        (b"BREW /1 HTTP/1.1\r\n", [("refused", 501)]),
        (b"GET /1 HTTP/1.1\r\n\r\n", [("refused", 400)]),
        (
            request("/2", body=b"x" * 11, method="POST"),
            [CALLS[2], ("received", b"x" * 11)],
        ),
    ],
    ids=["the last request", "an unknown method", "no host", "a body whose limit may still be changed"],
)
def test_nothing_is_read_behind_the_end(stream: bytes, calls: list[Any]) -> None:
    """Neither behind the last request nor behind a refusal; a body over the limit is the connection's to refuse."""
    sink = Sink()
    sink.reader.feed(stream)
    if sink.reader.state == READING:
        sink.reader.stop()
    assert sink.reader.state == STOPPED
    assert sink.reader.feed(request("/inside")) == len(request("/inside"))
    assert sink.calls == calls
