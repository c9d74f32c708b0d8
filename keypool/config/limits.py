"""Limits for unauthenticated clients: every number that bounds a connection, on either HTTP server.

A connection costs memory and a file descriptor before its token is read, so everything that a client can use
up without a token is bounded here: bytes and seconds of a head and of a body, connections per address and in
all. What a client with a token may use up is a setting (`--max-waiters`, `--max-keys`). These limits are not
settings, since a proxy in front is the better place to change them.

The incomplete requests of all connections together hold at most `unfinished_bytes` (plus what arrives between
two sweeps); beyond it, the connections that hold most are closed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

MAX_BODY = 256 * 1024
"""Bytes of a body; more is 413."""

MAX_IMPORT = 4 * 1024 * 1024
"""Bytes of the body of an import by an admin, alone of all."""

MAX_TARGET = 8 * 1024
"""Bytes of a request target; more is 414."""

MAX_HEADERS = 32 * 1024
"""Bytes of all headers; more is 431."""

MAX_HEAD = 64 * 1024
"""Bytes of a head that are read, so that one that is too large is answered; beyond it, the connection is closed."""

MAX_NAME = 256
"""Bytes of a header's name; more is 431. Tornado caches the latest thousand names, however long."""

REMEMBERED_NAME, REMEMBERED_HOST = 64, 255
"""Bytes of a header's name, and of a Host, that may be cached. Longer ones are parsed each time."""

DISCARDED = 4 * 1024 * 1024
"""Bytes of a refused body that are read and discarded, so that the connection can go on."""

SPARE_FILES = 64
"""Open files beside connections: the data file, the log, the writer, listening sockets."""

_log = logging.getLogger("keypool.connections")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one server. Lengths of time are seconds."""

    head_seconds: float = 10.0
    """From the first byte of a request (the first of a connection: from its opening) to the end of its head."""

    body_seconds: float = 20.0
    """From the end of the head to the end of the body."""

    idle_seconds: float = 75.0
    """Between two requests of a connection. Longer than the minute for which proxies keep idle connections."""

    write_seconds: float = 60.0
    """For a client to read an answer."""

    connections: int = 16_384
    """In all; fewer where the system allows fewer open files."""

    connections_per_address: int = 4096
    """Per address, where an IPv6 /64 network counts as one. Loopback and trusted proxies have no such limit."""

    unfinished_bytes: int = 64 * 1024 * 1024
    """Of incomplete heads and bodies, of all connections together."""

    sweep_seconds: float = 1.0
    """The interval of the sweep that enforces these limits; a limit takes effect up to this much late."""

    # The fast server only: Tornado's doesn't count headers, and closes at once instead of lingering.

    head_bytes: int = MAX_HEAD
    """Bytes of a head that are read."""

    header_count: int = 100
    """Header lines of a request; more is 431."""

    body_bytes: int = MAX_BODY
    """Bytes of a body, unless the application has another limit for the request."""

    discarded_bytes: int = DISCARDED
    """Bytes of a body that are read after its request was answered, so that the connection can go on."""

    linger_bytes: int = 16 * 1024 * 1024
    """Read and discarded after the last answer of a connection, so that a reset doesn't destroy the answer."""

    linger_seconds: float = 5.0
    """How long reading and discarding may take."""


def allowed_connections(limits: Limits) -> int:
    """How many connections the limit of open files allows, `limits.connections` at most.

    Raises the process's soft limit as far as needed and allowed.
    """
    allowed = allowed_files(limits.connections + SPARE_FILES)
    return max(1, min(limits.connections, allowed - SPARE_FILES))


def allowed_files(wanted: int) -> int:
    """How many files this process may open, up to `wanted`; raises its soft limit as far as needed and allowed."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # below 0 it is infinite
        soft = wanted if hard < 0 else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft < 0 else min(wanted, soft)


def allowed_viewers(wanted: int, limits: Limits) -> int:
    """How many connections may be websockets, `wanted` at most: half of them, so that API clients always get in."""
    allowed = min(wanted, max(1, allowed_connections(limits) // 2))
    if allowed < wanted:
        _log.warning(
            "--max-viewers=%d is more than the limit of open files allows: %d (ulimit -n)", wanted, allowed
        )
    return allowed
