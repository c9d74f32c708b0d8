"""The calls of the API as shell lines, which the dashboard's pages offer to copy.

A line never contains a token or a key, but the variable that has the token, and `id:N` or `$KEY`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from keypool.api.auth import Role
from keypool.api.calls import BASE
from keypool.api.operations import OPERATIONS, Operation

EXAMPLES = {
    "acquire": '{"owner":"worker-7","wait":10}',
    "unblock": '{"lease":17}',
    "extend": '{"lease":17,"seconds":60}',
    "quarantine": '{"reason":"billing is overdue"}',
    "batch": '{"op":"acquire","count":10}',
    "generate": '{"secret":"sk-live-3f0c2e91","name":"acct-17","data":{"user":"x"},"expire":true}',
    "find": '{"key":"acct-17"}',
    "update": '{"name":"acct-18","labels":{"region":"us"}}',
    "owners-release": '{"owner":"worker-7"}',
    "replace": '{"secret":"sk-live-77d1a5b0"}',
    "pool-put": '{"block_seconds":300,"keepalive_seconds":null}',
    "pool-change": '{"max_block_seconds":3600}',
}
"""A body of each operation that takes one, by name."""
_WITHOUT_BODY = {"generate"}  # the calls that most often have none
_QUERIES = {"list": "?order=expiry&limit=10"}


@dataclass(frozen=True, slots=True)
class CallLine:
    """A row of the dashboard's API page."""

    name: str
    method: str
    path: str
    roles: Sequence[str]
    summary: str
    errors: Sequence[str]
    line: str


def call_lines(site: str, is_open: bool) -> list[CallLine]:
    """Every call of the API, in the order of `OPERATIONS`. `site` is the server's URL without a path."""
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
                path=operation.path.replace("{key}", "$KEY").replace("{pool}", "openai")
                + _QUERIES.get(operation.name, ""),
                body=EXAMPLES.get(operation.name) if operation.name not in _WITHOUT_BODY else None,
                role=None if is_open else _least(operation),
            ),
        )
        for operation in OPERATIONS
    ]


def key_lines(
    site: str, role: Role | None, key_id: int, lease: int | None, names: Sequence[str], *, pool: str = ""
) -> dict[str, str]:
    """The operations `names` for one key, with the token of a role, or without one if `role` is None.

    `pool` is the beginning of the paths of another pool than `default`, /pools/NAME.

    Unblock names the key's latest lease, so that the line frees nothing if somebody else has acquired the key since.
    """
    body = None if lease is None else f'{{"lease":{lease}}}'
    return {
        operation.name: curl(
            site,
            operation,
            path=pool + operation.path.replace("{key}", f"id:{key_id}"),
            body=body if operation.name == "unblock" else None,
            role=role,
        )
        for operation in OPERATIONS
        if operation.name in names
    }


def generate_line(site: str, is_open: bool, pool: str = "") -> str:
    """The line of a batch that generates ten keys. `pool` as for `key_lines`."""
    batch = next(operation for operation in OPERATIONS if operation.name == "batch")
    return curl(
        site,
        batch,
        path=pool + batch.path,
        body='{"op":"generate","count":10}',
        role=None if is_open else Role.ADMIN,
    )


def curl(site: str, operation: Operation, *, path: str, body: str | None, role: Role | None) -> str:
    """One call as a line, with the token of a role, or without one if `role` is None."""
    words = ["curl", "-sS"]
    implied = "GET"
    if body is not None:
        words += ["--json", shlex.quote(body)]  # implies the content type, too
        implied = "POST"
    if operation.method != implied:
        words += ["-X", operation.method]
    if role is not None:
        words += ["-H", f'"Authorization: Bearer $KEYPOOL_{role.value.upper()}_TOKEN"']
    words.append(
        '"$KEY"'.join(shlex.quote(part) if part else "" for part in f"{site}{BASE}{path}".split("$KEY"))
    )
    return " ".join(words)


def _least(operation: Operation) -> Role:
    return next(role for role in Role if role in operation.roles)
