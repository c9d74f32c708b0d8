"""Errors as HTTP responses: RFC 9457 problem details, `application/problem+json`, on every path and method.

A class of error without a row in `STATUSES` has the status of its parent.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import msgspec

from keypool.core import errors
from keypool.core.errors import KeypoolError

CONTENT_TYPE = "application/problem+json"
_WITH_RETRY_AFTER = (errors.NoKeyAvailable, errors.TooMany, errors.ShareSpent)

STATUSES: dict[type[KeypoolError], HTTPStatus] = {
    errors.BadRequest: HTTPStatus.BAD_REQUEST,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.CrossSite: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.UnknownKey: HTTPStatus.NOT_FOUND,
    errors.NoKeyAvailable: HTTPStatus.NOT_FOUND,
    errors.MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.RequestTimeout: HTTPStatus.REQUEST_TIMEOUT,
    errors.PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UriTooLong: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.WrongHost: HTTPStatus.MISDIRECTED_REQUEST,
    errors.HeadersTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.StaleLease: HTTPStatus.CONFLICT,
    errors.ManySeats: HTTPStatus.CONFLICT,
    errors.LeaseOver: HTTPStatus.CONFLICT,
    errors.BlockLimit: HTTPStatus.CONFLICT,
    errors.Superseded: HTTPStatus.CONFLICT,
    errors.PoolFull: HTTPStatus.CONFLICT,
    errors.NameTaken: HTTPStatus.CONFLICT,
    errors.SecretExists: HTTPStatus.CONFLICT,
    errors.KeysWouldExpire: HTTPStatus.CONFLICT,
    errors.SecretsKeyRequired: HTTPStatus.CONFLICT,
    errors.UnknownPool: HTTPStatus.NOT_FOUND,
    errors.TooManyPools: HTTPStatus.CONFLICT,
    errors.PoolDraining: HTTPStatus.CONFLICT,
    errors.PoolNotEmpty: HTTPStatus.CONFLICT,
    errors.PoolFixed: HTTPStatus.CONFLICT,
    errors.ShareSpent: HTTPStatus.TOO_MANY_REQUESTS,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.TooMany: HTTPStatus.TOO_MANY_REQUESTS,
    errors.UpgradeRequired: HTTPStatus.UPGRADE_REQUIRED,
    KeypoolError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def status_of(error: type[KeypoolError]) -> HTTPStatus:
    """The status of a class of error."""
    return next(STATUSES[ancestor] for ancestor in error.__mro__ if ancestor in STATUSES)


def problem_headers(error: KeypoolError) -> list[tuple[str, str]]:
    """The error's own headers, with names in Tornado's spelling."""
    if isinstance(error, _WITH_RETRY_AFTER) and error.retry_after is not None:
        return [("Retry-After", str(max(1, math.ceil(error.retry_after))))]
    if isinstance(error, errors.StorageUnavailable):
        return [("Retry-After", "1")]
    if isinstance(error, errors.UpgradeRequired):
        return [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")]
    if isinstance(error, errors.MethodNotAllowed):
        return [("Allow", error.allow)]
    if isinstance(error, errors.Unauthorized):
        return [("Www-Authenticate", 'Bearer realm="keypool"')]
    return []


def problem_body(error: KeypoolError, request_id: str, message: str | None = None) -> bytes:
    """The problem as JSON, with a `message` for clients of the first version."""
    body: dict[str, Any] = {
        "type": f"urn:keypool:problem:{error.code}",
        "code": error.code,
        "title": error.title,
        "status": int(status_of(type(error))),
        "detail": error.detail,
        "request_id": request_id,
    }
    if isinstance(error, errors.NoKeyAvailable):
        if error.retry_after is not None:
            body["retry_after"] = error.retry_after
        body |= {name: getattr(error, name) for name in ("blocked", "cooling", "quarantined")}
    if message is not None:
        body["message"] = message
    return msgspec.json.encode(body)
