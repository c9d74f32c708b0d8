"""The synchronous transport, on the standard library alone: keep-alive connections, each with a deadline.

A connection is written to here and read by http.client's HTTPResponse. http.client's own connection class is
not used because it doesn't tell the failures apart that matter: whether the whole request was handed to the
system before something broke. Nor does it bound the time of a whole answer, only of each piece of it.

Thread-safe without a lock: a connection is taken out of the list by whoever uses it. So nothing can be left
locked in a forked child, which notices that it is one, and opens connections of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import os
import select
import socket
import ssl
from typing import TYPE_CHECKING, cast

from keypool.client.clock import now
from keypool.client.errors import AnswerLost, PoolClosed, UnexpectedAnswer, Unreachable
from keypool.client.wire import LARGEST_ANSWER, LEAVING_SECONDS, QUEUED_SECONDS, Address, Answer, Request

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_IDLE_KEPT = 8
_TRUSTED_SECONDS = 2.0
"""A connection that was idle for longer isn't given a call that can't be repeated: the server may be closing
it at this very moment, and nobody could tell whether it had read the call."""

_TICK = 0.2  # seconds between looks at the deadline, which a signal handler may have moved


class BlockingTransport:
    """Sends requests over connections that are kept for the next one. See the module."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._pid = os.getpid()
        self._closed = False

    def exchange(self, request: Request) -> Answer:
        """The answer to a request. Raises Unreachable, AnswerLost, UnexpectedAnswer."""
        if self._closed:
            raise PoolClosed("this client was closed")
        connection = self._take(request)
        self._busy.add(connection)
        try:
            answer, reusable = connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        self._put_back(connection, reusable)
        return answer

    def close(self) -> None:
        """Close all connections. Calls under way in other threads end with AnswerLost."""
        self._closed = True
        self._leave_to_parent()
        for connection in list(self._busy):
            connection.cut()
        while self._idle:
            self._idle.pop().close()

    def _take(self, request: Request) -> _Connection:
        self._leave_to_parent()
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.fit(request.repeatable):
                    return connection
                connection.close()
        return _Connection(self._address, request.timeout)

    def _put_back(self, connection: _Connection, reusable: bool) -> None:
        if reusable and not self._closed and len(self._idle) < _IDLE_KEPT:
            self._idle.append(connection)
        else:
            connection.close()

    def _leave_to_parent(self) -> None:
        """In a forked child: the connections are the parent's. Closing our copies doesn't disturb it."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        theirs, self._idle, self._busy = {*self._idle, *self._busy}, [], set()
        for connection in theirs:
            connection.close()


class _Connection:
    """One connection. `deadline` is a moment of clock.now after which nothing is waited for."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.deadline = now() + timeout
        self._idle_since = now()
        self._half_close_at: float | None = None
        self._sock = _connect(address, timeout)

    def exchange(self, request: Request) -> tuple[Answer, bool]:
        """The answer, and whether the connection can be used again."""
        self.deadline = now() + request.timeout + request.wait
        sent_at = now()
        if request.leaving is not None:
            request.leaving.sending(lambda: self._leave(sent_at, half_close=request.wait > 0))
        try:
            self._send(_encode(request))
            return self._receive(request.method, sent_at)
        finally:
            if request.leaving is not None:
                request.leaving.over()

    def fit(self, repeatable: bool) -> bool:
        """Whether an idle connection may be used: nothing has come on it, not even its end."""
        trusted = repeatable or now() - self._idle_since < _TRUSTED_SECONDS
        return trusted and not _readable(self._sock, 0)

    def cut(self) -> None:
        """End what another thread does on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and in this process only."""
        self._sock.close()

    def _leave(self, sent_at: float, *, half_close: bool) -> None:
        self.deadline = min(self.deadline, now() + LEAVING_SECONDS)
        if half_close and self._half_close_at is None:
            self._half_close_at = sent_at + QUEUED_SECONDS

    def _half_close(self) -> None:
        if self._half_close_at is not None and now() >= self._half_close_at:
            self._half_close_at = math.inf  # once
            with contextlib.suppress(OSError):
                # The plain socket's: SSLSocket.shutdown would forget that there is TLS to read.
                socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                self._sock.settimeout(self._left())
                view = view[self._sock.send(view) :]
        except OSError as error:
            # The system took less than the whole request, so the server can't act on it.
            raise Unreachable(f"the connection broke while sending: {error}") from None

    def _receive(self, method: str, sent_at: float) -> tuple[Answer, bool]:
        response = http.client.HTTPResponse(cast("socket.socket", _Readable(self)), method=method)
        try:
            response.begin()
            body = response.read(LARGEST_ANSWER + 1)
        except TimeoutError:
            raise AnswerLost("no answer in time") from None
        except (OSError, http.client.IncompleteRead) as error:
            raise AnswerLost(f"the connection broke before the answer was whole: {error}") from None
        except http.client.HTTPException as error:
            raise UnexpectedAnswer(
                f"what answers there doesn't speak HTTP ({type(error).__name__}): is the URL right?"
            ) from None
        finally:
            response.close()  # or Python 3.13 does it later, and complains of what is closed by then
        if len(body) > LARGEST_ANSWER:
            raise UnexpectedAnswer(f"an answer of more than {LARGEST_ANSWER} bytes", response.status)
        framed = response.length == 0 or response.chunked or response.status in (204, 304)
        if not framed:  # also a head that was cut off, which HTTPResponse takes for a whole one
            raise AnswerLost("the connection ended before the answer was known to be whole")
        self._idle_since = now()
        answer = Answer(response.status, dict(response.headers), body, sent_at, self._idle_since)
        return answer, not response.will_close and self._half_close_at is None

    def _left(self) -> float:
        left = self.deadline - now()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def read_into(self, buffer: WriteableBuffer) -> int:
        """Bytes that have come, at least one unless the connection ended. Raises TimeoutError, OSError."""
        pending = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0
        while not pending and not _readable(self._sock, min(_TICK, self._left())):
            self._half_close()
        self._sock.settimeout(self._left())
        return self._sock.recv_into(buffer)


class _Readable(io.RawIOBase):
    """What HTTPResponse takes for a socket, and reads from as a file."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def makefile(self, mode: str) -> io.BufferedReader:
        """See the class."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See _Connection.read_into."""
        return self._connection.read_into(buffer)


def _connect(address: Address, timeout: float) -> socket.socket:
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((address.host, address.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.ssl is not None:
            return address.ssl.wrap_socket(sock, server_hostname=address.host)
        return sock
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError | UnicodeError):
            raise unreachable(address, error) from None
        raise


def unreachable(address: Address, error: BaseException) -> Unreachable:
    """The error of a connection that couldn't be made."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    made = Unreachable(f"can't reach {address.url}: {reason}")
    unknown_name = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
    # A name that doesn't exist, or a certificate that isn't trusted, will not be better in a second.
    made.transient = not unknown_name and not isinstance(error, ssl.SSLCertVerificationError | UnicodeError)
    return made


def _encode(request: Request) -> bytes:
    lines = [f"{request.method} {request.target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if request.body is not None or request.method == "POST":
        lines.append(f"Content-Length: {len(request.body or b'')}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (request.body or b"")


def _readable(sock: socket.socket, seconds: float) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    return bool(select.select([sock], [], [], seconds)[0])
