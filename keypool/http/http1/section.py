"""A cache of header sections, so that the same header lines are parsed and checked once.

A client sends the same header lines with each of its requests. The result of parsing and checking them is cached by
their exact bytes, for some hundreds of clients, together with the application's own results. That is safe: the same
bytes, from the end of the first line to the empty line, always mean the same.

One header has another value in each request: Idempotency-Key. Its line is not part of a section, and is read from
each request by itself.
"""

from __future__ import annotations

import re

from keypool.http.http1.responses import Headers

_MOST = 512  # sections
_LONGEST = 1024  # bytes of each
_MOST_LINES = 32  # of each: a line takes some 150 bytes more than its text

REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (/[\w/:.~?=&%,-]*) HTTP/1\.1\r\n")
"""A subset of the request lines that llhttp and the rules accept; all others are left to them."""

VARYING = b"idempotency-key"
"""The header that is not part of a section, if it occurs once and its value has the usual form."""

_VALUE = re.compile(rb"[!-~]{1,64}")
_BEGINNINGS = (b"\r\nIdempotency-Key: ", b"\r\nidempotency-key: ")
# A line that begins with white space would continue this one.
_REST = re.compile(rb"(%b)\r\n(?![ \t])" % _VALUE.pattern)


def cut_varying(data: bytes, start: int, end: int) -> tuple[bytes, bytes | None]:
    """Header lines without the Idempotency-Key line, and its value; None if there is none. O(end - start).

    The lines are `data[start:end]`, behind a line break. A line that isn't cut, because it is spelt otherwise or has
    another value, is left where it is, so it is never lost.
    """
    for beginning in _BEGINNINGS:
        at = data.find(beginning, start - 2, end)
        if at >= 0 and (rest := _REST.match(data, at + len(beginning), end)):
            return data[start : at + 2] + data[rest.end() : end], rest[1]
    return data[start:end], None


def split_varying(lines: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """Parsed header lines without the Idempotency-Key, and its value; all lines and None if it isn't cut. O(lines)."""
    values = [value for name, value in lines if name == VARYING]
    if len(values) != 1 or not _VALUE.fullmatch(values[0]):
        return lines, None
    return [line for line in lines if line[0] != VARYING], values[0]


class HeaderSection:
    """The header lines of requests: in order, names in lower case, values without surrounding white space.

    `length` is the body's in bytes, or None if a request with these lines has to be parsed. `app_cache` is for the
    application, `cache_owner` is the object that has filled it.
    """

    __slots__ = ("app_cache", "cache_owner", "length", "lines")

    def __init__(self, lines: Headers) -> None:
        self.lines = lines
        self.length: int | None = None
        self.app_cache: object = None
        self.cache_owner: object = None


class Sections:
    """Up to 512 header sections. When there would be more, all are dropped."""

    def __init__(self) -> None:
        self._by_lines: dict[Headers, HeaderSection] = {}
        self._by_bytes: dict[bytes, HeaderSection] = {}
        self.lookup = self._by_bytes.get
        """The section that was stored under these bytes, or None. O(bytes)."""

    def of(self, lines: Headers) -> HeaderSection:
        """The section of these lines, which may have been read before. O(lines)."""
        lines = tuple(lines)
        section = self._by_lines.get(lines)
        if section is None:
            section = HeaderSection(lines)
            if len(lines) <= _MOST_LINES and sum(len(n) + len(v) for n, v in lines) <= _LONGEST:
                _make_room(self._by_lines)
                self._by_lines[lines] = section
        return section

    def store(self, data: bytes, section: HeaderSection) -> None:
        """Make `lookup` find this section from now on. `data` is a whole request that has it. O(bytes)."""
        line = REQUEST_LINE.match(data)
        if line is None:
            return
        end = data.find(b"\r\n\r\n", line.end() - 2) + 4
        lines, _ = cut_varying(data, line.end(), end)
        if (
            len(data) - end == section.length
            and len(lines) <= _LONGEST
            and len(section.lines) <= _MOST_LINES
            and VARYING not in lines.lower()
        ):
            _make_room(self._by_bytes)
            self._by_bytes[lines] = section


def _make_room(table: dict[Headers, HeaderSection] | dict[bytes, HeaderSection]) -> None:
    if len(table) >= _MOST:
        table.clear()
