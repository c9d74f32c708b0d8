"""The audit log: which token did what to which keys, on the logger `keypool.audit`.

A line is written when the change is made, even if its caller has disconnected, and at any `--log-level`
(logs.py). It has ids and hints, never the text of a key, and of a token the first 8 hex digits
of its digest. A batch is one line with the number of keys, the first and the last. The API, signin.py
and wrong_tokens.py decide what is audited.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from keypool.core.answers import Identity
from keypool.core.keys import hint

Fact = str | float | None
"""The value of a further field of a line."""

_log = logging.getLogger("keypool.audit")
_KEY = re.compile(r"[A-Za-z0-9]{16,64}", re.ASCII)
_ID = re.compile(r"id:[0-9]{1,18}", re.ASCII)
_HANDLE = re.compile(r"h:([0-9]{1,19})\.[0-9]{1,19}\.[A-Za-z0-9_-]{11}", re.ASCII)


def audit(
    act: str,
    *,
    role: str,
    token: str,
    address: str,
    request_id: str,
    outcome: str = "ok",
    keys: Sequence[str] = (),
    count: int | None = None,
    facts: Mapping[str, Fact] = MappingProxyType({}),
) -> None:
    """Write one line. About 20 µs.

    `outcome` is `ok` or the code of an error; after `storage-unavailable` the change may still have been kept.
    `keys` are those of a single call, or with `count` the first and the last of a batch. `facts` are further fields.
    """
    fields: dict[str, Any] = {
        "act": act,
        "outcome": outcome,
        "role": role,
        "token": token,
        "address": address,
        "request_id": request_id,
        **facts,
    }
    story = [] if outcome == "ok" else [outcome]
    if count is not None:
        fields |= {"count": count} | dict(zip(("first", "last"), keys, strict=False))
        story.append(f"{count} keys")
    elif keys:
        fields["keys"] = list(keys)
    story += [
        " to ".join(keys),
        *(f"{name.replace('_', ' ')} {_shown(fact)}" for name, fact in facts.items()),
    ]
    _log.info(
        "%s by %s (token %s) from %s, request %s: %s",
        act,
        role,
        token,
        address,
        request_id,
        ", ".join(filter(None, story)) or outcome,
        extra={"audit": fields},
    )


def _shown(fact: Fact) -> str:
    return "null" if fact is None else f"{fact:.15g}" if isinstance(fact, float) else str(fact)


def known(key: Identity) -> str:
    """The name of a key in the audit log."""
    return f"id:{key.id} {key.hint}"


def asked_for(text: str) -> str:
    """The name of a text that a caller sent as a key, whether it is one or not: its id or hint, else `no key`.

    Of a handle, the id.
    """
    if _ID.fullmatch(text):
        return text
    if handle := _HANDLE.fullmatch(text):
        return f"id:{handle[1]}"
    return hint(text) if _KEY.fullmatch(text) else "no key"
