"""A cache of header sections, so that those which were read before need not be read again.

A client sends the same header lines with each of its requests. What llhttp and the rules made of them the first time
is cached by their very bytes, for some hundreds of clients, and so is what the application has found out about them.
This takes nothing on trust: the same bytes, from the end of the first line to the empty line, can't mean anything
else the next time.
"""

from __future__ import annotations

import re

from keypool.http.http1.responses import Headers

_MOST = 512  # sections
_LONGEST = 1024  # bytes of each
_MOST_LINES = 32  # of each: a line takes some 150 bytes beside its own

REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (/[\w/:.~?=&%,-]*) HTTP/1\.1\r\n")
"""A subset of the request lines that llhttp and the rules accept; all others are left to them."""


class HeaderSection:
    """The header lines of requests: in order, names in lower case, values without white space around them.

    `length` is that of the body, if a body of that length certainly follows, and then the next request; else None.
    `app_cache` is for the application, `cache_owner` is the object that has filled it.
    """

    __slots__ = ("app_cache", "cache_owner", "length", "lines")

    def __init__(self, lines: Headers) -> None:
        self.lines = lines
        self.length: int | None = None
        self.app_cache: object = None
        self.cache_owner: object = None


class Sections:
    """A few hundred header sections. When there are more, all are dropped."""

    def __init__(self) -> None:
        self._by_lines: dict[Headers, HeaderSection] = {}
        self._by_bytes: dict[bytes, HeaderSection] = {}
        self.lookup = self._by_bytes.get
        """The section that was stored by these bytes, or None. O(bytes)."""

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
        """Find this section by its bytes from now on. `data` is a whole request that has it. O(bytes)."""
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
