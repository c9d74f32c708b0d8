"""Check values: whether a server has the secrets keys under which the rows of a data file are sealed.

A file has one for each secrets key under which a row of it may be sealed: it is written before the first such row, and
deleted when a rekey has sealed all rows under another key. So a server whose keys don't fit is refused before it reads
a row, even if none is sealed yet, and a server without a key never adds clear rows to an encrypted file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keypool.core.errors import StartError
from keypool.engine.durable.datafile import CHECK, CHECK_PLACE, CHECKED, Facts
from keypool.engine.sealing import Sealer, WrongSecretsKey


def sealer_of(path: Path, facts: Facts, secrets_keys: Sequence[bytes]) -> Sealer | None:
    """The sealer for a file, which was examined; None if it is in clear, and there is no secrets key.

    Raises StartError if one of the secrets keys that the file needs is missing.
    """
    if not secrets_keys:
        if facts.checks:
            raise StartError(
                f"the data file {path} is encrypted: set KEYPOOL_SECRETS_KEY to the secrets key whose name is "
                f"{' and '.join(facts.checks)}"
            )
        return None
    sealer = Sealer(secrets_keys)
    for name, value in facts.checks.items():
        try:
            fits = sealer.open(value, *CHECK_PLACE) == CHECKED
        except WrongSecretsKey:
            fits = False
        if not fits:
            raise StartError(
                f"the data file {path} is encrypted under the secrets key {name}, which KEYPOOL_SECRETS_KEY doesn't "
                "have, or not as it was: add it, the first one encrypts and all of them decrypt"
            )
    return sealer


def new_checks(facts: Facts, sealer: Sealer) -> dict[str, bytes]:
    """The check value of the first secrets key, by its name in the file; empty if the file has it."""
    name = sealer.current.hex()
    return {} if name in facts.checks else {CHECK + name: sealer.seal(CHECKED, *CHECK_PLACE)}
