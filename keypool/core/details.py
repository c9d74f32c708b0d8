"""What operators write about keys: how an import and a change become a key's details.

An empty name, an empty object of labels and an empty object of data are as good as none, and are stored as none.
"""

from __future__ import annotations

import msgspec

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.keys import NO_DETAILS, Details

IMPORTED = Details(imported=True)
"""The details of an imported key about which nobody wrote anything."""

_EMPTY = b"{}"


def details_of(item: NewKey) -> Details:
    """The details of a key that is imported. About 0.3 µs."""
    return patched(IMPORTED, item.patch)


def patched(details: Details, patch: KeyPatch) -> Details:
    """Details after a change: what it doesn't give stays. About 1 µs."""
    name = details.name if patch.name is None else patch.name or None
    labels = details.labels if patch.labels is None else patch.labels or None
    data = details.data if patch.data is None else patch.data
    pace = details.pace if patch.pace is None else patch.pace or None
    data = None if data == _EMPTY else data
    return shared(Details(details.imported, name, labels, data, details.former, pace))


def shared(details: Details) -> Details:
    """The same details; those about which nobody wrote anything are one object for all keys that have them."""
    if details == NO_DETAILS:
        return NO_DETAILS
    return IMPORTED if details == IMPORTED else details


def with_text_from_elsewhere(details: Details, former: str | None) -> Details:
    """Details after a replacement of the text; `former` is the one that the lease was given with, if it goes on."""
    return shared(msgspec.structs.replace(details, imported=True, former=former))


def without_former(details: Details) -> Details:
    """Details at the end of the lease that was given with another text."""
    return details if details.former is None else shared(msgspec.structs.replace(details, former=None))
