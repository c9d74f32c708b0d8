"""The pool in a Valkey or Redis (6.2 and newer), or a cluster of them, shared by any number of servers.

How it is stored. The pool has `--partitions` partitions, and a key is in partition CRC-32(text) mod partitions. The
names of a partition's Valkey keys start with its hash tag (`{POOL:3.17}:`), so they are all in one slot of a cluster,
and a call is one script (lua/*.lua) on one partition, executed as a whole or not at all; lua/common.lua lists the names
and what each holds. In addition there is one hash, `{POOL}:pool`:

    layout      1: what this page describes
    partitions  their number; never changes
    born        moment of the first start, in microseconds since the epoch
    base_tick   where lease numbers start: 0, or (last lease of the pool that was moved in) // partitions + 1
    base_id     where ids start: 0, or (last id of the pool that was moved in) // partitions + 1
    note.NAME   numbers that other parts of a server store: see web/session.py
    and the settings that all servers of the pool share, by their names

and a sorted set, `{POOL}:servers`: the running servers, by the moment of their latest heartbeat (presence.py).

Ids are `number * partitions + partition + 1`, so an id determines its partition, unless it was moved in (those are
at most `base_id * partitions`, and are looked up in all partitions). The number grows within a partition, and over
all partitions with the calls of one server; several servers may assign ids out of order, but none twice. Lease numbers:
see lua/acquire.lua.

Deadlines go by the clock of the Valkey that has the partition. Every script first processes what is overdue, 32 keys
of each kind at most, and goes by the deadlines of the rest as well; so deadlines hold even if no server is running.
In addition, one server sweeps each partition when its next deadline has come, and another one stands in for it
(poller.py).

The path of a call: Partitions -> ScriptClient (calls.py) -> Link -> one script on one partition. A uniformly random key
over partitions is drawn by rejection sampling (sampler.py). An acquire fails for want of a key only when all partitions
have replied that they have none; that takes a bounded number of round trips, nearly always one while most keys are
available. The scripts enforce `--max-keys` (creation.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import NoReturn

from keypool import __version__
from keypool.core.answers import (
    EndedLease,
    GeneratedKey,
    Identity,
    KeptAlive,
    Lease,
    Page,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblocked,
)
from keypool.core.cursor import ListQuery, encode, page_query
from keypool.core.errors import Draining, NoKeyAvailable, StaleLease, StorageUnavailable, UnknownKey
from keypool.core.events import Event
from keypool.core.keys import State, hint
from keypool.core.rules import PoolRules
from keypool.engine import NOTE, Timed
from keypool.engine.valkey.calls import ScriptCall, ScriptClient, seconds_left
from keypool.engine.valkey.creation import KeyGenerator
from keypool.engine.valkey.link import UNREACHABLE, Reply
from keypool.engine.valkey.pages import Pages, row_of
from keypool.engine.valkey.partitions import Partitions, PoolFacts
from keypool.engine.valkey.poller import EXPIRING, POLL_SECONDS, PartitionPoller
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.sampler import PartitionSampler
from keypool.engine.valkey.subscriber import ReleaseSubscriber
from keypool.engine.valkey.waiters import Waiters
from keypool.ops.histogram import Histogram

_NOTE_SECONDS = 2.0
_OUTCOMES = {1: "done", 0: "done", -1: "unknown", -2: "stale"}
"""The outcomes of unblock.lua."""
_log = logging.getLogger("keypool.valkey")


class ValkeyEngine:
    """See the module, and the Engine protocol for the calls. Made by opening.py."""

    name = "valkey"

    def __init__(self, client: ScriptClient, facts: PoolFacts, presence: Presence, rules: PoolRules) -> None:
        self._client = client
        self._nodes = client.nodes
        pool = self._nodes.url.pool
        self._pool_key = f"{{{pool}}}:pool"
        self._life_us = round(rules.keepalive_seconds * 1e6)
        self._loop = asyncio.get_running_loop()
        self._presence = presence
        self._started_at = self._loop.time()
        self._draining = False
        server = presence.server
        self._partitions = Partitions(client, facts)
        self._poller = PartitionPoller(self._partitions, server, rules)
        self._sampler = PartitionSampler(self._partitions, self._poller, rules)
        self._generator = KeyGenerator(self._partitions, self._poller, server, rules)
        self._pages = Pages(self._partitions)
        self._waiters = Waiters(self._partitions, self._sampler, self._poller, server, rules.max_waiters)
        self._subscriber = ReleaseSubscriber(self._nodes, pool, facts.partitions, self._waiters.key_freed)
        self._poller.sweep()

    # -- the calls

    async def generate(self, count: int) -> list[GeneratedKey]:
        """Generate keys, all or none. O(count * log n), and O(partitions) near `max_keys`."""
        return await self._generator.generate(count)

    async def acquire(self, owner: str | None, wait: float, timed: Timed | None = None) -> Lease:
        """Lease a key, now or within `wait` seconds. O(log n), and O(partitions) if none is available."""
        if not self._waiters:
            taken = await self._sampler.take(owner, 1)
            if taken:
                return taken[0]
        if wait <= 0 and not self._waiters:
            self._refuse()
        return await self._waiters.wait(owner, wait, timed) or self._refuse()

    async def acquire_many(self, owner: str | None, count: int) -> list[Lease]:
        """Lease up to `count` keys. O(count * log n)."""
        if not self._waiters:
            return await self._sampler.take(owner, count) or self._refuse()
        first = await self._waiters.wait(owner, 0) or self._refuse()
        try:
            return [first, *await self._sampler.take(owner, 0 if self._waiters else count - 1)]
        except (GeneratorExit, asyncio.CancelledError):
            self._sampler.give_back(first)
            raise

    async def unblock(self, ref: Ref, lease: int | None, ended: list[EndedLease] | None = None) -> Unblocked:
        """Free a key. O(log n)."""
        outcome, id, latest_lease = (await self._unblock([(ref, lease)], ended))[0]
        if outcome == -1:
            raise UnknownKey
        if outcome == -2:
            assert lease is not None
            raise StaleLease(lease, latest_lease or None)
        return Unblocked(id, State.AVAILABLE, outcome == 1)

    async def unblock_many(
        self, items: Sequence[tuple[Ref, int | None]], ended: list[EndedLease] | None = None
    ) -> list[str]:
        """Free keys one by one. O(items * log n)."""
        return [_OUTCOMES[outcome] for outcome, _, _ in await self._unblock(items, ended)]

    async def _unblock(
        self, items: Sequence[tuple[Ref, int | None]], ended: list[EndedLease] | None
    ) -> list[Reply]:
        texts = await self._partitions.texts_of([ref for ref, _ in items])
        known = [
            (self._partitions.of(text), text, "" if lease is None else lease)
            for text, (_, lease) in zip(texts, items, strict=True)
            if text is not None
        ]
        found = iter(await self._partitions.each("unblock", known))
        replies = [(-1, 0, 0) if text is None else next(found) for text in texts]
        if ended is not None:
            for text, (_, lease), (outcome, id, latest_lease) in zip(texts, items, replies, strict=True):
                if text is not None and lease is None and outcome == 1:
                    ended.append(EndedLease(id, hint(text), latest_lease))
        return replies

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone a key's expiry. O(log n)."""
        text = ref if isinstance(ref, str) else await self._partitions.text_of(ref)
        call = self._client.call(self._partitions.of(text), "keepalive", (self._life_us, text))
        [id] = await call
        if not id:
            raise UnknownKey
        return KeptAlive(id, seconds_left(self._life_us, call.age()))

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[bool]:
        """Postpone expiries one by one. O(items * log n)."""
        return [id != 0 for _, id in await self._each("keepalive", refs, (self._life_us,))]

    async def delete(self, ref: Ref) -> Identity:
        """Purge a key. O(log n)."""
        [deleted] = await self.delete_many([ref])
        if deleted is None:
            raise UnknownKey
        return deleted

    async def delete_many(self, refs: Sequence[Ref]) -> list[Identity | None]:
        """Purge keys one by one. O(items * log n)."""
        return [Identity(id, hint(text)) if id else None for text, id in await self._each("delete", refs)]

    async def _each(
        self, script: str, refs: Sequence[Ref], common: Sequence[int] = ()
    ) -> list[tuple[str, int]]:
        """Call a script that takes texts and replies ids. Returns each key's text and id; id 0 for unknown keys."""
        texts = await self._partitions.texts_of(refs)
        known = [(self._partitions.of(text), text) for text in texts if text is not None]
        ids = iter(await self._partitions.each(script, known, common))
        return [("", 0) if text is None else (text, next(ids)) for text in texts]

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(log n)."""
        text, found, call = await self._get(ref, "")
        return row_of(text, found, call.age())

    async def reveal(self, ref: Ref) -> Revealed:
        """A key's text, reported as an event. O(log n)."""
        text, found, _ = await self._get(ref, "1")
        return Revealed(found[0], text)

    async def _get(self, ref: Ref, revealed: str) -> tuple[str, Reply, ScriptCall]:
        """Call get.lua. Returns the key's text, the row in the reply, and the call. Raises UnknownKey."""
        text = await self._partitions.text_of(ref)
        call = self._client.call(self._partitions.of(text), "get", (text, revealed))
        found = await call
        if not found:
            raise UnknownKey
        return text, found[0], call

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(partitions * log n + page)."""
        parsed = page_query(query)
        rows, position = await self._pages.page(parsed)
        return Page(rows, None if position is None else encode(parsed, position))

    async def stats(self) -> Stats:
        """All counts. O(partitions)."""
        snapshot = await self._poller.snapshot()
        counters = dict(snapshot.counters)
        counters["refused"] += self._poller.refused
        return Stats(
            total=snapshot.total,
            available=snapshot.available,
            blocked=snapshot.total - snapshot.available,
            waiting=len(self._waiters) + snapshot.waiting_elsewhere,
            uptime=round(self._loop.time() - self._started_at, 3),
            engine=self.name,
            version=__version__,
            **counters,
        )

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(partitions)."""
        last = self._poller.last
        if seconds == EXPIRING and last is not None and self._loop.time() - last.taken_at < POLL_SECONDS:
            return last.expiring
        statuses = await self._poller.poll(range(self._partitions.count), seconds)
        return sum(status.expiring for status in statuses)

    def _refuse(self) -> NoReturn:
        self._poller.refused += 1
        next_release = self._poller.last.next_release if self._poller.last is not None else None
        raise NoKeyAvailable(
            None if next_release is None else round(max(0.0, next_release - self._loop.time()), 3)
        )

    # -- notes

    async def notes(self) -> Mapping[str, int]:
        """The numbers that servers of the pool stored by `keep_notes`. O(notes)."""
        flat = await self._execute("HGETALL", self._pool_key)
        return {
            name.decode().removeprefix(NOTE): int(value)
            for name, value in zip(flat[::2], flat[1::2], strict=True)
            if name.startswith(NOTE.encode())
        }

    async def keep_notes(self, notes: Mapping[str, int | None]) -> None:
        """Store numbers with the pool; None removes one. O(notes)."""
        for name, value in notes.items():
            if value is None:
                await self._execute("HDEL", self._pool_key, NOTE + name)
            else:
                await self._execute("HSET", self._pool_key, NOTE + name, value)

    async def _execute(self, command: str, *words: str | int) -> Reply:
        try:
            async with asyncio.timeout(_NOTE_SECONDS):
                return await self._nodes.execute(self._pool_key, command, *words)
        except UNREACHABLE as error:
            raise StorageUnavailable(f"Valkey: {str(error) or 'no answer'}") from None

    # -- state

    @property
    def event_seq(self) -> int:
        """How many events there had been at the last poll. O(1)."""
        return self._poller.event_seq

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events of all servers, oldest first. O(RECENT_EVENTS)."""
        return self._poller.recent(count, key_id)

    def ready(self) -> None:
        """Raise Draining once the server stops, StorageUnavailable while no partition can be reached."""
        if self._draining:
            raise Draining
        if len(self._client.unreachable) == self._partitions.count:
            raise StorageUnavailable(
                f"Valkey: {self._nodes.failing or 'keys are being given time after an outage'}"
            )

    @property
    def degraded(self) -> str | None:
        """Which part of the pool can't be reached, and why; None while all can. O(partitions)."""
        count = len(self._client.unreachable)
        if not count:
            return None
        return f"{count} of {self._partitions.count} partitions can't be reached: {self._nodes.failing}"

    @property
    def clock_steps(self) -> int:
        """How many times Valkey's clock was set by more than 5 s, as this server saw it. O(1)."""
        return self._presence.clock_steps

    def storage_up(self) -> bool:
        """Whether all nodes can be reached. O(1)."""
        return self._nodes.failing is None

    def histograms(self) -> dict[str, Histogram]:
        """Histograms, by the names of their metrics. O(1)."""
        return {
            "acquire_wait_seconds": self._waiters.seconds,
            "release_lateness_seconds": self._poller.release_lateness,
            "expiry_lateness_seconds": self._poller.expiry_lateness,
            "pipeline_seconds": self._nodes.metrics.seconds,
            "pipeline_commands": self._nodes.metrics.commands,
        }

    def oldest_wait(self) -> float:
        """Seconds that the first in this server's queue has waited, 0 if nobody waits. O(1)."""
        return self._waiters.oldest()

    def figures(self) -> dict[str, float]:
        """How many pipelines were sent, and the figures of the latest, for the dashboard. O(1)."""
        seconds, commands = self._nodes.metrics.seconds, self._nodes.metrics.commands
        return {
            "pipelines": seconds.count,
            "pipeline_seconds": round(seconds.last, 6),
            "pipeline_commands": commands.last,
        }

    def measures(self) -> Mapping[str, float | Mapping[str, float]]:
        """Empty: this engine has histograms only. O(1)."""
        return {}

    def drain(self) -> None:
        """Raise Draining in all waiters, and accept none from now on. O(waiters)."""
        self._draining = True
        self._waiters.drain()

    async def close(self) -> None:
        """Count the refusals of the last second, leave the pool and disconnect. Call `drain` first."""
        self._poller.stop()
        await self._waiters.close()
        if self._poller.refused and self._nodes.failing is None:
            try:
                await self._client.call(0, "refuse", (self._poller.refused,))
            except StorageUnavailable as error:
                _log.warning("%d refused acquires were not counted: %s", self._poller.refused, error.detail)
        await self._presence.leave()
        await self._subscriber.close()
        await self._client.close()
        await self._poller.join()
