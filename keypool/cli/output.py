"""What a command prints: a table for people on a terminal, tab-separated lines in a pipe, JSON if asked.

Plain lines have no heading and the same columns always, so that `cut -f` and `while read` work on them. JSON
is one document a line. Keys are masked in all three unless `--show-keys` asks for them. Everything that is no
result (notes, progress, errors) goes to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from keypool.client.answers import hint

Row = dict[str, Any]

_BATCH = 500  # rows that a table's widths are reckoned from


class Output:
    """Prints results in the form that was asked for. Values are JSON's; `key` is the text of a key."""

    def __init__(self, *, as_json: bool, show_keys: bool) -> None:
        self.as_json = as_json
        self.show_keys = show_keys
        self.terminal = sys.stdout.isatty()

    def rows(self, columns: Sequence[str], rows: Iterable[Row]) -> int:
        """Print rows as they come; how many there were."""
        count = 0
        pending: list[Row] = []
        headed = False
        for row in rows:
            count += 1
            if not self.terminal or self.as_json:
                self.line(columns, row)
                continue
            pending.append(row)
            if len(pending) == _BATCH:
                self._table(columns, pending, heading=not headed)
                headed = True
                pending.clear()
        if pending:
            self._table(columns, pending, heading=not headed)
        sys.stdout.flush()
        return count

    def line(self, columns: Sequence[str], row: Row) -> None:
        """Print one row by itself, whole as JSON, or its columns."""
        shown = self._masked(row)
        if self.as_json:
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print("\t".join(_plain(shown.get(column)) for column in columns))

    def fields(self, row: Row) -> None:
        """Print one thing with many members: a line a member, its name first."""
        shown = self._masked(row)
        if self.as_json:
            print(json.dumps(shown, ensure_ascii=False))
        elif self.terminal:
            width = max(map(len, shown))
            print("\n".join(f"{name:<{width}}  {_nice(value)}" for name, value in shown.items()))
        else:
            print("\n".join(f"{name}\t{_plain(value)}" for name, value in shown.items()))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell the user something that is no result."""
        print(f"keypool: {text}", file=sys.stderr)

    def masked(self, key: str) -> str:
        """A key as it may be shown."""
        return key if self.show_keys else hint(key)

    def _masked(self, row: Row) -> Row:
        return {name: self.masked(value) if name == "key" else value for name, value in row.items()}

    def _table(self, columns: Sequence[str], rows: Sequence[Row], *, heading: bool) -> None:
        lines = [[_nice(self._masked(row).get(column)) for column in columns] for row in rows]
        names = [column.replace("_", " ").upper() for column in columns]
        widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
        across = shutil.get_terminal_size().columns
        if heading:
            print(_bold(_laid_out(names, widths)[:across]))
        for line in lines:
            print(_laid_out(line, widths).rstrip())


def _laid_out(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))


def _bold(text: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def _plain(value: object) -> str:
    """A value in a line: empty for none; tabs and line breaks can't be in it."""
    if value is None:
        return ""
    return str(value).replace("\t", " ").replace("\n", " ")


def _nice(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """Text that can't move the cursor: an owner's name is whatever its client sent."""
    return "".join(character if character.isprintable() else "�" for character in text)
