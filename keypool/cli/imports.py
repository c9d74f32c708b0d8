"""`keypool import FILE`: imports keys from CSV, JSON lines, or a secret a line.

    CSV          a header with the columns secret, name, seats, label:REGION, data:USER; also between ; or tabs
    JSON lines   an object a line: {"secret": …, "name": …, "labels": {…}, "data": {…}, "pace": {…}, "seats": 5}
    lines        a secret a line

A header or a format that is wrong refuses the file, and nothing is imported. A line that is wrong fails alone, as one
that the server refuses does, and is reported by its number. Nothing of a line is ever printed but its number.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from keypool.cli.connection import connect
from keypool.cli.input import in_words, read_input
from keypool.cli.keys import output_of
from keypool.cli.output import Progress, note
from keypool.cli.status import CommandError, Status
from keypool.client import Imported, Imports, KeyPoolError
from keypool.client.imports import NewKey, new_key

_DELIMITERS = ",;\t"
_COLUMNS = ("secret", "name", "seats")
_GROUPS = {"label": "labels", "data": "data"}
_LONGEST_FIELD = 16 * 1024 * 1024  # characters of a field of CSV; the server refuses far shorter ones


class Line(NamedTuple):
    """A key of the file, with the number of its line, or what is wrong there."""

    number: int
    item: NewKey | None
    problem: str = ""


def import_keys(args: argparse.Namespace) -> Status:
    """Import the keys of a file; print how many, and a note for each line that failed."""
    lines = parse(read_input(args.file), args.format, in_words(args.file))
    good = [line for line in lines if line.item is not None]
    items = [line.item for line in good if line.item is not None]
    done = Imports()
    with connect(args) as pool, Progress("importing", len(items)) as bar:
        try:
            done = pool.import_many(items, exists=args.exists, expire=args.expire, progress=bar)
        except KeyPoolError as error:
            if isinstance(error.partial, Imports):
                done = error.partial
            raise
        finally:
            if len(done.results) < len(items) and done.results:
                bar.clear()
                note(f"the first {len(done.results)} of {len(items)} keys were imported; a repeat skips them")
    failures = sorted([*_refused(good, done.results), *_wrong(lines)])
    _print(args, done, failures, len(lines))
    return Status.FAILED if failures else Status.OK


def _refused(lines: Sequence[Line], results: Sequence[Imported]) -> Iterator[tuple[int, str, str]]:
    """The line, the code and the detail of each item that the server refused."""
    for line, result in zip(lines, results, strict=False):
        if result.status == "failed":
            yield line.number, result.code or "failed", result.detail or ""


def _wrong(lines: Sequence[Line]) -> Iterator[tuple[int, str, str]]:
    return ((line.number, "bad-request", line.problem) for line in lines if line.item is None)


def _print(
    args: argparse.Namespace, done: Imports, failures: Sequence[tuple[int, str, str]], total: int
) -> None:
    counts = {name: getattr(done, name) for name in ("created", "updated", "existed", "duplicate")}
    counts["failed"] = len(failures)
    for number, code, detail in failures:
        note(f"line {number}: {detail} ({code})")
    if args.json:
        members = ("line", "code", "detail")
        counts |= {"failures": [dict(zip(members, each, strict=True)) for each in failures]}
    output_of(args).fields(counts)
    if done.repeated and done.existed:
        note(
            "an answer was lost and the call repeated: the first may have created keys that are counted as existed"
        )
    if not total:
        note(f"there is no key in {in_words(args.file)}")


# -- reading


def parse(text: str, format: str | None, file: str) -> list[Line]:
    """The keys in a file's text, in the order of their lines. Raises CommandError for any other content."""
    kind = format or _detected(text, file)
    read = {"csv": _csv, "json": _json_lines, "lines": _plain_lines}[kind]
    return [_checked(line) for line in read(text, file)]


def _first_line(text: str) -> str:
    return next((line for _, line in _filled(text)), "")


def _detected(text: str, file: str) -> str:
    first = _first_line(text)
    if first.startswith("{"):
        return "json"
    if first.startswith("["):
        raise CommandError(
            f"{file} seems to be a JSON array: it takes an object a line (jq -c '.[]' {file}), or --format lines",
            Status.USAGE,
        )
    header = _header(text)
    if "secret" in header:
        return "csv"
    if any(column == "name" or column.partition(":")[0] in _GROUPS for column in header):
        raise CommandError(
            f"{file} seems to be CSV, and has no column secret in its first line", Status.USAGE
        )
    delimiter = _delimiter(text)
    counts = {line.count(delimiter) for _, line in _filled(text)}
    if len(counts) == 1 and 0 not in counts:
        raise CommandError(
            f"{file} seems to be CSV without a first line that names its columns (secret, name, …); if each line is "
            "a secret: --format lines",
            Status.USAGE,
        )
    return "lines"


def _delimiter(text: str) -> str:
    """The one that gives the first line the most columns."""
    return max(_DELIMITERS, key=_first_line(text).count)


def _header(text: str) -> list[str]:
    row = next(csv.reader([_first_line(text)], delimiter=_delimiter(text)), [])
    return [column.strip() for column in row]


def _csv(text: str, file: str) -> Iterator[Line]:
    columns = _header(text)
    _check_header(columns, file)
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
        end = 0
        header_read = False
        for row in reader:
            start, end = end + 1, reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if not header_read:
                header_read = True
                continue
            if len(row) > len(columns):
                yield Line(start, None, f"it has {len(row)} columns, and the header has {len(columns)}")
            else:
                yield Line(start, _item(columns, row))
    except csv.Error as error:
        raise CommandError(f"{file} is no CSV after line {end}: {error}", Status.USAGE) from None
    finally:
        csv.field_size_limit(before)


def _check_header(columns: Sequence[str], file: str) -> None:
    if "secret" not in columns:
        raise CommandError(f"{file} has no column secret in its first line", Status.USAGE)
    for column in columns:
        group, colon, name = column.partition(":")
        if column not in _COLUMNS and not (group in _GROUPS and colon and name):
            raise CommandError(
                f"{file} has a column {column[:40]!r}: it takes secret, name, seats, label:NAME and data:NAME",
                Status.USAGE,
            )
        if columns.count(column) > 1:
            raise CommandError(f"{file} has the column {column[:40]!r} twice", Status.USAGE)


def _item(columns: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    """The key of a row; an empty cell is as if it weren't there, but for the secret."""
    item: dict[str, Any] = {"secret": ""}
    for column, cell in zip(columns, row, strict=False):
        value = cell.strip()
        group, _, name = column.partition(":")
        if not value:
            continue
        if column == "seats":
            item[column] = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
        elif column in _COLUMNS:
            item[column] = value
        else:
            item.setdefault(_GROUPS[group], {})[name] = value
    return item


def _json_lines(text: str, file: str) -> Iterator[Line]:
    for number, line in _filled(text):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            yield Line(number, None, "it is not JSON")
            continue
        if isinstance(found, dict):
            yield Line(number, found)
        else:
            yield Line(number, None, "it is not a JSON object")


def _plain_lines(text: str, file: str) -> Iterator[Line]:
    return (Line(number, line) for number, line in _filled(text))


def _filled(text: str) -> Iterator[tuple[int, str]]:
    """The lines that aren't empty, without the spaces around them, with their numbers."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return ((number, line) for number, line in lines if line)


def _checked(line: Line) -> Line:
    """The line, or what is wrong with it, in place of the ValueError that the client would raise for the whole file."""
    try:
        if line.item is not None:
            new_key(line.item)
    except ValueError as error:
        return Line(line.number, None, str(error))
    return line
