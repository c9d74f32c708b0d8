"""Sealing what is stored in clear, or under another secrets key than the first, while the pool is served.

A slice is two scripts: one lists keys in order of id that are to be sealed (lua/unsealed.lua), the other stores them
sealed, each unless it has changed meanwhile (lua/reseal.lua), and how far the partition is (META's `rekeyed`). So a rekey
goes on where it was after a stop, and several servers that rekey the same pool do no harm.

Keys in clear are also sealed one by one as they are served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from msgspec import structs

from keypool.core.keys import hint
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.vault import Vault, details_in, info_of

_SLICE = (
    100  # keys that are looked at in a slice: sealing them takes a millisecond, as does each of its scripts
)
_CLEAR_NOW = 2  # of the words behind the five of a lease in clear: it is not sealed


async def rekey(partitions: Partitions, on_slice: Callable[[int], object]) -> None:
    """Seal all keys of a pool under the first secrets key. O(n log n), in slices. Raises StorageUnavailable.

    `on_slice` is called with the number of keys that a slice looked at. A rekey under the same key that was interrupted
    goes on where it was; one that is complete begins anew.
    """
    vault = partitions.vault
    assert vault is not None
    current = vault.sealer.current
    for partition in range(partitions.count):
        after: Word = ""
        while after != -1:
            last, examined, *found = await partitions.call(partition, "unsealed", (current, after, _SLICE))
            words: list[Word] = []
            for id, text, sealed, info in found:
                words += _resealed(vault, id, text, sealed, info)
            # The last slice lets the next rekey begin at the first key.
            words.insert(0, f"{current.hex()} {max(last, 0)}")
            await partitions.call(partition, "reseal", words)
            on_slice(examined)
            after = last
            await asyncio.sleep(0)


def seal_leased(partitions: Partitions, vault: Vault, partition: int, leases: Sequence[Reply]) -> None:
    """Seal those of the leases in a reply of acquire.lua that are in clear, without waiting. About 5 µs for each."""
    words: list[Word] = [""]
    for text, id, _, _, _, *more in leases:
        if len(more) <= _CLEAR_NOW or not more[_CLEAR_NOW]:
            words += _resealed(vault, id, text, b"", more[1] if len(more) > 1 else b"")
    if len(words) > 1:
        partitions.call(partition, "reseal", words)


def _resealed(vault: Vault, id: int, text: bytes, sealed: bytes, info: bytes) -> list[Word]:
    """The words of reseal.lua for a key in clear, or sealed under another key."""
    details = details_in(info)
    if sealed:
        clear, data = vault.open(sealed, id)
    else:
        clear, data = text.decode("utf-8", "surrogatepass"), details.data
    kept = info_of(structs.replace(details, data=None))
    return [id, sealed, vault.member(clear), vault.seal(clear, data, id), hint(clear), kept]
