"""How much a stranger may take: every number that bounds a connection, on whichever HTTP server.

A connection costs memory and a file descriptor before anybody knows whose it is, so all that can be had without
a token is bounded here: bytes of a head and of a body, seconds for each, connections an address and in all.
What a known caller may take is a setting (`--max-waiters`, `--max-keys`); these are not, because no user has a
reason to turn them that a proxy in front doesn't serve better.

What has come of requests that aren't whole yet, of all connections together, is `unfinished_bytes` at most (and what
a sweep's time brings on top): beyond it, those that hold most are cut.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

MAX_BODY = 256 * 1024
"""Bytes of a body that are read: more is 413."""

MAX_TARGET = 8 * 1024
"""Bytes of a request target: more is 414."""

MAX_HEADERS = 32 * 1024
"""Bytes of all headers: more is 431."""

MAX_HEAD = 64 * 1024
"""Bytes of a head that are taken in, so that one that is too large is answered; beyond it, hung up on."""

MAX_NAME = 256
"""Bytes of a header's name: more is 431. Tornado remembers the latest thousand names, however long."""

REMEMBERED_NAME, REMEMBERED_HOST = 64, 255
"""Bytes of a header's name, and of a Host, that may be kept in a cache. Longer ones are read anew each time."""

DISCARDED = 4 * 1024 * 1024
"""Bytes of a refused body that are read, and thrown away, for the sake of the connection."""

SPARE_FILES = 64
"""Open files beside connections: the data file, the log, the writer, and what accepts and refuses."""

_log = logging.getLogger("keypool.connections")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one server's connections. Lengths of time are seconds; tests make their own."""

    head_seconds: float = 10.0
    """From the first byte of a request (the first of a connection: from its opening) to the end of its head."""

    body_seconds: float = 20.0
    """From the end of the head to the end of the body."""

    idle_seconds: float = 75.0
    """Between two requests of a connection. Longer than the minute for which proxies keep theirs."""

    write_seconds: float = 60.0
    """For a caller to take in an answer."""

    connections: int = 16_384
    """In all; fewer where the system allows fewer open files."""

    connections_per_address: int = 4096
    """For each address; an IPv6 network of 64 bits is one. None for loopback and for trusted proxies."""

    unfinished_bytes: int = 64 * 1024 * 1024
    """Of heads and bodies that aren't whole yet, in all."""

    sweep_seconds: float = 1.0
    """How often connections are looked at: so much later than said a limit may strike."""

    # Of the fast server only: Tornado's counts no headers, and closes where this one lingers.

    head_bytes: int = MAX_HEAD
    """Of a head that is taken in."""

    header_count: int = 100
    """Header lines of a request; more is 431."""

    body_bytes: int = MAX_BODY
    """Of a body, unless the application says otherwise for its request."""

    discarded_bytes: int = DISCARDED
    """Of a body whose request was answered before it came, read so that the connection may go on."""

    linger_bytes: int = 16 * 1024 * 1024
    """Read and thrown away behind the last answer of a connection, so that the caller gets to read it."""

    linger_seconds: float = 5.0
    """The time for that."""


def allowed_connections(limits: Limits) -> int:
    """How many connections the system has files for, `limits.connections` at most.

    Raises the process's own limit as far as it may.
    """
    allowed = allowed_files(limits.connections + SPARE_FILES)
    return max(1, min(limits.connections, allowed - SPARE_FILES))


def allowed_files(wanted: int) -> int:
    """How many files the system lets this process open, up to `wanted`; raises the process's own limit for it."""
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
    """How many connections may be websockets, `wanted` at most: half of them, so that callers always get in."""
    allowed = min(wanted, max(1, allowed_connections(limits) // 2))
    if allowed < wanted:
        _log.warning("of --max-viewers=%d only %d are let in: raise ulimit -n for more", wanted, allowed)
    return allowed
