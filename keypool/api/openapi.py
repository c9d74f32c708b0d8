"""The OpenAPI 3.1 document of the API, derived from operations.py.

It is made once, at the first request. JSON Schema comes from msgspec, which validates the bodies by the same types. The
paths that aren't operations (health, metrics, the feed) are described by hand, and a test checks each description.

OpenAPI can't express which query parameters and which members of a body go together, nor that unknown parameters are
refused; see docs/api.md.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import msgspec

from keypool import __version__
from keypool.api.bodies import ImportItem
from keypool.api.calls import ANYONE, ATTEMPT_HEADER, BASE, POOLS, Call
from keypool.api.curl import EXAMPLES
from keypool.api.operations import Operation
from keypool.api.problems import CONTENT_TYPE, status_of
from keypool.core import errors
from keypool.core.errors import KeypoolError
from keypool.core.rules import POOL_NAME
from keypool.engine import Engine

Described = dict[str, Any]

HEADERS: Described = {
    "X-Request-Id": {
        "description": "the client's, if it was valid, else a new one; the server's log has it",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    },
    "Cache-Control": {"schema": {"type": "string", "enum": ["no-store"]}},
    "Location": {"description": "the path of the key", "schema": {"type": "string"}},
    "Idempotent-Replayed": {
        "description": "the answer repeats leases that the same Idempotency-Key was given before",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Retry-After": {
        "description": "whole seconds; of a 404, to the earliest release or end of a cooldown, if there is one",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"schema": {"type": "string"}},
}


def _headers(*names: str) -> Described:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


OF_ALL = _headers("X-Request-Id", "Cache-Control")
LOCATION = _headers("Location")
REPLAYED = _headers("Idempotent-Replayed")
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
    "429": _headers("Retry-After"),
    "503": _headers("Retry-After"),
}


_REF = "#/components/schemas/{name}"

# The errors that any call may get.
_EVERYWHERE = (
    errors.BadRequest,
    errors.CrossSite,
    errors.WrongHost,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.UriTooLong,
    errors.HeadersTooLarge,
    errors.Loading,
    errors.StorageUnavailable,
    KeypoolError,
)
_WITH_ROLE = (errors.Unauthorized, errors.Forbidden)
_KEY = {
    "name": "key",
    "in": "path",
    "required": True,
    "description": "the handle of a lease (h:…), for viewers and admins the key's public id written id:N, or the key "
    "itself, percent-encoded",
    "schema": {"type": "string", "minLength": 1},
}
_POOL = {
    "name": "pool",
    "in": "path",
    "required": True,
    "description": "the name of a pool; the same paths without /pools/{pool} are about `default`",
    "schema": {"type": "string", "pattern": f"^{POOL_NAME.pattern}$"},
}
_ATTEMPT = {
    "name": ATTEMPT_HEADER,
    "in": "header",
    "description": "names this acquire (of a batch, with op acquire), so that a repeat with the same body gets the "
    "same leases as long as they are held",
    "schema": {"type": "string", "pattern": "^[!-~]{1,64}$"},
}


class Problem(msgspec.Struct):
    """RFC 9457 problem details. Compare `code`; `detail` says what was wrong and what would be right."""

    type: str
    code: str
    title: str
    status: int
    detail: str
    request_id: str
    retry_after: float | msgspec.UnsetType = msgspec.UNSET
    blocked: int | msgspec.UnsetType = msgspec.UNSET
    cooling: int | msgspec.UnsetType = msgspec.UNSET
    quarantined: int | msgspec.UnsetType = msgspec.UNSET
    message: str | msgspec.UnsetType = msgspec.UNSET


def describing(operations: Iterable[Operation], open: bool) -> Operation:
    """The operation that answers with the document of these operations and itself. `open`: no tokens are configured."""

    @cache
    def made() -> dict[str, Any]:
        return document((*operations, described), open)

    async def run(engine: Engine, call: Call) -> dict[str, Any]:
        return made()

    described = Operation(
        "openapi", "GET", "/openapi.json", ANYONE, "This document.", run, dict[str, Any], changes=False
    )
    return described


def document(operations: Iterable[Operation], open: bool) -> dict[str, Any]:
    """The OpenAPI document of these operations. `open`: no tokens are configured."""
    operations = tuple(operations)
    schemas, components = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        method, described = operation.method.lower(), _operation(operation, schemas, open)
        paths.setdefault(f"{BASE}{operation.path}", {})[method] = described
        if operation.in_pools:
            in_pool = paths.setdefault(f"{BASE}{POOLS}{{pool}}{operation.path}", {})
            in_pool[method] = _in_pool(described)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "keypool",
            "version": __version__,
            "description": "Generates API keys, leases each to one holder at a time, purges those without keepalive.",
        },
        "servers": [{"url": "/"}],
        "security": [],  # the default of operations that don't say otherwise
        "paths": paths | _other_paths(schemas[Problem], open),
        "components": {
            "schemas": components,
            "headers": HEADERS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation, schemas: dict[Any, Any], open: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": _responses(operation, schemas, open),
    }
    if operation.roles:
        described["description"] = f"Roles: {', '.join(sorted(operation.roles))}."
    if not open:
        described["security"] = [{"token": []}] if operation.roles else []
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": _content(operation, schemas)},
        }
    return described


def _in_pool(described: dict[str, Any]) -> dict[str, Any]:
    """The same operation on the pool that the path names."""
    return described | {
        "operationId": f"{described['operationId']}-in-pool",
        "parameters": [_POOL, *described.get("parameters", ())],
    }


def _content(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": schemas[operation.body]}
    if operation.name in EXAMPLES:
        content["example"] = json.loads(EXAMPLES[operation.name])
    return content


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [_POOL] if "{pool}" in operation.path else []
    if "{key}" in operation.path:
        parameters.append(_KEY)
    if operation.repeatable:
        parameters.append(_ATTEMPT)
    if operation.query is not None:
        _, components = msgspec.json.schema_components([operation.query])
        for name, schema in components[operation.query.__name__]["properties"].items():
            parameters.append({"name": name, "in": "query", "schema": _without_null(schema)})
    return parameters


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a query parameter, which can't be null."""
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            kept |= choice
    if None in kept.get("enum", ()):
        kept["enum"] = [value for value in kept["enum"] if value is not None]
    return kept


def _responses(operation: Operation, schemas: dict[Any, Any], open: bool) -> dict[str, Any]:
    responses = {str(status): body for status, body in _successes(operation, schemas)}
    refusals: list[type[KeypoolError]] = [*operation.errors, *_EVERYWHERE]
    if operation.roles and not open:
        refusals += _WITH_ROLE
    if operation.about_a_pool:
        refusals.append(errors.UnknownPool)
    codes: dict[str, set[str]] = {}
    for error in refusals:
        codes.setdefault(str(int(status_of(error))), set()).add(error.code)
    for status, named in sorted(codes.items()):
        responses[status] = problem(", ".join(sorted(named)), schemas[Problem], status)
    return responses


def _successes(operation: Operation, schemas: dict[Any, Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    yield operation.status, _success(operation, operation.answer, schemas, operation.repeatable)
    if operation.other_status is not None:
        yield operation.other_status, _success(operation, operation.other_answer, schemas, False)


def _success(operation: Operation, answer: Any, schemas: dict[Any, Any], repeatable: bool) -> dict[str, Any]:
    if answer is None:
        return {"description": "done", "headers": OF_ALL}
    answers = _members(answer)
    options = [schemas[answer] for answer in answers]
    schema = options[0] if len(options) == 1 else _one_of(answers, options)
    content = {"application/json": {"schema": schema}}
    headers = OF_ALL | (LOCATION if operation.locates else {}) | (REPLAYED if repeatable else {})
    return {"description": "done", "headers": headers, "content": content}


def _one_of(answers: Sequence[Any], schemas: list[Any]) -> dict[str, Any]:
    """One of several answers, distinguished by the member that has their tags, if they have any."""
    if answers[0].__struct_config__.tag is None:
        return {"oneOf": schemas}
    mapping = {
        answer.__struct_config__.tag: schema["$ref"] for answer, schema in zip(answers, schemas, strict=True)
    }
    name = answers[0].__struct_config__.tag_field
    return {"oneOf": schemas, "discriminator": {"propertyName": name, "mapping": mapping}}


def _members(answer: Any) -> tuple[Any, ...]:
    if typing.get_origin(answer) in (types.UnionType, typing.Union):
        return typing.get_args(answer)
    return (answer,)


def _schemas(operations: tuple[Operation, ...]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The schema of each body and answer, and the components that these refer to."""
    kinds: list[Any] = [Problem, ImportItem]
    for operation in operations:
        answers = (*_members(operation.answer), *_members(operation.other_answer))
        kinds += [answer for answer in answers if answer is not None]
        if operation.body is not None:
            kinds.append(operation.body)
    found: dict[Any, Any] = {}
    components: dict[str, Any] = {}
    for kind in kinds:
        (found[kind],), more = msgspec.json.schema_components([kind], ref_template=_REF)
        components |= more
    return found, components


# -- the parts that all share, and the paths that aren't operations


def problem(codes: str, schema: Described, status: str) -> Described:
    """A response with one of these problem codes."""
    return {
        "description": codes,
        "headers": OF_ALL | _OF_STATUS.get(status, {}),
        "content": {CONTENT_TYPE: {"schema": schema}},
    }


def _other_paths(schema: Described, open: bool) -> Described:
    """The paths that aren't operations. `schema` is that of a problem. `open`: no tokens are configured."""

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
        problems = {status: problem(code, schema, status) for status, code in sorted(refusals.items())}
        return {"get": described | {"responses": answers | problems}}

    feed = page(
        "feed",
        "A websocket with changes: hello, then deltas and beats (docs/api.md). A plain GET is answered 426.",
        {"101": {"description": "the websocket is open"}},
        {
            "400": "bad-request",
            "404": "unknown-pool",
            "426": "upgrade-required",
            "429": "too-many-viewers",
            "503": "draining, loading",
        },
        "admin, viewer, or a dashboard's cookie",
    )
    feed["get"]["parameters"] = [
        {"name": part, "in": "query", "schema": {"enum": ["yes", "no"], "default": "yes"}}
        for part in ("history", "events")
    ]
    return {
        "/healthz": page("health", "Whether the event loop runs.", _status("ok"), {}),
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
        f"{BASE}/feed": feed,
        f"{BASE}{POOLS}{{pool}}/feed": {"get": _in_pool(feed["get"])},
    }


def _status(word: str, detail: str = "") -> Described:
    properties: Described = {"status": {"type": "string", "enum": [word]}}
    if detail:
        properties["detail"] = {"type": "string", "description": detail}
    schema = {"type": "object", "properties": properties, "required": ["status"]}
    return {"200": {"description": "yes", "content": {"application/json": {"schema": schema}}}}


def _text(kind: str) -> Described:
    return {"200": {"description": "done", "content": {kind: {"schema": {"type": "string"}}}}}
