"""Which bytes are parsed, and which requests started, when.

Requests of a connection are answered one after the other, in order: the next is started
when the answer before it is complete and the peer keeps up with reading. That is less
than HTTP allows (they could be worked on at once), but it is what Tornado does, it
orders the effects as well as the answers, and it bounds the memory: a connection parses
ahead only a little, holds at most one read of bytes unparsed, and then stops reading. A
peer that pipelines many requests gets them served in turns with other peers (see `turns`).

`Intake` also knows which deadline belongs to which state; what is done when it has
passed is the business of `Connection`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from keypool.http.http1.link import DEAF, LINGERING, READING
from keypool.http.http1.reader import RequestReader
from keypool.http.http1.request import Request
from keypool.http.http1.responses import Refusal
from keypool.http.http1.stream import is_tls
from keypool.http.http1.turns import QUANTUM

if TYPE_CHECKING:
    from keypool.http.http1.server import Server

_DEPTH = 16  # requests parsed ahead before reading stops
_HIGH = 64 * 1024  # bytes of bodies held before reading stops


class Intake(RequestReader):
    """The reading side of a connection that has a queue of requests."""

    __slots__ = (
        "_held",
        "_queue",
        "_read_paused",
        "_refusal",
        "_scheduled",
        "_turns",
        "_until",
        "current",
        "debt",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop)
        self.current: Request | None = None  # the one that may be answered
        self._queue: deque[Request] = deque()  # those behind it
        self._refusal: Refusal | None = None  # to be answered behind the queue
        self._held: bytes | memoryview = b""  # read, not yet parsed
        self._read_paused = False
        self._scheduled = False  # queued for a later turn
        self._turns = server.turns
        self._until = 0.0  # when this connection has had its quantum
        self.debt = 0.0  # see `turns.Served`

    # For the subclass.

    def start(self, request: Request) -> None:
        """Ask the application to take a request, which is `current` from now on."""
        raise NotImplementedError

    def deliver(self, request: Request) -> None:
        """Hand over what has come of the current request's body, and its end."""
        raise NotImplementedError

    def done(self, request: Request) -> None:
        """Go on behind a request that is both received and answered."""
        raise NotImplementedError

    def answer_refusal(self, refusal: Refusal) -> None:
        """Answer by the server itself, and end."""
        raise NotImplementedError

    # Bytes.

    def data_received(self, data: bytes) -> None:
        """Parse, and answer what can be answered at once."""
        turns = self._turns
        if self.mode or self._held or self._queue or turns.over or self.debt or len(data) > self.piece:
            self._received_more(data)
            return
        self.busy = True
        started = turns.clock()
        self._until = inf  # a request that comes alone is started at once, without a look at the clock
        consumed = self.recognise(data)
        if consumed < len(data):
            self._until = started + QUANTUM
            consumed = self.feed(data, consumed)
        elif self.current is None and not self._queue:
            self.busy = False
            seconds = turns.clock() - started
            turns.left -= seconds
            if seconds > QUANTUM or turns.left < 0:
                turns.overrun(self, seconds)
            return  # answered: that has settled all
        if self._queue or consumed != len(data) or self._refusal is not None:
            self._held = data[consumed:]
            self._work()
        self.busy = False
        turns.spend(self, started)
        self._settle()

    def _received_more(self, data: bytes) -> None:
        if self.mode >= LINGERING:
            if self.mode == LINGERING:
                self.drop(len(data))
        elif self.mode == DEAF:
            self.lingered += len(data)  # that there was any speaks for lingering, see _done
        else:
            self._held = bytes(self._held) + data if self._held else data
            if self.mode == READING and not self._scheduled:
                if self._turns.over or self.debt:
                    self._schedule(backlog=self.debt > 0)
                else:
                    started = self._turns.clock()
                    self.run()
                    self._turns.spend(self, started)
                    return
            self._settle()

    def _schedule(self, *, backlog: bool = True) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._turns.queue(self, backlog=backlog)

    def run(self) -> None:
        """Go on with what is queued and held, for a quantum."""
        self._scheduled = False
        if self.mode < LINGERING:
            self.busy = True
            self._until = self._turns.clock() + QUANTUM
            self._recognise_held()
            self._work()
            self.busy = False
            self._settle()

    def _recognise_held(self) -> None:
        """Spare the parser a single request that had to wait."""
        held = self._held
        if held and type(held) is bytes and self.mode == READING and self.current is None and not self._queue:
            self._held = b""
            end = self.recognise(held)
            if self.mode == READING:  # else nothing more is wanted
                self._held = held[end:]

    def _work(self) -> None:
        """Start what is queued and parse what is held, as far as may be now."""
        self._run_queue()
        while self._held and self.mode == READING and not self._congested():
            if self._turns.clock() >= self._until:
                self._schedule()
                break
            held = memoryview(self._held)
            consumed = self.feed(held[: self.piece])
            if self._held:  # else nothing more is wanted
                self._held = held[consumed:] or b""
            self._run_queue()

    def deafen(self) -> None:
        """Parse no more, and drop what is held."""
        super().deafen()
        self._held = b""

    # Requests.

    def request_started(self, request: Request) -> None:
        """Start a request if it is its turn; an upgrade waits until all before it is sent."""
        self.server.began += 1
        if (
            self.current is None
            and not self.write_paused
            and not self._queue
            and not request.upgrade
            and (self._until == inf or self._turns.clock() < self._until)
        ):
            self.start(request)
        else:
            self._queue.append(request)

    def request_received(self, request: Request) -> None:
        """Hand over the end of the body, or be done with a request answered early."""
        if request is self.current:
            if request.answered:
                self.done(request)
            else:
                self.deliver(request)

    def _run_queue(self) -> None:
        """Start requests while none is under way, and answer a refusal behind the last."""
        queue = self._queue
        while queue and self.current is None and not self.write_paused and self.mode < LINGERING:
            if queue[0].upgrade and not self._sent_all():
                return
            if self._turns.clock() >= self._until:
                self._schedule()
                return
            request = queue.popleft()
            self.start(request)
            if self._is_under_way(request) and not request.waits():
                self.request_received(request) if request.received else self.deliver(request)
        if self._refusal is not None and not queue and self.current is None:
            self.answer_refusal(self._refusal)

    def _is_under_way(self, request: Request) -> bool:
        return request is self.current

    def _sent_all(self) -> bool:
        self.flush()
        if is_tls(self.transport) or not self.transport.get_write_buffer_size():
            return True
        self.transport.set_write_buffer_limits(high=0)  # so that `drained` is called at zero
        return False

    # Flow.

    def unfinished(self) -> int:
        """Bytes held of requests that aren't answered yet, about. O(requests held)."""
        held = len(self._held) + self._carry
        if not (held or self.incoming or self._queue):
            return 0
        if self.incoming is not None:
            held += self.incoming.held_bytes()
        return held + sum(request.held_bytes() for request in self._queue)

    def read_on(self) -> None:
        """Read once more although enough is held, while an answer is waited for: the peer's end comes behind it."""
        current = self.current
        if self._read_paused and current is not None and current.received and not self.write_paused:
            self._read_paused = False
            self.transport.resume_reading()

    def _must_pause(self) -> bool:
        # What only waits for its turn, and is small, costs less to hold than to stop reading for.
        held = len(self._held)
        return held > self.piece or (held > 0 and not self._scheduled) or self._congested()

    def _congested(self) -> bool:
        if len(self._queue) >= _DEPTH:
            return True
        incoming = self.incoming
        if incoming is None or incoming.held_bytes() <= _HIGH:
            return sum(request.held_bytes() for request in self._queue) > _HIGH
        return incoming.waits()

    def _settle(self) -> None:
        """Set the deadline of the state arrived at, and stop or resume reading."""
        if self.mode >= LINGERING:
            return
        current = self.current
        if self.write_paused:
            pass  # the deadline is that of writing
        elif current is not None:
            body = current.body
            self.deadline = inf if body is None or current.received else body.deadline
        elif self._target and not self._in_head:
            self._in_head = True
            self.deadline = self.server.clock + self.limits.head_seconds
        if self.mode == READING:
            pause = bool(self._held or self.incoming or self._queue) and self._must_pause()
        else:
            pause = len(self._held) > _HIGH
        if pause != self._read_paused:
            self._read_paused = pause
            if pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()
