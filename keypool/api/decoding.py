"""Decoding of bodies and queries, with errors that explain what was wrong and what would be right.

msgspec decodes and validates in one pass and names the field at which it stopped; the error adds the field's
description from bodies.py.
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from keypool.api.bodies import BatchBody, NoBody
from keypool.api.calls import Call
from keypool.api.operations import Operation
from keypool.core.errors import BadRequest

_FIELD = re.compile(r"`\$\.(?:[^`]*\.)?(\w+)")  # the last name of a path, as in `$.keys[...].lease`
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_LONGEST = 300  # characters of a message, which may quote the request


class Reader:
    """Decodes the query and the body of one operation into its types."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._decoder = msgspec.json.Decoder(NoBody if operation.body is None else operation.body)
        self._body_fields = _fields(operation.body)
        self._query_fields = _fields(operation.query)
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
        try:
            try:
                decoded = self._decoder.decode(body)
            except msgspec.ValidationError as error:
                wrong = str(error)
            else:
                if (colons := body.count(b":")) > 1 and colons > _members(decoded):
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
            raise BadRequest(
                f"the body is not JSON: {str(error)[:_LONGEST]}; {_takes(self._body_fields)}"
            ) from None
        raise _bad("body", wrong, self._body_fields, self._described)


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


def _fields(model: Any) -> dict[str, str]:
    """The fields of a Struct, or of all Structs in a union, with their descriptions."""
    if model is None:
        return {}
    if typing.get_origin(model) in (types.UnionType, typing.Union):
        ops = [member.__struct_config__.tag for member in typing.get_args(model)]
        merged = {"op": "one of " + ", ".join(ops)}
        for member in typing.get_args(model):
            merged |= _fields(member)
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
                found |= _fields(item)
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
