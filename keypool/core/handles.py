"""Handles: names of leases that may stand in a URL or a log, because they hold no secret.

`h:42.17.Vq3xT0aB9cE` is key 42, lease 17, and 64 bits of a keyed BLAKE2s digest of the two (RFC 7693), which nobody
can make without the server's secret. The pool's number is in the digest too, so a handle of one pool is no handle of
another. Nothing is stored for a handle.
"""

from __future__ import annotations

import hmac
import re
from binascii import b2a_base64
from hashlib import blake2s
from typing import NamedTuple

PREFIX = "h:"
"""How every handle begins. No key text does."""

SECRET_BYTES = 32
"""The length of the secret."""

_DIGEST_BYTES = 8
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_PADDING = b"=\n"
_HANDLE = re.compile(r"h:([1-9][0-9]{0,18})\.([1-9][0-9]{0,18})\.[A-Za-z0-9_-]{11}", re.ASCII)


class Handle(NamedTuple):
    """A lease of a key, named by a handle that fits the two."""

    id: int
    lease: int


class Handles:
    """Makes and reads the handles of one pool. The `secret` is kept with the keys; that of all pools is the same."""

    def __init__(self, secret: bytes, pool: int = 0) -> None:
        keyed = blake2s(digest_size=_DIGEST_BYTES, key=secret)
        if pool:  # those of `default` are as they were when there was no other pool
            keyed.update(b"%d/" % pool)
        # Copied for each handle, which saves the compression of the secret: a third of the time.
        self._keyed = keyed.copy
        self._secret = secret

    def of_pool(self, number: int) -> Handles:
        """Those of another pool of the same server."""
        return Handles(self._secret, number)

    @property
    def mark(self) -> bytes:
        """8 bytes that belong to this pool: the same after a restart, and others for a new pool of its name."""
        digest = self._keyed()
        digest.update(b"pool")  # no handle begins like this
        return digest.digest()

    def make(self, id: int, lease: int) -> str:
        """The handle of a lease. About 1.3 µs."""
        name = b"h:%d.%d." % (id, lease)
        digest = self._keyed()
        digest.update(name)
        return (name + b2a_base64(digest.digest()).translate(_URL_SAFE, _PADDING)).decode()

    def read(self, text: str) -> Handle | None:
        """The lease that a handle names; None if the text is not a handle of this pool. About 3 µs."""
        found = _HANDLE.fullmatch(text)
        if found is None:
            return None
        handle = Handle(int(found[1]), int(found[2]))
        return handle if hmac.compare_digest(self.make(*handle), text) else None
