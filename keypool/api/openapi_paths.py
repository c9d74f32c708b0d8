"""What OpenAPI says of the paths that are no operations (pages, metrics, the feed), and the parts that all share.

It is written by hand, as these paths are; a test asks each whether it is so.
"""

from __future__ import annotations

from typing import Any

from keypool.api.operations import BASE
from keypool.api.problems import CONTENT_TYPE

Described = dict[str, Any]

HEADERS: Described = {
    "X-Request-Id": {
        "description": "the caller's, if it was fit to be shown, else a new one; it leads to the server's log",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    },
    "Cache-Control": {"schema": {"type": "string", "enum": ["no-store"]}},
    "Location": {"description": "where the key is", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "whole seconds: of a 404 to the earliest release, when some key is blocked",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"schema": {"type": "string"}},
}


def _headers(*names: str) -> Described:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


OF_ALL = _headers("X-Request-Id", "Cache-Control")
LOCATION = _headers("Location")
_OF_ANY_PAGE = {
    "403": "cross-site",
    "408": "request-timeout",
    "413": "payload-too-large",
    "414": "uri-too-long",
    "421": "wrong-host",
    "431": "headers-too-large",
    "500": "internal",
}
_OF_STATUS = {
    "401": _headers("WWW-Authenticate"),
    "404": _headers("Retry-After"),
    "503": _headers("Retry-After"),
}


def problem(codes: str, schema: Described, status: str) -> Described:
    """The answer that is a problem with one of these codes."""
    return {
        "description": codes,
        "headers": OF_ALL | _OF_STATUS.get(status, {}),
        "content": {CONTENT_TYPE: {"schema": schema}},
    }


def beside(schema: Described, open: bool) -> Described:
    """The paths, by path. `schema` is that of a problem; `open` is without tokens."""

    def page(
        name: str, summary: str, answers: Described, codes: dict[str, str], roles: str = ""
    ) -> Described:
        refusals = _OF_ANY_PAGE | codes
        described: Described = {"operationId": name, "summary": summary}
        if roles:
            described["description"] = f"Roles: {roles}."
        if not open:
            described["security"] = [{"token": []}] if roles else []
        if roles and not open:
            refusals |= {"401": "unauthorized", "403": "cross-site, forbidden"}
        told = {status: problem(code, schema, status) for status, code in sorted(refusals.items())}
        return {"get": described | {"responses": answers | told}}

    return {
        "/healthz": page("health", "Whether the loop turns.", _status("ok"), {}),
        "/readyz": page(
            "ready",
            "Whether calls are served.",
            _status("ready", "which part of the pool can't be reached, if some can't"),
            {"503": "draining, loading, storage-unavailable"},
        ),
        "/metrics": page(
            "metrics",
            "Metrics in Prometheus's text format.",
            _text("text/plain"),
            {"503": "loading, storage-unavailable"},
            "admin, viewer",
        ),
        f"{BASE}/feed": page(
            "feed",
            "A websocket of what changes: hello, then deltas and beats (docs/api.md). A plain GET is 426.",
            {"101": {"description": "the websocket is open"}},
            {
                "400": "bad-request",
                "426": "upgrade-required",
                "429": "too-many-viewers",
                "503": "draining, loading",
            },
            "admin, viewer, or a dashboard's cookie",
        ),
    }


def _status(word: str, detail: str = "") -> Described:
    properties: Described = {"status": {"type": "string", "enum": [word]}}
    if detail:
        properties["detail"] = {"type": "string", "description": detail}
    schema = {"type": "object", "properties": properties, "required": ["status"]}
    return {"200": {"description": "so it is", "content": {"application/json": {"schema": schema}}}}


def _text(kind: str) -> Described:
    return {"200": {"description": "done", "content": {kind: {"schema": {"type": "string"}}}}}
