"""Encryption of key texts and data where they are stored: AES-256-GCM, by `cryptography`.

A sealed text is bound to its place, so rows can't be exchanged: the number of the pool and the id of the key are
authenticated with it (NIST SP 800-38D, additional data). Its nonce is random: with 96 bits, one secrets key may seal
2^32 texts before a repeated nonce gets likelier than 2^-32 (section 8.3), which is years of commits; `rekey` under a
new key begins anew.

    sealed = 4 bytes: which secrets key, 12 bytes: nonce, the ciphertext, 16 bytes: tag

Keys are looked up in Valkey by a digest (`Digests`), under a key of its own that is stored sealed: so a digest is the
same whatever the secrets keys are, and tells nothing to whoever has no secrets key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from keypool.core.errors import StartError

_NAME_BYTES, _NONCE_BYTES = 4, 12
_HEAD = _NAME_BYTES + _NONCE_BYTES
_DIGEST_BYTES = 16
"""The length of a digest by which a key is found: 2^64 keys until two are likely to have the same one."""


class WrongSecretsKey(Exception):
    """A sealed text that none of the secrets keys opens, or that stands in another's place."""


class Sealer:
    """Seals under the first of the secrets keys (32 bytes each), and opens what any of them sealed.

    Raises StartError if `cryptography` is missing.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
        except ImportError:
            raise StartError(
                "KEYPOOL_SECRETS_KEY needs the package cryptography: pip install 'keypool-service[secrets]'"
            ) from None
        self._invalid = InvalidTag
        self._ciphers = {name_of(key): AESGCM(key) for key in keys}
        self.current = name_of(keys[0])
        """Which secrets key seals: the first 4 bytes of its digest."""
        self._seal = self._ciphers[self.current].encrypt

    def seal(self, clear: bytes, pool: int, id: int) -> bytes:
        """Encrypt under the first secrets key, for this place. About 2 µs."""
        nonce = os.urandom(_NONCE_BYTES)
        return self.current + nonce + self._seal(nonce, clear, b"%d/%d" % (pool, id))

    def open(self, sealed: bytes, pool: int, id: int) -> bytes:
        """Decrypt what was sealed for this place. About 2 µs. Raises WrongSecretsKey."""
        cipher = self._ciphers.get(sealed[:_NAME_BYTES])
        if cipher is None:
            raise WrongSecretsKey(f"it is encrypted under the secrets key {sealed[:_NAME_BYTES].hex()}")
        try:
            return cipher.decrypt(sealed[_NAME_BYTES:_HEAD], sealed[_HEAD:], b"%d/%d" % (pool, id))
        except self._invalid:
            raise WrongSecretsKey("it was changed, or moved to another key's place") from None

    def is_current(self, sealed: bytes) -> bool:
        """Whether this was sealed under the first secrets key. O(1)."""
        return sealed[:_NAME_BYTES] == self.current


def name_of(key: bytes) -> bytes:
    """Which secrets key this is, without revealing it: 4 bytes of its SHA-256 digest."""
    return hashlib.sha256(b"keypool secrets key\0" + key).digest()[:_NAME_BYTES]


class Digests:
    """Names of key texts where they are stored encrypted: keyed BLAKE2b (RFC 7693) under 32 bytes of its own."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=key).copy

    def of(self, text: str) -> bytes:
        """The digest of a text. About 0.8 µs."""
        digest = self._keyed()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()
