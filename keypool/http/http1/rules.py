"""Checks of a request's head beyond llhttp's.

llhttp checks the grammar, strictly. Here are the rules that need the whole head: exactly one Host, the supported
versions, the form of the target, sizes, and the framing headers together. Anything ambiguous is refused: if two servers
understand a request differently, another request can be smuggled inside it.

All but `is_host` run only for requests with something unusual about them, or a body.
"""

from __future__ import annotations

import re
import socket
from functools import lru_cache

from keypool.config.limits import REMEMBERED_HOST, Limits
from keypool.http.http1.request import Body, Request
from keypool.http.http1.responses import Refused

FRAMING = frozenset((b"content-length", b"transfer-encoding", b"expect"))

_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)

# RFC 3986, 3.2.2, without the comma.
_HOST = re.compile(
    rb"(?:(?:[\w.~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*"
    rb"|\[([0-9A-Fa-f:.]+)\]|\[v[0-9A-Fa-f]+\.[\w.~!$&'()*+,;=:-]+\])(?::[0-9]*)?[ \t]*"
)


def is_host(value: bytes) -> bool:
    """Whether a Host header is one host, with or without a port. 0.1 µs if it is in the cache."""
    return _is_known_host(value) if len(value) <= REMEMBERED_HOST else _is_host(value)


def _is_host(value: bytes) -> bool:
    match = _HOST.fullmatch(value)
    return match is not None and (match[1] is None or _is_ipv6(match[1]))


_is_known_host = lru_cache(maxsize=256)(_is_host)


def _is_ipv6(address: bytes) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, address.decode())
    except OSError:
        return False
    return True


def protocol_of(head: bytes) -> bytes:
    """The last word of a request line, before which `head` may have empty lines. O(len(head)).

    llhttp doesn't report the protocol's name, and accepts RTSP and ICE as well.
    """
    line, _, _ = head.lstrip(b"\r\n").partition(b"\r\n")
    return line.rpartition(b" ")[2]


def check_head(request: Request, hosts: int, protocol: bytes, limits: Limits) -> None:
    """Check a head that has `hosts` Host lines, and normalise its target. O(headers).

    :raises Refused: with 400 or 431.
    """
    if protocol not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Refused(400, "bad-request", "only HTTP/1.1 and HTTP/1.0 are supported")
    request.http10 = protocol == b"HTTP/1.0"
    if hosts > 1 or (hosts == 0 and not request.http10):
        raise Refused(400, "bad-request", "exactly one Host header is needed")
    if len(request.headers) > limits.header_count:
        raise Refused(431, "headers-too-large", "there are too many headers")
    if request.http10 and request.keep_alive:
        # RFC 9112, 9.3: close takes precedence. llhttp sees to that in HTTP/1.1 only.
        options = b",".join(value for name, value in request.headers if name == b"connection").lower()
        request.keep_alive = b"close" not in (option.strip() for option in options.split(b","))
    if request.method == b"CONNECT":
        _check_authority(request.target)
        # What follows may be meant for a tunnel, which isn't supported: it must not become a request.
        request.keep_alive = False
    elif not request.target.startswith(b"/") or b"#" in request.target:
        request.target = _origin_form(request)


def check_size(request: Request, limits: Limits) -> None:
    """Check the size of a head. O(headers), so only for one that came in several pieces.

    :raises Refused: with 431.
    """
    size = len(request.target) + sum(len(n) + len(v) + 4 for n, v in request.headers)
    if size > limits.head_bytes:
        raise Refused(431, "headers-too-large", "the headers are too large")


def _check_authority(target: bytes) -> None:
    _, colon, port = target.rpartition(b":")
    if not (colon and port.isdigit() and is_host(target)):
        raise Refused(400, "bad-request", "the target of CONNECT must be host:port")


def _origin_form(request: Request) -> bytes:
    """Return the target as `/path?query`. An absolute form must name the Host."""
    target = request.target
    if b"#" in target:
        raise Refused(400, "bad-request", "a request target must not have a fragment")
    if target == b"*" and request.method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or absolute[1].lower() != (request.header(b"host") or b"").lower():
        raise Refused(400, "bad-request", "the request target must be a path on this host")
    path = absolute[2]
    return path if path.startswith(b"/") else b"/" + path


def body_of(request: Request, framing: dict[bytes, bytes], limits: Limits) -> Body | None:
    """Return the body that `framing` announces, None if no body follows. O(1).

    :raises Refused: with 400, if there is a transfer coding other than chunked, a length beside it, or HTTP/1.0.
    """
    coding = framing.get(b"transfer-encoding")
    length = framing.get(b"content-length")
    if coding is not None and (coding.lower() != b"chunked" or request.http10 or length):
        raise Refused(
            400, "bad-request", "the transfer coding must be chunked, in HTTP/1.1, without a length"
        )
    if coding is None and (length is None or int(length) == 0):
        return None
    expects = framing.get(b"expect", b"").lower() == b"100-continue" and not request.http10
    return Body(None if length is None else int(length), expects, limits)
