"""The calls of the API as lines for a shell: what the dashboard's pages offer to copy.

A line never holds a token or a key: it names the variable that has the token, and keys by `id:N` or a
placeholder. What this module does not do: know the calls (operations.py does).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from keypool.auth import Role
from keypool.operations import OPERATIONS, Operation

_BODIES = {
    "acquire": '{"owner":"worker-7","wait":10}',
    "unblock": '{"lease":17}',
    "batch": '{"op":"generate","count":10}',
}
_QUERIES = {"list": "?order=expiry&limit=10"}


@dataclass(frozen=True, slots=True)
class CallLine:
    """A call as the API page shows it."""

    name: str
    method: str
    path: str
    roles: Sequence[str]
    summary: str
    errors: Sequence[str]
    line: str


def call_lines(site: str, is_open: bool) -> list[CallLine]:
    """Every call of the API, in the order of the table."""
    return [
        CallLine(
            operation.name,
            operation.method,
            f"/api/v1{operation.path}",
            sorted(role.value for role in operation.roles),
            operation.summary,
            [error.code for error in operation.errors],
            curl(
                site,
                is_open,
                operation,
                path=operation.path.replace("{key}", "$KEY") + _QUERIES.get(operation.name, ""),
                body=_BODIES.get(operation.name),
            ),
        )
        for operation in OPERATIONS
    ]


def key_lines(site: str, is_open: bool, key_id: int, names: Sequence[str]) -> dict[str, str]:
    """The calls that are about one key, by name."""
    return {
        operation.name: curl(
            site, is_open, operation, path=operation.path.replace("{key}", f"id:{key_id}"), role=Role.ADMIN
        )
        for operation in OPERATIONS
        if operation.name in names
    }


def curl(
    site: str,
    is_open: bool,
    operation: Operation,
    *,
    path: str,
    body: str | None = None,
    role: Role | None = None,
) -> str:
    """One call as a line."""
    words = ["curl", "-sS"]
    if operation.method != "GET":
        words += ["-X", operation.method]
    url = f"{site}/api/v1{path}"
    words.append(f'"{url}"' if "$" in url else shlex.quote(url))
    if not is_open:
        least = role or next(each for each in Role if each in operation.roles)
        words += ["-H", f'"Authorization: Bearer $KEYPOOL_{least.value.upper()}_TOKEN"']
    if body is not None:
        words += ["-d", f"'{body}'"]
    return " ".join(words)
