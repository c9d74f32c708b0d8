"""The feed: what happens to the pool, told to many viewers at a bounded cost.

    engine --(asked 4 times a second while somebody watches)--> Feed --(one frame at a time)--> viewer

The engine pushes nothing: its counters say whether anything has changed, and its latest events what. So a
call pays nothing for the feed, whether or not anybody watches, and 2,000 calls a second make no more frames
than four. A frame's text is made once and shared by all viewers but for its number.

A viewer has one frame under way at most. As long as that has not been handed to the network, it is passed
over; its next frame tells the state of that moment and counts what it missed, however long it took. So a slow
viewer gets fewer and fresher frames, and one that never reads costs one frame.

`seq` grows by one a frame, by viewer. What this module does not do: know websockets, HTTP or cookies; a
Viewer is whatever can be written to (handlers/feed.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from keypool.core.answers import Stats
from keypool.core.counters import counter_values
from keypool.core.errors import Draining, KeypoolError, TooManyViewers
from keypool.core.keys import moment
from keypool.engine import Engine
from keypool.web.history import History

INTERVAL = 0.25  # seconds between frames
QUIET = 5.0  # seconds without a frame after which a beat says that the line is alive
EVENTS = 50  # in a frame at most

GOING_AWAY, FAILED = 1001, 1011
SIGNED_OUT = 4401
"""Close code of a viewer whose session has ended: of those that RFC 6455 leaves to applications."""

_log = logging.getLogger("keypool.feed")
_encode = msgspec.json.Encoder().encode


class Viewer(Protocol):
    """Somebody who watches."""

    def send(self, frame: bytes) -> Awaitable[None]:
        """Send a frame; done when it has left this process."""
        ...

    def leave(self, code: int, reason: str) -> None:
        """Close."""
        ...

    def signed_in(self) -> bool:
        """Whether it may still watch. Cheap."""
        ...


class _Seat:
    """What one viewer has been told."""

    __slots__ = ("busy", "greeted", "numbers", "seq", "told", "viewer", "written_at")

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.greeted = False
        self.seq = 0
        self.busy = False
        self.told = 0
        self.numbers: tuple[int, ...] = ()
        self.written_at = 0.0


class Feed:
    """Everybody who watches one engine. Lives on one loop."""

    def __init__(self, engine: Engine, history: History, max_viewers: int, now: Callable[[], float]) -> None:
        self._engine = engine
        self._history = history
        self._max_viewers = max_viewers
        self._now = now
        self._seats: dict[Viewer, _Seat] = {}
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def viewers(self) -> int:
        """How many watch."""
        return len(self._seats)

    def require_room(self) -> None:
        """Raise Draining or TooManyViewers if nobody more may watch."""
        if self._closed:
            raise Draining
        if len(self._seats) >= self._max_viewers:
            raise TooManyViewers(self._max_viewers)

    async def join(self, viewer: Viewer) -> None:
        """A viewer has come: it is sent a hello. Raises TooManyViewers."""
        if self._closed:
            viewer.leave(GOING_AWAY, "draining")
            return
        self.require_room()
        seat = self._seats[viewer] = _Seat(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            stats = await self._engine.stats()
        except KeypoolError:
            return  # storage is away: `_tick` greets it when there are numbers
        if viewer in self._seats and not seat.greeted:
            self._greet(seat, stats)

    def part(self, viewer: Viewer) -> None:
        """A viewer has gone."""
        self._seats.pop(viewer, None)

    def drain(self) -> None:
        """The server stops: everybody is told to come back later, and nobody is let in any more."""
        self._closed = True
        for viewer in list(self._seats):
            viewer.leave(GOING_AWAY, "draining")
        if self._task is not None:
            self._task.cancel()

    async def snapshot(self) -> dict[str, Any]:
        """What a delta would tell somebody who knows nothing, for those who poll."""
        return {
            "now": moment(self._now()),
            "stats": await self._engine.stats(),
            "events": self._engine.recent(EVENTS),
        }

    # -- frames

    async def _run(self) -> None:
        """Tell the viewers, four times a second, until there is none."""
        try:
            while self._seats:
                started = self._loop.time()
                self._send_off()
                try:
                    self._tick(await self._engine.stats())
                except KeypoolError as error:  # storage is away: a beat says that the server isn't
                    _log.debug("no numbers to send: %s", error.detail)
                    self._beat()
                await asyncio.sleep(max(INTERVAL / 5, started + INTERVAL - self._loop.time()))
        except Exception:
            _log.exception("the feed failed; viewers are told to come again")
            for viewer in list(self._seats):
                self.part(viewer)
                viewer.leave(FAILED, "internal")
        finally:
            self._task = None

    def _send_off(self) -> None:
        for viewer in [viewer for viewer in self._seats if not viewer.signed_in()]:
            self.part(viewer)
            viewer.leave(SIGNED_OUT, "signed out")

    def _tick(self, stats: Stats) -> None:
        numbers, told = _numbers(stats), self._engine.told
        now = self._loop.time()
        tails: dict[int, bytes] = {}  # by how many events are new to a viewer: nearly always one
        text = moment(self._now())
        for seat in list(self._seats.values()):
            if seat.busy:
                continue
            if not seat.greeted:
                self._greet(seat, stats)
                continue
            new = told - seat.told
            if new or numbers != seat.numbers:
                if new not in tails:
                    events = self._engine.recent(min(new, EVENTS))
                    tails[new] = _tail(
                        {"now": text, "stats": stats, "events": events, "dropped": new - len(events)}
                    )
                seat.told, seat.numbers = told, numbers
                self._send(seat, "delta", tails[new])
            elif now - seat.written_at >= QUIET:
                self._send(seat, "beat", _tail({"now": text}))

    def _beat(self) -> None:
        """Send a beat to those who have had no frame for QUIET seconds, hello excepted: that is the first."""
        now = self._loop.time()
        tail = _tail({"now": moment(self._now())})
        for seat in list(self._seats.values()):
            if seat.greeted and not seat.busy and now - seat.written_at >= QUIET:
                self._send(seat, "beat", tail)

    def _greet(self, seat: _Seat, stats: Stats) -> None:
        seat.greeted = True
        seat.told, seat.numbers = self._engine.told, _numbers(stats)
        hello = {
            "now": moment(self._now()),
            "stats": stats,
            "history": self._history.encoded(),
            "events": self._engine.recent(EVENTS),
        }
        self._send(seat, "hello", _tail(hello))

    def _send(self, seat: _Seat, kind: str, tail: bytes) -> None:
        seat.seq += 1
        seat.busy = True
        seat.written_at = self._loop.time()
        frame = b'{"type":"%s","seq":%d,%s' % (kind.encode(), seat.seq, tail)
        written = asyncio.ensure_future(seat.viewer.send(frame))
        written.add_done_callback(lambda future: self._sent(seat, future))

    def _sent(self, seat: _Seat, future: asyncio.Future[None]) -> None:
        seat.busy = False
        if future.cancelled() or future.exception() is not None:  # closed meanwhile: nobody's error
            self.part(seat.viewer)


def _numbers(stats: Stats) -> tuple[int, ...]:
    """What a frame is sent for when it changes: every count, and not the uptime."""
    return (stats.available, stats.blocked, stats.waiting, *counter_values(stats))


def _tail(members: dict[str, Any]) -> bytes:
    """The members of a frame after type and number, up to the closing brace."""
    return _encode(members)[1:]
