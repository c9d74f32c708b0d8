"""Handles: names of leases that may stand in a URL or a log, because they hold no secret.

`h:42.17.Vq3xT0aB9cE` is key 42, lease 17, and 64 bits of a keyed BLAKE2b digest of the two (RFC 7693), which nobody
can make without the pool's secret. Nothing is stored for a handle.
"""

from __future__ import annotations

import base64
import hmac
import re
from hashlib import blake2b
from typing import NamedTuple

PREFIX = "h:"
"""How every handle begins. No key text does."""

SECRET_BYTES = 32
"""The length of the pool's secret."""

_DIGEST_BYTES = 8
_HANDLE = re.compile(r"h:([1-9][0-9]{0,18})\.([1-9][0-9]{0,18})\.([A-Za-z0-9_-]{11})", re.ASCII)


class Handle(NamedTuple):
    """A lease of a key, named by a handle that fits the two."""

    id: int
    lease: int


class Handles:
    """Makes and reads the handles of one pool, which keeps the `secret` with its keys."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, id: int, lease: int) -> str:
        """The handle of a lease. About 1.5 µs."""
        name = b"%d.%d" % (id, lease)
        digest = blake2b(name, digest_size=_DIGEST_BYTES, key=self._secret).digest()
        return f"h:{name.decode()}.{base64.urlsafe_b64encode(digest)[:-1].decode()}"

    def read(self, text: str) -> Handle | None:
        """The lease that a handle names; None if the text is not a handle of this pool. About 3 µs."""
        found = _HANDLE.fullmatch(text)
        if found is None:
            return None
        handle = Handle(int(found[1]), int(found[2]))
        return handle if hmac.compare_digest(self.make(*handle), text) else None
