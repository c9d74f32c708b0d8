"""Keeps the data of the charts, so that they go on after a restart.

    once a minute, and at a stop    History -> encoded, a pool a turn of the loop -> compressed in a thread -> Pools
    at a start                      Pools -> decoded, a pool a turn -> History

Where they are is the engine's business: beside the data file, or in Valkey. All of it is best effort: what can't be
read is ignored, what can't be written is tried again a minute later, and the log has one line about either. Of a pool
there are numbers, and the mark by which charts of a deleted pool, or of another data file, are recognised.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Iterable
from typing import Literal

import msgspec

from keypool.core.errors import StorageUnavailable
from keypool.engine import Pools
from keypool.web.history import NAMES, History, Kept
from keypool.web.pool_view import PoolView

KEEP_SECONDS = 60.0
"""How old the charts are, at most, that a server which is killed leaves."""

_READ_SECONDS = 3.0
_MOST = 1 << 20  # bytes of a pool before compression: no number has more than nine
_LEVEL = 1  # of zlib: a higher one takes three times as long, and gains little
_encode = msgspec.msgpack.Encoder().encode
_log = logging.getLogger("keypool.dashboard")


class _Charts(msgspec.Struct, array_like=True):
    """The charts of a pool as they are kept. Those with other `names` are as those of another version."""

    version: Literal[1]
    mark: bytes
    names: tuple[str, ...]
    """Of the numbers in a sample."""
    seconds: Kept
    minutes: Kept


_decode = msgspec.msgpack.Decoder(_Charts).decode


def encoded(history: History, mark: bytes) -> bytes:
    """The charts of a pool, before they are compressed. A third of a millisecond."""
    return _encode(_Charts(1, mark, NAMES, *history.kept()))


def restore(history: History, packed: bytes, mark: bytes) -> None:
    """Give a new history the charts of its pool; nothing if they are another pool's. Raises ValueError."""
    unpacked = zlib.decompressobj()
    try:
        charts = _decode(unpacked.decompress(packed, _MOST))
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    samples = charts.seconds[1] + charts.minutes[1]
    if charts.names != NAMES or any(len(sample) != len(NAMES) for sample in samples):
        raise ValueError("they count other things than this version does")
    if charts.minutes[0] % 60 or not unpacked.eof:
        raise ValueError("they are damaged")
    if charts.mark == mark:
        history.restore(charts.seconds, charts.minutes)


class ChartsKeeper:
    """See the module. `restore` and `read` are for a start, `keep_soon` and `keep_last` for what comes then."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._left: dict[str, bytes] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._due = time.monotonic() + KEEP_SECONDS
        self._failing = False

    async def read(self) -> list[str]:
        """Read what is kept; the names of its pools."""
        try:
            async with asyncio.timeout(_READ_SECONDS):
                self._left = await self._pools.kept_charts()
        except TimeoutError:
            self._begin_anew(f"they can't be read within {_READ_SECONDS:g} s")
        except StorageUnavailable as error:
            self._begin_anew(error.detail)
        return list(self._left)

    def restore(self, view: PoolView) -> None:
        """Let a new view go on with the charts that were kept of its pool. Two milliseconds, once a pool."""
        packed = self._left.pop(view.engine.pool_name, None)
        if packed is None:
            return
        try:
            restore(view.history, packed, view.engine.handles.mark)
        except ValueError as error:
            self._begin_anew(str(error))

    def _begin_anew(self, reason: str) -> None:
        self._left = {}
        _log.warning("charts begin anew, as those from before the start can't be used: %s", reason)

    def keep_soon(self, views: Iterable[PoolView]) -> None:
        """Begin to keep the charts, if it is time. O(1)."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + KEEP_SECONDS
        if self._keeping is not None and not self._keeping.done():
            self._failed(f"the disk has not taken them for {KEEP_SECONDS:.0f} s")
        else:
            self._keeping = asyncio.create_task(self._keep(list(views)))

    async def keep_last(self, views: Iterable[PoolView], seconds: float) -> None:
        """Keep the charts at a stop. Takes `seconds` at most."""
        try:
            async with asyncio.timeout(seconds):
                if self._keeping is not None:
                    await self._keeping
                await self._keep(list(views), last=True)
        except TimeoutError:
            self._failed("the server stops")

    async def _keep(self, views: list[PoolView], *, last: bool = False) -> None:
        contents = {}
        for view in views:
            if self._pools.keeps_charts(view.engine.pool_name):
                contents[view.engine.pool_name] = encoded(view.history, view.engine.handles.mark)
                await asyncio.sleep(0)
        if not contents:
            return
        try:
            packed = await asyncio.to_thread(_compressed, contents)
            await self._pools.keep_charts(packed, last=last)
        except StorageUnavailable as error:
            self._failed(error.detail)
        except Exception:
            _log.exception("keeping the charts failed")
        else:
            if self._failing:
                _log.info("the charts are kept again")
            self._failing = False

    def _failed(self, reason: str) -> None:
        if not self._failing:
            _log.warning("the charts aren't kept, so a restart would lose the latest: %s", reason)
        self._failing = True


def _compressed(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {name: zlib.compress(content, _LEVEL) for name, content in contents.items()}
