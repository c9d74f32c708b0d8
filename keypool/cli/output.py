"""What a command prints: a table on a terminal, tab-separated lines in a pipe, JSON with `--json`.

Lines in a pipe have no heading and always the same columns, for `cut -f` and `while read`. JSON is one
document a line. Notes, progress and errors go to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Self

from keypool.client.answers import hint
from keypool.client.calls import is_reference

Row = dict[str, Any]

BATCH = 1000
"""Items per batch call."""

_ROWS_MEASURED = 500  # rows that are read before the widths of a table's columns are chosen
_IF_GIVEN = ("name", "labels", "client", "pace")
_IF_SEVERAL = ("seat", "seats")
"""Columns that a table has only if one of the rows that are read first has something, or several seats, in them."""
_WIDEST = {
    "owner": 20,
    "name": 24,
    "labels": 40,
    "reason": 40,
}  # characters in a table; they may have many more


class Output:
    """Prints the results of one command. Values are JSON's; the member `key` is masked unless `show_keys`."""

    def __init__(self, *, as_json: bool, show_keys: bool = False) -> None:
        self.show_keys = show_keys
        self.as_json = as_json
        self.as_table = sys.stdout.isatty() and not as_json
        self._columns: Sequence[str] = ()
        self._widths: list[int] = []

    def rows(self, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Print rows as they come. May be called again for more rows of the same table."""
        if self.as_table:
            remaining = iter(rows)
            while part := list(islice(remaining, _ROWS_MEASURED)):
                self._table(columns, part)
        else:
            for row in rows:
                self._line(columns, row)
        sys.stdout.flush()

    def _line(self, columns: Sequence[str], row: Row) -> None:
        shown = self._masked(row)
        if self.as_json:
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print("\t".join(_plain(shown.get(column)) for column in columns))

    def fields(self, row: Row) -> None:
        """Print one object: a line for each member, with its name first."""
        if self.as_json:
            self.rows((), [row])
            return
        width = max(map(len, row))
        for name, value in self._masked(row).items():
            print(f"{name:<{width}}  {_cell(value)}" if self.as_table else f"{name}\t{_plain(value)}")
        sys.stdout.flush()

    def masked(self, key: str) -> str:
        """A key's text as this command may show it."""
        return key if self.show_keys or is_reference(key) else hint(key)

    def _masked(self, row: Row) -> Row:
        return row | {"key": self.masked(row["key"])} if "key" in row else row

    def _table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        if not self._widths:
            self._columns = [
                each for each in columns if each not in _IF_GIVEN or any(row.get(each) for row in rows)
            ]
            if not any(row.get("seats", 1) > 1 for row in rows):
                self._columns = [each for each in self._columns if each not in _IF_SEVERAL]
        columns = self._columns
        lines = [[_cell(row.get(column), column) for column in columns] for row in map(self._masked, rows)]
        if not self._widths:
            names = [column.removesuffix("_in").replace("_", " ").upper() for column in columns]
            self._widths = _fitting([max(map(len, cells)) for cells in zip(names, *lines, strict=True)])
            print(_bold(self._laid_out(names)))
        for line in lines:
            print(self._laid_out(line))

    def _laid_out(self, cells: Sequence[str]) -> str:
        # Columns that don't fit the terminal have no width, and are left out.
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, self._widths, strict=False))
        return "  ".join(padded).rstrip()


def note(text: str) -> None:
    """Print one line to standard error, for anything that isn't a result."""
    print(f"keypool: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _fitting(widths: list[int]) -> list[int]:
    """The widths of the leading columns that fit the terminal; at least one."""
    available = shutil.get_terminal_size().columns
    while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > available:
        widths = widths[:-1]
    return widths


def _bold(text: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def _plain(value: object) -> str:
    return "" if value is None else _text(value).replace("\t", " ").replace("\n", " ")


def _text(value: object) -> str:
    return (
        ",".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
    )


def _cell(value: object, column: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value:.1f}" if isinstance(value, float) else printable(_text(value)) or "-"
    widest = _WIDEST.get(column, len(text))
    return text if len(text) <= widest else f"{text[: widest - 1]}…"


def printable(text: str) -> str:
    """The text with control characters replaced: clients choose owners' names and reasons."""
    return "".join(character if character.isprintable() else "�" for character in text)


class Progress:
    """`with Progress("deleting", 5000) as bar: …progress=bar`: a bar on standard error, erased at the end.

    Only for batches that take several calls, and on a terminal.
    """

    def __init__(self, doing: str, total: int, *, shown: bool = True) -> None:
        self._doing, self._total = doing, total
        self._shown = shown and total > BATCH and sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        """Redraw the bar for this number of items."""
        if self._shown:
            share = min(1.0, done / self._total)
            width = max(10, min(40, shutil.get_terminal_size().columns - 40))
            bar = "#" * round(share * width)
            sys.stderr.write(f"\r{self._doing} [{bar:<{width}}] {done}/{self._total} {share:4.0%}")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        self(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Erase the bar."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
