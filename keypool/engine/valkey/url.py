"""The URL of a pool in Valkey, as `--engine` takes it, and as it is shown, without its password.

    valkey://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…][/DB][?pool=NAME]    one Valkey, perhaps with its replicas
    valkey+cluster://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…][?pool=NAME]  a cluster, by some of its nodes
    valkeys://…, valkeys+cluster://…                                          the same over TLS

A user or password that contains one of `:@/?,` is percent-encoded. All Valkey keys of a pool start with its name
(default `keypool`), so several pools can share a Valkey.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

TAKES = "embedded, valkey://HOST:PORT/DB or valkey+cluster://HOST:PORT,HOST:PORT"
DEFAULT_PORT = 6379

Address = tuple[str, int]

_URL = re.compile(
    r"(?P<scheme>valkeys?(?P<cluster>\+cluster)?)://(?:(?P<user>[^@/?]*)@)?(?P<hosts>[^@/?]+)"
    r"(?:/(?P<db>[0-9]{0,4}))?(?:\?pool=(?P<pool>[A-Za-z0-9_.-]{1,64}))?"
)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class ValkeyUrl:
    """A parsed URL. Without `cluster`, one of `nodes` is the primary. The repr doesn't show the password."""

    nodes: tuple[Address, ...]
    cluster: bool = False
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    pool: str = "keypool"

    @property
    def default_partitions(self) -> int:
        """How many partitions a new pool gets by default.

        Several partitions spread a pool over the nodes of a cluster. On a single Valkey they only cost: lists and
        stats call a script for each.
        """
        return 16 if self.cluster else 1


def parse(url: str) -> ValkeyUrl:
    """Parse a URL. Raises ValueError, whose message doesn't contain the URL."""
    found = _URL.fullmatch(url)
    if found is None or not url.isprintable():
        raise ValueError("not a Valkey URL")
    cluster = found["cluster"] is not None
    nodes = tuple(_address(text) for text in found["hosts"].split(","))
    db = int(found["db"] or 0)
    if cluster and db:
        raise ValueError("a cluster has one database")
    user, colon, password = (found["user"] or "").partition(":")
    return ValkeyUrl(
        nodes,
        cluster,
        found["scheme"].startswith("valkeys"),
        unquote(user) or None,
        unquote(password) if colon else None,
        db,
        found["pool"] or "keypool",
    )


def without_password(url: str) -> str:
    """The URL, valid or not, with everything up to the last @ masked."""
    scheme, found, rest = url.partition("://")
    if not found or "@" not in rest:
        return url
    return f"{scheme}://•••@{rest.rpartition('@')[2]}"


def _address(text: str) -> Address:
    found = _HOST.fullmatch(text)
    port = DEFAULT_PORT if found is None or found["port"] is None else int(found["port"])
    if found is None or not 0 < port < 65536:
        raise ValueError("not an address")
    return found["host"].strip("[]"), port
