"""One call of the API on an HTTP server: from a checked head to its answer.

`fast_call.FastCall` and `tornado_call.TornadoCall` differ in how a head is read and a reply written; all else is here,
so both servers behave alike. RequestHandler is for pages (web/pages.py); what it does for them (templates, cookies,
ETags) costs a JSON call twice what the call itself does.

Most calls never wait: they have their answer when their coroutine is first stepped. A task would cost each of them two
more iterations of the loop and a microsecond or two. So the coroutine is stepped by hand, and only one that yields is
given a `CoroutineDriver`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from time import monotonic
from typing import Any

from keypool.api.dispatch import Dispatcher, Pending, Reply, Request
from keypool.api.wrong_tokens import WrongTokens
from keypool.core.errors import WrongToken
from keypool.engine.journal import Commit
from keypool.http.http1.turns import Turns


class InFlight:
    """The number of requests that are being answered. Each request counts itself; a graceful stop waits for 0."""

    def __init__(self) -> None:
        self.count = 0

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until no request is in flight, for `seconds` at most. False if some still are."""
        deadline = monotonic() + seconds
        # Polling: an event would cost each call something, and this runs only once.
        while self.count and (left := deadline - monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(0.01, left))
        return self.count == 0


class ApiCall:
    """One request of the API. `request` is its head. A subclass sets all attributes and writes the reply.

    `turns` is the server's; a paused call queues there. If it is None, the call goes on in the loop's next iteration.
    """

    __slots__ = ("_ended", "_waiting", "dispatcher", "in_flight", "pending", "request", "started", "turns")

    dispatcher: Dispatcher
    in_flight: InFlight
    pending: Pending
    request: Request
    started: float
    turns: Turns | None
    _waiting: CoroutineDriver | _HeldBack | None
    _ended: bool

    def send(self, reply: Reply) -> bool:
        """Write the reply. False if the caller has disconnected."""
        raise NotImplementedError

    def run(self, body: bytes) -> None:
        """Run the call, now that the request is complete, or refuse it."""
        pending = self.pending
        if pending.error is not None:
            self.refuse()
            return
        try:
            call = self.dispatcher.start(pending, self.request, body)
            if call is None:
                answer = None
            else:
                yielded = call.send(None)
                self._waiting = driver = CoroutineDriver(call, self)
                driver.wait_for(yielded)
                return
        except StopIteration as returned:
            answer = returned.value
        except Exception as error:
            self.answer(self.dispatcher.failed(pending, error))
            return
        self.answer(self.dispatcher.reply(pending, answer))

    def refuse(self, *, at_once: bool = False) -> None:
        """Answer with `pending.error`, delayed if the caller's address has sent many wrong tokens.

        `at_once` forbids the delay. It is for a request whose body isn't read: its connection ends with the answer.
        """
        error = self.pending.error
        assert error is not None
        if self._waiting is not None:
            return  # the refusal is delayed already, and the body has come meanwhile
        reply = self.dispatcher.refusal(self.pending, error)
        if isinstance(error, WrongToken):
            wrong = self.dispatcher.wrong_tokens
            seconds = wrong.token(error.mark, self.request.remote_ip or "?", self.pending.request_id)
            if seconds and wrong.room() and not at_once:
                self._waiting = _HeldBack(wrong, seconds, self, reply)
                return
            reply.last = seconds > 0
        self.answer(reply)

    def answer(self, reply: Reply) -> None:
        """Send the reply, and count it if it could be sent."""
        if self.send(reply):
            self.dispatcher.answered(self.pending, reply, monotonic() - self.started)
        self.end()

    def hung_up(self) -> None:
        """The caller has disconnected. A call that was started runs to its end, unless it is an acquire."""
        runs = self._waiting is not None and self.pending.error is None
        if not runs or self.dispatcher.ends_with_caller(self.pending):
            self.end()

    def end(self) -> None:
        """End the request, which was answered or lost its caller: stop whatever the call waits for."""
        if self._ended:
            return  # answered before its body had come, and then disconnected: one request, counted once
        self._ended = True
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        self.in_flight.count -= 1


class CoroutineDriver:
    """Resumes a call's coroutine whenever the future it awaits is done, and sends the answer when it returns.

    The coroutine may await futures, but nothing that needs a current task (asyncio.timeout, locks). A bare yield
    (`asyncio.sleep(0)`) pauses it: the driver, a `turns.Served`, then queues with the connections that have a backlog.
    """

    __slots__ = ("_call", "_coroutine", "debt")

    def __init__(self, coroutine: Coroutine[Any, None, Any], call: ApiCall) -> None:
        self._coroutine: Coroutine[Any, None, Any] | None = coroutine
        self._call: ApiCall | None = call
        self.debt = 0.0

    def run(self, future: asyncio.Future[Any] | None = None) -> None:
        """Run the coroutine to its end or to its next yield."""
        coroutine, call = self._coroutine, self._call
        if coroutine is None or call is None:
            return
        try:
            yielded = coroutine.send(None)
        except StopIteration as returned:
            reply = call.dispatcher.reply(call.pending, returned.value)
        except Exception as error:  # the caller gets an answer in any case
            reply = call.dispatcher.failed(call.pending, error)
        else:
            self.wait_for(yielded)
            return
        self._coroutine = self._call = None
        call.answer(reply)

    def wait_for(self, yielded: Any) -> None:
        """Continue when `yielded`, a future, is done; in a later turn if it is None."""
        if yielded is not None:
            yielded._asyncio_future_blocking = False  # noqa: SLF001 - what a task does to take over a future
            if type(yielded) is Commit:
                yielded.on_done(self.run)  # runs as the commit completes, not one iteration of the loop later
            else:
                yielded.add_done_callback(self.run)
        elif self._call is not None and self._call.turns is not None:
            self._call.turns.queue(self, backlog=True)
        else:
            asyncio.get_running_loop().call_soon(self.run)

    def close(self) -> None:
        """End the coroutine where it waits, by GeneratorExit: its answer isn't needed any more."""
        coroutine, self._coroutine = self._coroutine, None
        self._call = None
        if coroutine is not None:
            coroutine.close()


class _HeldBack:
    """A reply to a wrong token that is sent after a delay, unless `close` is called first."""

    __slots__ = ("_timer", "_wrong")

    def __init__(self, wrong: WrongTokens, seconds: float, call: ApiCall, reply: Reply) -> None:
        self._wrong = wrong
        self._timer = asyncio.get_running_loop().call_later(seconds, call.answer, reply)
        wrong.held += 1

    def close(self) -> None:
        self._wrong.held -= 1
        self._timer.cancel()
