"""The fast HTTP server: that of http1, answering what it refuses by itself with the API's problem details."""

from __future__ import annotations

from tornado.web import Application

from keypool.api.decoding import too_large
from keypool.api.dispatch import Dispatcher, unexpected
from keypool.config.limits import Limits
from keypool.config.proxies import TrustedProxies
from keypool.core.errors import HeadersTooLarge, KeypoolError, RequestTimeout, UriTooLong
from keypool.http.fast_call import head_of, wire
from keypool.http.http1 import Refusal, Server


class FastServer(Server):
    """See the module."""

    def __init__(
        self, app: Application, limits: Limits | None = None, trusted: TrustedProxies | None = None
    ) -> None:
        super().__init__(app, limits=limits, trusted=trusted, on_refused=self._refused)

    def _refused(self, refusal: Refusal) -> bytes | None:
        """The whole answer to a refused request; None for a bare one, as to bytes that aren't an HTTP request."""
        error = _error(refusal)
        if error is None:
            return None
        assert isinstance(self.application, Application)
        dispatcher: Dispatcher = self.application.settings["dispatcher"]
        head = head_of(refusal.method, refusal.target, refusal.headers, None) if refusal.complete else None
        seconds = self.limits.body_seconds if isinstance(error, RequestTimeout) else 0.0
        return wire(dispatcher.refused(head, error, seconds))


def _error(refusal: Refusal) -> KeypoolError | None:
    match refusal.status:
        case 400 | 501:
            return None
        case 408:
            return RequestTimeout(refusal.detail)
        case 413:
            return too_large()
        case 414:
            return UriTooLong(refusal.detail)
        case 431:
            return HeadersTooLarge(refusal.detail)
        case _:
            return unexpected()
