"""The generated tables of the documentation: `python -m keypool.api.reference` writes them.

A table is in a page between `<!-- NAME -->` and `<!-- /NAME -->`; a test fails if it isn't up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from keypool.api.first_version import LEGACY
from keypool.api.operations import OPERATIONS, Operation
from keypool.api.problems import status_of
from keypool.config.settings import settings_table
from keypool.core.errors import KeypoolError
from keypool.ops.advice import ADVICE
from keypool.ops.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"


def calls_table() -> str:
    """Every call: method and path, role, what it does, its own errors."""
    rows: list[tuple[str, ...]] = [("call", "role", "what it does", "its own errors"), ("---",) * 4]
    rows += [_call_row(operation) for operation in OPERATIONS + LEGACY]
    return _table(rows)


def errors_table() -> str:
    """Every error code, by status."""
    rows: list[tuple[str, ...]] = [("status", "code", "when"), ("---",) * 3]
    for error in sorted(_errors(KeypoolError), key=lambda each: (status_of(each), each.code)):
        when = (error.__doc__ or "").strip().splitlines()[0]
        rows.append((str(int(status_of(error))), f"`{error.code}`", when))
    return _table(rows)


def metrics_table() -> str:
    """Every metric."""
    rows: list[tuple[str, ...]] = [("metric", "kind", "labels", "what it is"), ("---",) * 4]
    rows += [(f"`{each.name}`", each.kind, each.labels or "none", each.about) for each in METRICS]
    return _table(rows)


def advice_table() -> str:
    """Every warning of the dashboard."""
    rows: list[tuple[str, ...]] = [("alert", "the dashboard says", "it means", "do"), ("---",) * 4]
    return _table(rows + [each.table_row for each in ADVICE])


TABLES: dict[str, Callable[[], str]] = {
    "advice": advice_table,
    "calls": calls_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "settings": settings_table,
}


def with_tables(page: str) -> str:
    """A page with its tables up to date."""
    for name, make in TABLES.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if start and end:
            page = f"{before}{start}{make()}\n{end}{after}"
    return page


def _call_row(operation: Operation) -> tuple[str, ...]:
    codes = [f"{int(status_of(error))} `{error.code}`" for error in operation.errors]
    role = next(role for role in ("client", "viewer", "admin") if role in operation.roles)
    who = "client; viewer" if len(operation.roles) == 3 else role
    return f"`{operation.method} {operation.path}`", who, operation.summary, ", ".join(codes)


def _errors(root: type[KeypoolError]) -> Iterator[type[KeypoolError]]:
    """All classes of errors.py that define a code."""
    if "code" in vars(root):
        yield root
    for child in root.__subclasses__():
        if child.__module__ == KeypoolError.__module__:
            yield from _errors(child)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
