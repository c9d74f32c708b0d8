"""Texts and data that Valkey holds encrypted only (engine/sealing.py).

With secrets keys, Valkey holds no key text and no data, in a dump, a file or its log of slow commands. A key's member
in sets and hashes is a keyed digest of its text; text and data are sealed in its record for the key's pool and id. The
key of the digests is made once, and stored sealed in `{POOL}:pool`, for all pools:

    digests     the digests' key, sealed for pool 0 and id 0; there if Valkey is to have no text in clear
    clear       there if keys may be in clear that were before. Then a look-up passes the text as well, in the same
                call; a rekey seals all of these keys, and removes the field

A key's partition still follows from its text by CRC-32. With 16 partitions, that reveals 4 bits of a text to whoever
can read Valkey.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence

import msgspec

from keypool.core.errors import StartError
from keypool.core.keys import NO_DETAILS, Details
from keypool.core.pace import Pace
from keypool.engine.sealing import Digests, Sealer, WrongSecretsKey
from keypool.engine.valkey.nodes import Nodes

MEMBER = b"\xfe"
"""The first byte of a member, which no text has."""
_DIGEST_KEY_BYTES = 32
_OF_DIGESTS = (0, 0)  # the pool and the id for which the digests' key is sealed: no key has this id

_encode = msgspec.msgpack.Encoder().encode
_decode_sealed = msgspec.msgpack.Decoder(tuple[str, bytes | None]).decode


class _Info(msgspec.Struct, array_like=True):
    """Details as a record has them (lua/common.lua). Data is text here: Lua's MessagePack knows no bytes.

    `pace` is not there unless the key has its own: by the length, scripts know whether to look at it.
    """

    imported: bool = False
    name: str | None = None
    labels: dict[str, str] | None = None
    data: str | None = None
    pace: tuple[int, float, int] | None = None


_decode_info = msgspec.msgpack.Decoder(_Info).decode


class Vault:
    """See the module. `pool` is the number of the pool."""

    def __init__(self, sealer: Sealer, digests_key: bytes, pool: int = 0, *, may_have_clear: bool) -> None:
        self.sealer = sealer
        self.may_have_clear = may_have_clear
        """Whether keys of the pool may be in clear."""
        self._others: weakref.WeakSet[Vault] = weakref.WeakSet()  # those of the other pools that are open
        self._digests_key = digests_key
        self._pool = pool
        # Of each pool its own, so that nobody sees which secrets stand in several.
        own = hashlib.blake2b(b"%d" % pool, key=digests_key, digest_size=_DIGEST_KEY_BYTES).digest()
        self._digest = Digests(own).of

    def of_pool(self, pool: int) -> Vault:
        """That of another pool of the same server."""
        other = Vault(self.sealer, self._digests_key, pool, may_have_clear=self.may_have_clear)
        self._others.add(other)
        return other

    def all_sealed(self) -> None:
        """No key of any pool is in clear any more. O(pools)."""
        for each in (self, *self._others):
            each.may_have_clear = False

    def member(self, text: str) -> bytes:
        """What stands for a text in Valkey. About 1 µs."""
        return MEMBER + self._digest(text)

    def name(self, text: str) -> bytes:
        """The name for scripts (lua/common.lua) of the key with this text. About 1 µs."""
        if self.may_have_clear:
            return MEMBER + self._digest(text) + text.encode("utf-8", "surrogatepass")
        return MEMBER + self._digest(text)

    def seal(self, text: str, data: bytes | None, id: int) -> bytes:
        """A text and its data, for the key with this id. About 3 µs."""
        return self.sealer.seal(_encode((text, data)), self._pool, id)

    def open(self, sealed: bytes, id: int) -> tuple[str, bytes | None]:
        """Text and data of the key with this id. About 3 µs. Raises WrongSecretsKey."""
        return _decode_sealed(self.sealer.open(sealed, self._pool, id))

    def sealed_digests_key(self) -> bytes:
        """What `digests` holds, under the first secrets key."""
        return self.sealer.seal(self._digests_key, *_OF_DIGESTS)


def info_of(details: Details) -> bytes:
    """Details as a record has them: all but the data of a sealed key, which the caller leaves out."""
    if details == NO_DETAILS:
        return b""
    data = None if details.data is None else details.data.decode()
    info = (details.imported, details.name, details.labels, data)
    pace = details.pace
    return _encode(info if pace is None else (*info, (pace.count, pace.seconds, pace.burst)))


def details_in(info: bytes) -> Details:
    """The details that a record has."""
    if not info:
        return NO_DETAILS
    found = _decode_info(info)
    data = None if found.data is None else found.data.encode()
    pace = None if found.pace is None else Pace(*found.pace)
    return Details(found.imported, found.name, found.labels, data, None, pace)


async def open_vault(nodes: Nodes, key: str, secrets_keys: Sequence[bytes]) -> Vault | None:
    """The vault of the pool `default`, whose facts are in the hash `key`; None if it isn't encrypted (yet).

    Changes nothing.

    Raises StartError if the secrets keys don't fit, and OSError, ReplyError or ConnectionLost.
    """
    sealed, clear = await nodes.execute(key, "HMGET", key, "digests", "clear")
    where = key.removesuffix(":pool").strip("{}")
    if sealed is None:
        return None
    if not secrets_keys:
        raise StartError(f"the keys of the pool {where} are encrypted: start with their KEYPOOL_SECRETS_KEY")
    sealer = Sealer(secrets_keys)
    try:
        digests_key = sealer.open(sealed, *_OF_DIGESTS)
    except WrongSecretsKey as error:
        raise StartError(f"KEYPOOL_SECRETS_KEY doesn't fit the pool {where}: {error}") from None
    return Vault(sealer, digests_key, may_have_clear=clear is not None)


def new_vault(secrets_keys: Sequence[bytes]) -> Vault:
    """A vault for a pool that has no key yet. Raises StartError."""
    return Vault(Sealer(secrets_keys), os.urandom(_DIGEST_KEY_BYTES), may_have_clear=False)


async def begin_vault(nodes: Nodes, key: str, secrets_keys: Sequence[bytes]) -> Vault:
    """The vault of a pool that has keys in clear, made unless another server was faster.

    Raises StartError, OSError, ReplyError or ConnectionLost.
    """
    made = new_vault(secrets_keys)
    await nodes.execute(key, "HSETNX", key, "clear", 1)
    await nodes.execute(key, "HSETNX", key, "digests", made.sealed_digests_key())
    vault = await open_vault(nodes, key, secrets_keys)
    assert vault is not None
    return vault
