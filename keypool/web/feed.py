"""The feed: changes of the pool for many viewers, at a bounded cost.

    engine --(polled 4 times a second while there are viewers)--> Feed --(one frame at a time)--> viewer

The engine pushes nothing: its counters show whether anything has changed, its latest events what has. So the
feed adds no cost to a call, and 2,000 calls a second cause at most four frames. The text of a frame is encoded
once for all viewers, except its number `seq`, which each viewer counts separately.

A viewer has at most one frame in flight. Until that has been handed to the network, the viewer is skipped;
its next frame has the current state and the number of events that it missed. So a slow viewer gets
fewer and fresher frames, and one that never reads costs one frame.

A Viewer is anything that frames can be sent to; websockets, HTTP and cookies are in feed_handler.py.
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
from keypool.web.history import GAUGES, History

INTERVAL = 0.25  # seconds between frames
QUIET = 5.0  # seconds without a frame after which a beat shows that the connection is alive
EVENTS = 50  # in a frame at most
AT_ONCE = 16  # viewers that are sent a frame in one turn of the loop: about half a millisecond

GOING_AWAY, FAILED = 1001, 1011
SIGNED_OUT = 4401
"""Close code for a viewer whose session has ended, from the range that RFC 6455 leaves to applications."""

_log = logging.getLogger("keypool.feed")
_encode = msgspec.json.Encoder().encode


class Viewer(Protocol):
    """A subscriber of the feed."""

    def send(self, frame: bytes) -> Awaitable[None]:
        """Send a frame; the result is done when the frame has been handed to the network."""
        ...

    def leave(self, code: int, reason: str) -> None:
        """Close the connection."""
        ...

    def signed_in(self) -> bool:
        """Whether its session is still valid. Cheap."""
        ...


class _Seat:
    """The state of one viewer's stream: what it has been sent, and whether a frame is in flight."""

    __slots__ = (
        "busy",
        "events",
        "events_seen",
        "greeted",
        "history",
        "numbers",
        "seq",
        "viewer",
        "written_at",
    )

    def __init__(self, viewer: Viewer, history: bool, events: bool) -> None:
        self.viewer = viewer
        self.history = history
        self.events = events
        self.greeted = False
        self.seq = 0
        self.busy = False
        self.events_seen = 0
        self.numbers: tuple[int, ...] = ()
        self.written_at = 0.0


class ViewerLimit:
    """The number of open viewers of all pools, `most` at most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0

    def require_room(self) -> None:
        """Raise TooManyViewers if no further viewer may join."""
        if self.count >= self.most:
            raise TooManyViewers(self.most)


class Feed:
    """Sends changes of one engine to its viewers. `now` is the wall clock, in seconds. Needs a running loop."""

    def __init__(
        self, engine: Engine, history: History, limit: ViewerLimit, now: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._history = history
        self._limit = limit
        self._now = now
        self._seats: dict[Viewer, _Seat] = {}
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def require_room(self) -> None:
        """Raise Draining or TooManyViewers if no further viewer may join."""
        if self._closed:
            raise Draining
        self._limit.require_room()

    async def join(self, viewer: Viewer, *, history: bool = True, events: bool = True) -> None:
        """Add a viewer and send it a hello; while draining, close it instead. Raises TooManyViewers.

        A viewer that draws no charts or lists no events needn't get them: they are most of a frame.
        """
        if self._closed:
            viewer.leave(GOING_AWAY, "draining")
            return
        self.require_room()
        seat = self._seats[viewer] = _Seat(viewer, history, events)
        self._limit.count += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            stats = await self._engine.stats()
        except KeypoolError:
            return  # storage is down: `_tick` sends the hello once stats can be read
        if viewer in self._seats and not seat.greeted:
            self._greet(seat, stats)

    def part(self, viewer: Viewer) -> None:
        """Remove a viewer; harmless if it isn't there."""
        if self._seats.pop(viewer, None) is not None:
            self._limit.count -= 1

    def drain(self) -> None:
        """Close all viewers, and refuse new ones."""
        self._closed = True
        for viewer in list(self._seats):
            viewer.leave(GOING_AWAY, "draining")
        if self._task is not None:
            self._task.cancel()

    async def snapshot(self) -> dict[str, Any]:
        """The current state, for browsers that poll."""
        return {
            "now": moment(self._now()),
            "stats": await self._engine.stats(),
            "events": self._engine.recent(EVENTS),
        }

    # -- frames

    async def _run(self) -> None:
        """Send frames four times a second, while there are viewers."""
        try:
            while self._seats:
                started = self._loop.time()
                self._close_signed_out()
                try:
                    await self._tick(await self._engine.stats())
                except KeypoolError as error:  # storage is down, but beats go on
                    _log.debug("no numbers to send: %s", error.detail)
                self._beat()
                await asyncio.sleep(max(INTERVAL / 5, started + INTERVAL - self._loop.time()))
        except Exception:
            _log.exception("the feed failed; its viewers have to reconnect")
            for viewer in list(self._seats):
                self.part(viewer)
                viewer.leave(FAILED, "internal")
        finally:
            self._task = None

    def _close_signed_out(self) -> None:
        for viewer in [viewer for viewer in self._seats if not viewer.signed_in()]:
            self.part(viewer)
            viewer.leave(SIGNED_OUT, "signed out")

    async def _tick(self, stats: Stats) -> None:
        numbers, events_seen = _numbers(stats), self._engine.event_seq
        # Read once, before the first pause, as more may happen in one.
        unseen = max(
            (events_seen - seat.events_seen for seat in self._seats.values() if seat.events), default=0
        )
        latest = self._engine.recent(min(unseen, EVENTS))
        # By the number of events that are new to a viewer; nearly always one entry.
        tails: dict[int, bytes] = {}
        text = moment(self._now())
        sent = 0
        for seat, greeted in [(seat, seat.greeted) for seat in self._seats.values()]:
            if sent == AT_ONCE:
                await asyncio.sleep(0)
                sent = 0
            if seat.busy or seat.viewer not in self._seats:
                continue
            if not seat.greeted:
                self._greet(seat, stats)
                sent += 1
                continue
            new = events_seen - seat.events_seen if seat.events else 0
            # One that was greeted in a pause knows more.
            if greeted and (new or numbers != seat.numbers):
                if new not in tails:
                    events = latest[-new:] if new else []
                    tails[new] = _tail(
                        {"now": text, "stats": stats, "events": events, "dropped": new - len(events)}
                    )
                seat.events_seen, seat.numbers = events_seen, numbers
                self._send(seat, "delta", tails[new])
                sent += 1

    def _beat(self) -> None:
        """Send a beat to the viewers that have had no frame for QUIET seconds."""
        now = self._loop.time()
        tail = _tail({"now": moment(self._now())})
        for seat in list(self._seats.values()):
            if seat.greeted and not seat.busy and now - seat.written_at >= QUIET:
                self._send(seat, "beat", tail)

    def _greet(self, seat: _Seat, stats: Stats) -> None:
        seat.greeted = True
        seat.events_seen, seat.numbers = self._engine.event_seq, _numbers(stats)
        self._history.add(self._now(), stats)  # the first viewer of a pool comes before its first sample
        hello = {
            "now": moment(self._now()),
            "stats": stats,
            "history": self._history.encoded() if seat.history else None,
            "events": self._engine.recent(EVENTS) if seat.events else [],
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
        if future.cancelled() or future.exception() is not None:  # closed meanwhile, which is not an error
            self.part(seat.viewer)


def _numbers(stats: Stats) -> tuple[int, ...]:
    """The numbers whose change is worth a frame: all but the uptime."""
    return (*(getattr(stats, name) for name in GAUGES), *counter_values(stats))


def _tail(members: dict[str, Any]) -> bytes:
    """The members of a frame after type and number, up to the closing brace."""
    return _encode(members)[1:]
