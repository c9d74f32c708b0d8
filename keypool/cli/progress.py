"""A progress bar for batches that take more than one call, on standard error if that is a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import Self

BATCH = 1000
"""Items that one call of a batch may have."""


class Progress:
    """`with Progress("deleting", 5000) as bar: …progress=bar`. The bar is erased at the end."""

    def __init__(self, doing: str, total: int, *, shown: bool = True) -> None:
        self._doing = doing
        self._total = total
        self._shown = shown and total > BATCH and sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        """Show that so many items are done."""
        if not self._shown:
            return
        share = min(1.0, done / self._total)
        width = max(10, min(40, shutil.get_terminal_size().columns - 40))
        bar = "#" * round(share * width)
        sys.stderr.write(f"\r{self._doing} [{bar:<{width}}] {done}/{self._total} {share:4.0%}")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        self(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
