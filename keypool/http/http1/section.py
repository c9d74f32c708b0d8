"""Header sections that were read before, so that they need not be read again.

A client sends the same header lines with each of its requests. What llhttp and the rules made of them the first
time is remembered by their very bytes, for some hundreds of clients, and so is what the application knows of
them. Nothing is taken on trust by that: these bytes, from the first line's end to the empty line, can't mean
anything else the next time.
"""

from __future__ import annotations

import re

from keypool.http.http1.responses import Headers

_MOST = 512  # sections
_LONGEST = 1024  # bytes of each
_MOST_LINES = 32  # of each: a line takes some 150 bytes beside its own

REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (/[\w/:.~?=&%,-]*) HTTP/1\.1\r\n")
"""Those that llhttp takes, too, and the rules; it takes others, which are left to it."""


class HeaderSection:
    """The header lines of requests: in order, names in lower case, values without white space around them.

    `length` is that of the body, if it is plain to see that a body of that length follows and then the next
    request; else None. `note` is the application's, `noted_by` whoever left it.
    """

    __slots__ = ("length", "lines", "note", "noted_by")

    def __init__(self, lines: Headers) -> None:
        self.lines = lines
        self.length: int | None = None
        self.note: object = None
        self.noted_by: object = None


class Sections:
    """A few hundred header sections. Which of them are forgotten when there are more is left to chance."""

    def __init__(self) -> None:
        self._by_lines: dict[Headers, HeaderSection] = {}
        self._by_bytes: dict[bytes, HeaderSection] = {}
        self.recall = self._by_bytes.get
        """The section that was remembered by these bytes, or None. O(bytes)."""

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

    def remember(self, data: bytes, section: HeaderSection) -> None:
        """Know this section by its bytes from now on. `data` is a whole request that has it. O(bytes)."""
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
