"""A cache of header sections, so that the same header lines are parsed and checked once.

A client sends the same header lines with each of its requests. The result of parsing and checking them is cached by
their exact bytes, for some hundreds of clients, together with the application's own results. That is safe: the same
bytes, from the end of the first line to the empty line, always mean the same.
"""

from __future__ import annotations

import re

from keypool.http.http1.responses import Headers

_MOST = 512  # sections
_LONGEST = 1024  # bytes of each
_MOST_LINES = 32  # of each: a line takes some 150 bytes more than its text

REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (/[\w/:.~?=&%,-]*) HTTP/1\.1\r\n")
"""A subset of the request lines that llhttp and the rules accept; all others are left to them."""


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
        if (
            len(data) - end == section.length
            and end - line.end() <= _LONGEST
            and len(section.lines) <= _MOST_LINES
        ):
            _make_room(self._by_bytes)
            self._by_bytes[data[line.end() : end]] = section


def _make_room(table: dict[Headers, HeaderSection] | dict[bytes, HeaderSection]) -> None:
    if len(table) >= _MOST:
        table.clear()
