"""Reading keys that were made elsewhere, and what operators write about keys.

A body of an import has up to 4 MiB. It is read in slices, between which others run: first its outer object, with the
list of keys as it stands, then the list, then some keys at a time. An item of a wrong shape is refused with the whole
body before anything is imported; an item whose values are out of range fails by itself.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Literal

import msgspec

from keypool.api.bodies import (
    MAX_BATCH,
    MAX_DATA,
    MAX_LABELS,
    MAX_SECRET,
    DetailsBody,
    ImportBatch,
    ImportItem,
    PaceBody,
)
from keypool.api.calls import ID
from keypool.api.decoding import bad_body, fields_of, not_json, require_unique_members
from keypool.core.answers import Imported, KeyPatch, NewKey
from keypool.core.errors import BadRequest
from keypool.core.handles import PREFIX
from keypool.core.keys import MAX_NAME, MAX_SEATS
from keypool.core.pace import Pace

_SLICE_BYTES = 64 * 1024  # of items that are read before others run: 0.1 to 0.5 ms
_SLICE_ITEMS = 50
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_split = msgspec.json.Decoder(
    Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
).decode
_decode = msgspec.json.Decoder(ImportItem).decode
_FIELDS = fields_of(ImportItem)
_NO_PACE = PaceBody()


async def read_items(body: ImportBatch) -> list[NewKey | Imported]:
    """The keys of an import, with a failed result in the place of each whose values are out of range.

    O(bytes), in slices. Raises BadRequest, which names the item, for JSON of another shape.
    """
    items: list[NewKey | Imported] = []
    size = 0
    for number, raw in enumerate(_items(body.keys)):
        size += len(raw)
        if size > _SLICE_BYTES or number % _SLICE_ITEMS == 0:
            size = 0
            await asyncio.sleep(0)
        item = _read_item(raw, f"keys[{number}]")
        try:
            items.append(new_key(item.secret, item))
        except BadRequest as error:
            items.append(Imported("failed", code=error.code, detail=error.detail))
    return items


def _items(keys: msgspec.Raw) -> list[memoryview]:
    try:
        return [memoryview(raw) for raw in _split(keys)]
    except msgspec.ValidationError as error:
        raise bad_body(f"{error} - at `$.keys`", {"keys": f"1 to {MAX_BATCH} keys to import"}) from None


def _read_item(raw: memoryview, place: str) -> ImportItem:
    try:
        item = _decode(raw)
        require_unique_members(item, bytes(raw))
    except msgspec.ValidationError as error:
        message = (
            str(error).replace("`$", f"`$.{place}") if "`$" in str(error) else f"{error} - at `$.{place}`"
        )
        raise bad_body(message, _FIELDS) from None
    except BadRequest as error:
        raise BadRequest(f"{place}: {error.detail}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise not_json(f"{place}: {error}", _FIELDS) from None
    return item


def new_key(secret: str, details: DetailsBody) -> NewKey:
    """The key to import, checked. Raises BadRequest."""
    if details.name == "":
        raise BadRequest(f"name takes {_FIELDS['name']}, not an empty text")
    patch = patch_of(details)
    return NewKey(
        checked_secret(secret), patch.name, patch.labels, patch.data, patch.pace or None, patch.seats
    )


def checked_secret(secret: str) -> str:
    """The text of an imported key. Raises BadRequest unless it has 1 to 4096 bytes."""
    size = len(secret) if secret.isascii() else len(secret.encode())
    if not 1 <= size <= MAX_SECRET:
        raise BadRequest(f"secret takes {_FIELDS['secret']}, not {size} bytes")
    return secret


def patch_of(body: DetailsBody) -> KeyPatch:
    """What to write about a key, checked. Raises BadRequest."""
    if body.name is not None:
        _check_name(body.name)
    if body.labels is not None:
        _check_labels(body.labels)
    if body.seats is not None and not 1 <= body.seats <= MAX_SEATS:
        raise BadRequest(f"seats takes 1 to {MAX_SEATS}, not {body.seats}")
    data = None
    if body.data is not None:
        data = msgspec.json.encode(body.data)
        if len(data) > MAX_DATA:
            raise BadRequest(f"data takes {_FIELDS['data']}, not {len(data)} bytes")
    pace: Pace | Literal[False] | None = None
    if body.pace is not None:
        pace = body.pace != _NO_PACE and body.pace.pace()
    return KeyPatch(body.name, body.labels, data, pace, body.seats)


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise BadRequest(f"name takes {_FIELDS['name']}, not {len(name)} characters")
    if _CONTROL.search(name):
        raise BadRequest(f"name takes {_FIELDS['name']}, and this has a control character")
    if name.startswith((ID, PREFIX)):
        raise BadRequest(f"name takes {_FIELDS['name']}, as these are ids and handles")


def _check_labels(labels: dict[str, str]) -> None:
    takes = _FIELDS["labels"]
    if len(labels) > MAX_LABELS:
        raise BadRequest(f"labels takes {takes}, not {len(labels)} labels")
    for name, value in labels.items():
        if not 1 <= len(name) <= MAX_NAME:
            raise BadRequest(f"labels takes {takes}, and a name has {len(name)} characters")
        if len(value) > MAX_NAME:
            raise BadRequest(f"labels takes {takes}, and a value has {len(value)} characters")
        if _CONTROL.search(name) or _CONTROL.search(value):
            raise BadRequest(f"labels takes {takes}, and one has a control character")
