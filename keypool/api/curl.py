"""The calls of the API as lines for a shell: what the dashboard's pages offer to copy.

A line never holds a token or a key: it names the variable that has the token, and keys by `id:N` or a
placeholder. What this module does not do: know the calls (operations.py does).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from keypool.api.auth import Role
from keypool.api.operations import BASE, OPERATIONS, Operation

_BODIES = {
    "acquire": '{"owner":"worker-7","wait":10}',
    "unblock": '{"lease":17}',
    "batch": '{"op":"acquire","count":10}',
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
            BASE + operation.path,
            sorted(role.value for role in operation.roles),
            operation.summary,
            [error.code for error in operation.errors],
            curl(
                site,
                operation,
                path=operation.path.replace("{key}", "$KEY") + _QUERIES.get(operation.name, ""),
                body=_BODIES.get(operation.name),
                role=None if is_open else _least(operation),
            ),
        )
        for operation in OPERATIONS
    ]


def key_lines(
    site: str, role: Role | None, key_id: int, lease: int | None, names: Sequence[str]
) -> dict[str, str]:
    """The calls that are about one key, by name, for somebody of this role; None where no token is wanted.

    Unblock names the key's latest lease: pasted when somebody else has the key, it takes it from nobody.
    """
    body = None if lease is None else f'{{"lease":{lease}}}'
    return {
        operation.name: curl(
            site,
            operation,
            path=operation.path.replace("{key}", f"id:{key_id}"),
            body=body if operation.name == "unblock" else None,
            role=role,
        )
        for operation in OPERATIONS
        if operation.name in names
    }


def generate_line(site: str, is_open: bool) -> str:
    """What fills an empty pool."""
    batch = next(operation for operation in OPERATIONS if operation.name == "batch")
    return curl(
        site,
        batch,
        path=batch.path,
        body='{"op":"generate","count":10}',
        role=None if is_open else Role.ADMIN,
    )


def curl(site: str, operation: Operation, *, path: str, body: str | None, role: Role | None) -> str:
    """One call as a line. `role` is whose token is sent, none if it is None."""
    words = ["curl", "-sS"]
    if body is not None:
        words += ["--json", shlex.quote(body)]  # it makes a POST of it, of the content type that is wanted
    elif operation.method != "GET":
        words += ["-X", operation.method]
    if role is not None:
        words += ["-H", f'"Authorization: Bearer $KEYPOOL_{role.value.upper()}_TOKEN"']
    words.append(
        '"$KEY"'.join(shlex.quote(part) if part else "" for part in f"{site}{BASE}{path}".split("$KEY"))
    )
    return " ".join(words)


def _least(operation: Operation) -> Role:
    return next(role for role in Role if role in operation.roles)
