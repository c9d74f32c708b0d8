"""The Valkeys behind an engine: which node has which slot, connections to them, and recovery.

A node, by its address, is in one of these states:

    state       means                                    leaves it by
    unknown     has none of the pool's slots, or wasn't  a slot of the pool moves there: recovery connects
                tried yet
    serving     in `serving`: its connection is up, and  the connection is lost, or a call is refused: failed
                it has proved that it is a primary
    failed      in `failures`, with reason and moment;   a round of recovery can use it: serving;
                its partitions are unreachable           it has no slots any more: forgotten

What happens to a call that meets a node in each of these states is in calls.py.

A round of recovery finds out which node has which slot in a cluster, or which of several addresses is the primary,
and connects. It checks that each node is a primary that doesn't evict, that the pool is still the one that was opened
(`verify`), and that nodes which refused a write accept one again (`check_writable`). Rounds are repeated, with
exponential back-off and jitter, until one succeeds, whether or not calls arrive meanwhile. Failures are kept by
address, so the partitions of other nodes are served throughout.

`gone` is final: the pool that was opened is not there any more, and no call is served until the server restarts.

Why not redis-py or valkey-glide: see docs/architecture.md; a command through redis-py's cluster client takes several
times the processor time of one here, and doesn't report whether a failed command was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from keypool.engine.valkey.link import UNREACHABLE, Link, PipelineMetrics, Reply, ReplyError, Word, connect
from keypool.engine.valkey.scripts import SLOTS, scripts, slot_of
from keypool.engine.valkey.url import Address, ValkeyUrl

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between rounds of recovery
_log = logging.getLogger("keypool.valkey")


@dataclass(slots=True)
class Failure:
    """Why the partitions at an address can't be served, and since when by the loop's clock."""

    reason: str
    since: float


class User(Protocol):
    """Who sends calls to the nodes: the ScriptClient of a pool."""

    @property
    def slots(self) -> Collection[int]:
        """Those of the pool's partitions."""
        ...

    def node_failed(self, address: Address | None) -> None:
        """Called with the address of a node that has failed just now, or with None if the pools are gone."""
        ...

    def recovered(self) -> None:
        """Called after each round of recovery: calls for some nodes may be served again."""
        ...

    async def check_writable(self, address: Address, link: Link) -> None:
        """Raise, as commands do, while a node that refused a write still refuses it."""
        ...


class Nodes:
    """See the module. Usage: `connect`, `add` those who use it, `connect` again; then calls can be sent."""

    def __init__(self, url: ValkeyUrl) -> None:
        self.url = url
        self.metrics = PipelineMetrics()
        self.loop = asyncio.get_running_loop()
        self.gone: str | None = None
        """Why no call will be served any more."""
        self.of_slot: list[Address] = [url.nodes[0]] * SLOTS
        """The node that has each slot, as far as is known."""
        self.serving: dict[Address, Link] = {}
        self.failures: dict[Address, Failure] = {}
        self.verify: Callable[[], Awaitable[object]] | None = None
        """Awaited in each round of recovery: calls `lose_pool` unless the pool is still there."""
        self._users: list[User] = []
        self._links: dict[Address, Link] = {}
        self._error: str | None = "not connected yet"  # of the latest round; it needn't concern any one node
        self._recovery: asyncio.Task[None] | None = None
        self._another_round = False
        self.closed = False

    def add(self, user: User) -> None:
        """Connect from the next round on to the nodes that have this one's slots; to no others."""
        self._users.append(user)

    def discard(self, user: User) -> None:
        """Forget one that was added. O(users)."""
        if user in self._users:
            self._users.remove(user)

    @property
    def slots(self) -> set[int]:
        """The slots of the partitions of all pools. O(partitions)."""
        return {slot for user in self._users for slot in user.slots}

    async def execute(self, key: str, *words: Word) -> Reply:
        """The reply of the node that has `key`, a name with a hash tag. Raises OSError, ReplyError, ConnectionLost."""
        link = await self.link_to(self.of_slot[slot_of(key)])
        try:
            return await link.execute(*words)
        except ReplyError as error:
            if str(error).startswith("MOVED"):
                self.recover()
            raise

    async def execute_on_all(self, *words: Word) -> list[Reply]:
        """The replies of all nodes that have slots. Raises OSError, ReplyError or ConnectionLost."""
        links = [await self.link_to(address) for address in dict.fromkeys(self.of_slot)]
        return [await link.execute(*words) for link in links]

    def any_node(self) -> Address:
        """A node that is probably up."""
        return random.choice([*self.serving] or self.url.nodes)  # noqa: S311 - no secret

    async def connection(self, address: Address, on_lost: Callable[[Link, str], None]) -> Link:
        """A new connection, without scripts loaded. Raises OSError, ReplyError or ConnectionLost."""
        hello: list[tuple[Word, ...]] = [("CLIENT", "SETNAME", "keypool")]
        if self.url.db:
            hello.insert(0, ("SELECT", self.url.db))
        if self.url.password is not None:
            user = (self.url.user,) if self.url.user else ()
            hello.insert(0, ("AUTH", *user, self.url.password))
        return await connect(address, self.url.tls, hello, self.metrics, on_lost)

    @property
    def failing(self) -> str | None:
        """Why some calls can't be served, for each failed address; None while all can. O(failed nodes)."""
        if self.gone is not None or not self.failures:
            return self.gone or self._error
        return "; ".join(
            failure.reason if failure.reason.startswith(where) else f"{where}: {failure.reason}"
            for (host, port), failure in self.failures.items()
            for where in [f"{host}:{port}"]
        )

    def lose_pool(self, reason: str) -> None:
        """Refuse all calls until the server is restarted, as the pool that was opened is not there any more."""
        if self.gone is None:
            _log.error("%s: no call is served until this server is restarted", reason)
            self.gone = reason
            self._failed(None)

    def fail(self, address: Address, reason: str) -> None:
        """Mark a node as failed, and start recovery."""
        if not self.closed:
            self._note_failure(address, reason)
            self.recover()

    def recover(self) -> None:
        """Start recovery, or have it make another round."""
        self._another_round = True
        if self._recovery is None and not self.closed:
            self._recovery = self.loop.create_task(self._recover())

    @property
    def recovering(self) -> bool:
        """Whether recovery is running."""
        return self._recovery is not None

    async def close(self) -> None:
        """Close all connections."""
        self.closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        for link in list(self._links.values()):
            link.close()
        await asyncio.sleep(0)  # one turn, in which the loop closes them

    # -- recovery

    def _note_failure(self, address: Address, reason: str) -> None:
        if failure := self.failures.get(address):
            failure.reason = reason
            return
        self.failures[address] = Failure(reason, self.loop.time())
        if any(self.of_slot[slot] == address for slot in self.slots):
            _log.warning("Valkey at %s:%d: %s", *address, reason)
            self._failed(address)

    def _failed(self, address: Address | None) -> None:
        for user in self._users:
            user.node_failed(address)

    async def _recover(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._another_round and self.gone is None:
                self._another_round = False
                try:
                    await self.connect()
                except Exception as error:
                    if not isinstance(error, UNREACHABLE):
                        _log.exception("recovery failed")
                    self._error, self._another_round = str(error), True
                for user in list(self._users):
                    user.recovered()
                if self._another_round:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                    pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._recovery = None

    async def connect(self) -> None:
        """One round of recovery. Tries every node, then raises the error of the first that failed: OSError, ReplyError
        or ConnectionLost.
        """
        if self.url.cluster:
            await self._read_slots()
        elif len(self.url.nodes) > 1:
            self.of_slot = [await self._find_primary()] * SLOTS
        wanted = {self.of_slot[slot] for slot in self.slots or (0,)}
        results = await asyncio.gather(*map(self._usable_link, wanted), return_exceptions=True)
        if self.verify is not None:
            # A node that doesn't answer must not stop the others: only its own partitions aren't served.
            with contextlib.suppress(*UNREACHABLE):
                await self.verify()
        self._apply(dict(zip(wanted, results, strict=True)))
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._error = None

    def _apply(self, found: dict[Address, Link | BaseException]) -> None:
        """Let usable nodes serve, record failed ones, and forget those that have no slots any more."""
        for address, result in found.items():
            if isinstance(result, BaseException):
                self._note_failure(address, str(result))
            elif result.up:  # else it was lost during this round, and its failure is recorded already
                self.serving[address] = result
                if self.failures.pop(address, None) is not None and self._users:
                    _log.info("Valkey at %s:%d serves again", *address)
        for address in self.failures.keys() - found.keys():
            del self.failures[address]
        for address in self._links.keys() - found.keys():
            if not self._links[address].in_flight:
                self.serving.pop(address, None)
                self._links.pop(address).close()

    async def _usable_link(self, address: Address) -> Link:
        """A connection to a node that can serve its partitions. Raises OSError, ReplyError or ConnectionLost."""
        link = await self.link_to(address)
        await _require_primary(link)
        if self.serving.get(address) is not link:
            await _refuse_eviction(link)
        for user in list(self._users):
            await user.check_writable(address, link)
        return link

    async def _find_primary(self) -> Address:
        """The address of the primary. Raises OSError unless exactly one is: with two primaries, servers could use
        different ones, and lease the same key to two clients.
        """
        found = []
        links = await asyncio.gather(*map(self.link_to, self.url.nodes), return_exceptions=True)
        for address, link in zip(self.url.nodes, links, strict=True):
            if isinstance(link, Link):
                try:
                    await _require_primary(link)
                    found.append(address)
                except UNREACHABLE as error:
                    _log.debug("%s:%s isn't the primary: %s", *address, error)
        if len(found) != 1:
            names = ", ".join(f"{host}:{port}" for host, port in found or self.url.nodes)
            raise OSError(
                f"{names} are all primaries" if found else f"none of {names} is a primary that answers"
            )
        return found[0]

    async def _read_slots(self) -> None:
        """Read `of_slot` from the first node that answers. Raises the error of the last one tried."""
        up = [address for address, link in self._links.items() if link.up]
        known = dict.fromkeys([*up, *self._links, *self.of_slot[:: SLOTS // 64], *self.url.nodes])
        error: Exception = OSError("no node of the cluster is known")
        for address in known:
            try:
                ranges = await (await self.link_to(address)).execute("CLUSTER", "SLOTS")
                break
            except UNREACHABLE as failed:
                error = failed
        else:
            raise error
        covered, of_slot = 0, list(self.of_slot)
        for first, last, (host, port, *_), *_ in ranges:
            # An empty host is the address that the command was sent to.
            primary = (host.decode() if host else address[0], port)
            of_slot[first : last + 1] = [primary] * (last + 1 - first)
            covered += last + 1 - first
        if covered < SLOTS:
            raise OSError(f"the cluster serves {covered} of {SLOTS} slots")
        self.of_slot = of_slot

    async def link_to(self, address: Address) -> Link:
        """The connection to a node, with all scripts loaded; connects if need be. Raises OSError, ReplyError or
        ConnectionLost.
        """
        link = self._links.get(address)
        if link is not None and link.up:
            return link
        try:
            link = await self.connection(address, self._link_lost)
        except OSError as error:
            raise OSError(f"{address[0]}:{address[1]}: {error.strerror or error}") from None
        try:
            loads = (link.execute("SCRIPT", "LOAD", script.text) for script in scripts().values())
            await asyncio.gather(*loads)
        except BaseException:
            link.close()
            raise
        other = self._links.get(address)
        if other is not None and other.up:  # another caller was faster
            link.close()
            return other
        self._links[address] = link
        return link

    def _link_lost(self, link: Link, reason: str) -> None:
        for address, each in self._links.items():
            if each is link:
                self.fail(address, reason)
                return


async def _require_primary(link: Link) -> None:
    """Raise OSError if the node is a replica, ReplyError while it is loading."""
    await link.execute("PING")
    try:
        role = await link.execute("ROLE")
    except ReplyError as error:
        if not str(error).startswith("NOPERM"):
            raise
    else:
        if role[0] != b"master":
            raise OSError("READONLY: it is a replica")


async def _refuse_eviction(link: Link) -> None:
    """Raise OSError if Valkey would evict keys when memory is short. Logs a warning if its policy can't be read."""
    try:
        info = (await link.execute("INFO", "memory")).decode()
    except ReplyError as error:
        _log.warning("can't check that Valkey's maxmemory-policy is noeviction, as it must be: %s", error)
        return
    found = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    policy = found.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return
    if found.get("maxmemory") != "0":
        raise OSError(f"maxmemory-policy is {policy}, which evicts keys: set it to noeviction")
    _log.warning("Valkey's maxmemory-policy is %s: before you set a maxmemory, set it to noeviction", policy)
