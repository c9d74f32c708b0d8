"""Decoding of bodies and queries, with errors that explain what was wrong and what would be right.

msgspec decodes and validates in one pass and names the field at which it stopped; the error adds the field's
description from bodies.py.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec

from keypool.api.bodies import AnyBatch, BatchBody, ImportBatch, ImportItem, NoBody, PoolBody
from keypool.api.calls import Call
from keypool.config.limits import MAX_BODY
from keypool.core.errors import BadRequest, PayloadTooLarge

if TYPE_CHECKING:
    from keypool.api.operations import Operation

_FIELD = re.compile(r"`\$\.(?:[^`]*\.)?(\w+)")  # the last name of a path, as in `$.keys[...].lease`
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_LONGEST = 300  # characters of a message, which may quote the request
_LOOKED_FOR = 64  # bytes by which a long part of a body is found in it


class _OnlyOp(msgspec.Struct):
    op: Any = None


_decode_import = msgspec.json.Decoder(ImportBatch).decode


class Reader:
    """Decodes the query and the body of one operation into its types."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._decoder = msgspec.json.Decoder(NoBody if operation.body is None else operation.body)
        self._body_fields = fields_of(operation.body)
        self._query_fields = fields_of(operation.query)
        self._check_members = _CHECKS.get(operation.body)
        self._described = _fields_of_items(operation.body) | self._body_fields
        hints = {} if operation.query is None else typing.get_type_hints(operation.query)
        self._numbers = {name for name, kind in hints.items() if kind is int}

    def read(self, call: Call, query: str, body: bytes) -> None:
        """Fill `call.query` and `call.body`. Raises BadRequest."""
        if query or self._operation.query is not None:
            call.query = self._read_query(query)
        if body:
            call.body = self._read_body(body)
        elif self._operation.body_required:
            raise BadRequest(f"a JSON body is required: {_takes(self._body_fields)}")

    def _read_query(self, query: str) -> Any:
        pairs = query_pairs(query)
        if self._operation.query is None:
            if pairs:
                raise BadRequest(f"unknown query parameter {_named(next(iter(pairs)))}: this call takes none")
            return None
        for name in pairs:
            if name not in self._query_fields:
                raise BadRequest(f"unknown query parameter {_named(name)}: {_takes(self._query_fields)}")
        # msgspec could convert numbers itself, but would then also take the text null for None.
        values: dict[str, str | int] = {
            name: int(text) if name in self._numbers and _INTEGER.fullmatch(text) else text
            for name, text in pairs.items()
        }
        try:
            return msgspec.convert(values, self._operation.query)
        except msgspec.ValidationError as error:
            raise _bad("query parameter", str(error), self._query_fields, self._query_fields) from None

    def _read_body(self, body: bytes) -> Any:
        if len(body) > MAX_BODY:
            return self._read_import(body)
        try:
            try:
                decoded = self._decoder.decode(body)
            except msgspec.ValidationError as error:
                wrong = str(error)
            else:
                if self._check_members is not None:
                    self._check_members(decoded, body)
                elif (colons := body.count(b":")) > 1 and colons > _members(decoded):
                    _require_unique(body)
                return decoded
            # msgspec stops at the first wrong field. A syntax error after it takes precedence, and is raised here.
            value = msgspec.json.decode(body)
            if ", got `float`" in wrong:
                try:
                    decoded = msgspec.convert(_with_whole_numbers(value), self._decoder.type)
                except msgspec.ValidationError as error:
                    wrong = str(error)
                else:
                    _require_unique(body)
                    return decoded
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise not_json(str(error), self._body_fields) from None
        raise bad_body(wrong, self._body_fields, self._described)

    def _read_import(self, body: bytes) -> ImportBatch:
        """Decode a body over MAX_BODY, from a caller who may import. O(body), 2 to 4 ms for 4 MiB.

        Raises PayloadTooLarge unless it is an import.
        """
        if b'"import"' not in body:
            raise too_large()
        try:
            try:
                decoded = _decode_import(body)
            except msgspec.ValidationError as error:
                if not _is_import(body):
                    raise too_large() from None
                raise bad_body(str(error), self._body_fields, self._described) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise not_json(str(error), self._body_fields) from None
        _check_batch(decoded, body)
        return decoded


def _is_import(body: bytes) -> bool:
    """Whether a body in JSON is an import. Raises what msgspec raises if it isn't JSON."""
    try:
        return bool(msgspec.json.decode(body, type=_OnlyOp).op == ImportBatch.__struct_config__.tag)
    except msgspec.ValidationError:  # not an object
        return False


def too_large(limit: int = MAX_BODY) -> PayloadTooLarge:
    """The error of a body over the limit, in bytes."""
    return PayloadTooLarge(f"the body is larger than {limit} bytes; send a batch in parts")


def _without(body: bytes, keys: bytes) -> bytes:
    """A body with an empty list in the place of `keys`, which is in it. O(body), 0.5 ms for 4 MiB.

    Raises PayloadTooLarge if what is left is over MAX_BODY.
    """
    if len(body) - len(keys) > MAX_BODY:
        raise too_large()
    beginning = keys[:_LOOKED_FOR]
    at = body.find(beginning)
    while not body.startswith(keys, at):
        at = body.find(beginning, at + 1)
    return b"%b[]%b" % (body[:at], body[at + len(keys) :])


def _check_batch(decoded: BatchBody, body: bytes) -> None:
    if type(decoded) is ImportBatch:
        _require_unique(_without(body, bytes(decoded.keys)))
    elif (colons := body.count(b":")) > 1 and colons > _members(decoded):
        _require_unique(body)


_CHECKS: dict[Any, Callable[[Any, bytes], None]] = {
    AnyBatch: _check_batch,
    PoolBody: lambda decoded, body: _require_unique(body),  # in which a null isn't as if it were absent
}
"""How a body is checked for members that were given twice, where it isn't by `_members`."""


def require_unique_members(item: ImportItem, raw: bytes) -> None:
    """Raise BadRequest if an object in an item of an import has a member twice. O(members)."""
    members = _members(item) + _inner_members(item.labels) + _inner_members(item.data)
    if item.pace is not None:
        members += _members(item.pace)
    if raw.count(b":") > members:  # which a colon in a text makes likely
        _require_unique(raw)


def _inner_members(value: Any) -> int:
    """The number of members of all objects in a value."""
    if type(value) is dict:
        return len(value) + sum(map(_inner_members, value.values()))
    return sum(map(_inner_members, value)) if type(value) is list else 0


def _members(decoded: Any) -> int:
    """How many members of a body have a value. O(members), 0.2 µs for a small body.

    It is the number of colons outside of strings in the body, unless a member is null or was given twice.
    """
    values = msgspec.structs.astuple(decoded)
    count = len(values) - values.count(None)
    if isinstance(decoded, BatchBody):  # `op`, and the items of its list
        count += 1
        for value in values:
            if type(value) is list:
                count += sum(_members(item) for item in value if type(item) is not str)
    return count


def _require_unique(body: bytes) -> None:
    """Raise BadRequest if an object in a JSON body has a member twice. O(body), slow.

    The decoder uses the last one, so `{"lease": 1, "lease": null}` would be an unblock without a lease number.
    """
    json.loads(body, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"the member {_named(twice)} was given twice in one object; give each once")
    return members


def _with_whole_numbers(value: Any) -> Any:
    """17.0 as 17: in JSON it is the same number, and some clients can only write it so."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(member) for member in value]
    # Beyond 2**53 a float may not be the number that was written.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def bad_body(message: str, fields: dict[str, str], described: dict[str, str] | None = None) -> BadRequest:
    """The error of a body of a wrong shape: msgspec's message, and what the field that it names takes.

    `fields` are those of the body with their descriptions, `described` those at any depth.
    """
    return _bad("body", message, fields, described or fields)


def not_json(message: str, fields: dict[str, str]) -> BadRequest:
    """The error of a body that isn't JSON."""
    return BadRequest(f"the body is not JSON: {message[:_LONGEST]}; {_takes(fields)}")


def _bad(where: str, message: str, fields: dict[str, str], described: dict[str, str]) -> BadRequest:
    found = _FIELD.search(message)
    description = described.get(found.group(1), "") if found else ""
    takes = f"{found.group(1)} takes {description}" if found and description else _takes(fields)
    return BadRequest(f"wrong {where}: {message[:_LONGEST]}; {takes}")


def _takes(fields: dict[str, str]) -> str:
    if not fields:
        return "this call takes no body: send none, or {}"
    return "this call takes " + ", ".join(fields)


def _named(name: str) -> str:
    return repr(name[:40])


def fields_of(model: Any) -> dict[str, str]:
    """The fields of a Struct, or of all Structs in a union, with their descriptions."""
    if model is None:
        return {}
    if typing.get_origin(model) in (types.UnionType, typing.Union):
        ops = [member.__struct_config__.tag for member in typing.get_args(model)]
        merged = {"op": "one of " + ", ".join(ops)}
        for member in typing.get_args(model):
            merged |= fields_of(member)
        return merged
    return {
        name: _description(kind) for name, kind in typing.get_type_hints(model, include_extras=True).items()
    }


def _fields_of_items(kind: Any) -> dict[str, str]:
    """The fields of the Structs in the lists of a body, with their descriptions."""
    found: dict[str, str] = {}
    for part in typing.get_args(kind):
        found |= _fields_of_items(part)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in typing.get_type_hints(kind, include_extras=True).values():
            for item in _structs(field):
                found |= fields_of(item)
    return found


def _structs(kind: Any) -> list[Any]:
    """The Structs in an annotation, at any depth."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [found for part in typing.get_args(kind) for found in _structs(part)]


def _description(kind: Any) -> str:
    """The first description in an annotation, at any depth."""
    for meta in getattr(kind, "__metadata__", ()):
        if meta.description:
            return str(meta.description)
    return next(filter(None, map(_description, typing.get_args(kind))), "")


def query_pairs(query: str) -> dict[str, str]:
    """The parameters of a query string. Raises BadRequest for a repeated one, or invalid UTF-8."""
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=32, errors="strict")
    except ValueError:
        raise BadRequest("the query must be percent-encoded UTF-8, with 32 parameters at most") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise BadRequest("a query parameter was given twice; give each once")
    return parameters
