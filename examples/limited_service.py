"""A service that limits each API key to a few requests a second, for limited_worker.py and limited_worker_async.py.

    GET / with X-Api-Key        200, or 429 with Retry-After once the key has had its requests of this window

It stands for the services that keys are bought for. It counts how many requests it refused, and how many of them
came from clients that ignored the Retry-After of an earlier refusal: many services ban a key for that.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Limits:
    """So many `requests` a key in each window of so many `seconds`, and what came of it."""

    requests: int = 5
    seconds: float = 1.0
    served: int = 0
    refused: int = 0
    ignored: int = 0
    _windows: dict[str, tuple[float, int]] = field(default_factory=dict)
    _told: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, key: str) -> int:
        """Count a request of a key: 0 if it is served, else after how many whole seconds to come back."""
        now = time.monotonic()
        with self._lock:
            began, count = self._windows.get(key, (now, 0))
            if now >= began + self.seconds:
                began, count = now, 0
            if count < self.requests:
                self._windows[key] = began, count + 1
                self.served += 1
                return 0
            self.refused += 1
            self.ignored += now < self._told.get(key, 0.0)
            wait = math.ceil(began + self.seconds - now)
            self._told[key] = now + wait
            return wait


@contextlib.contextmanager
def running(limits: Limits) -> Iterator[str]:
    """Serve on a free port until the end of the `with`; gives the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wait = limits.take(self.headers.get("X-Api-Key", ""))
            body = b"slow down\n" if wait else b"an answer\n"
            self.send_response(429 if wait else 200)
            if wait:
                self.send_header("Retry-After", str(wait))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing, or every request would be a line."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
