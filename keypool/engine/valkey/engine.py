"""The pool in a Valkey or Redis (6.2 and newer), or a cluster of them, shared by any number of servers.

How it is kept. The pool has `--partitions` partitions, and a key stands in the one that the CRC-32 of its text
names. All that a partition has lies under names that start with its tag (`{POOL:3.17}:`), so it lies in one slot
of a cluster, and a call is one script (lua/*.lua) on one partition, which is done as a whole or not at all;
lua/common.lua has the names and what stands in each. Beside them is one hash, `{POOL}:pool`:

    layout      1: what this page describes
    partitions  how many there are; never changes
    born        moment of the first start, in microseconds since the epoch
    base_tick   what lease numbers go on from: 0, or (last lease of the pool that was moved in) // partitions + 1
    base_id     what ids go on from: 0, or (last id of the pool that was moved in) // partitions + 1
    note.NAME   numbers that are not the pool's own: session.py has them
    and the settings that all servers of the pool have alike, by their names

and a sorted set, `{POOL}:servers`: those that are there, by the moment of their latest beat (valkey_presence.py).

Ids are `number * partitions + partition + 1`, so an id tells its partition, unless it was moved in (those are at
most `base_id * partitions`: all partitions are asked). The number grows within a partition, and over all of
them with the calls of one server; several servers may give them out of order, but none twice.
Lease numbers: see lua/acquire.lua.

Deadlines go by the clock of the Valkey that has the partition. Every script deals first with what is overdue,
32 keys of each kind at most, and treats what is left by its deadline all the same; one server sweeps each
partition besides when its next deadline has come, and another one stands in for it (valkey_looks.py). So a deadline
holds with no server alive.

A uniformly random key over partitions is drawn by rejection sampling: see valkey_draws.py. Before an acquire is
told that no key is available all partitions have said so: a bounded number of round trips, one nearly always
while most keys are available. `--max-keys` is kept by the scripts: see valkey_making.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

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
from keypool.core.errors import (
    Draining,
    NoKeyAvailable,
    StaleLease,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.events import Event
from keypool.core.keys import State, hint
from keypool.core.rules import PoolRules
from keypool.engine import NOTE, Timed
from keypool.engine.valkey.creation import Making
from keypool.engine.valkey.link import Lost, Measured, Reply, ReplyError
from keypool.engine.valkey.look import latest
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.pages import Pages, row_of
from keypool.engine.valkey.partitions import Partitions, PoolFacts
from keypool.engine.valkey.poller import EXPIRING, LATEST_LOOK, Looks
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.sampler import Draws
from keypool.engine.valkey.subscriber import Wake
from keypool.engine.valkey.waiters import Waiters
from keypool.ops.histogram import Tally

_COUNTS_FOR = 3.0  # seconds that a word about waiters counts
_NOTE_SECONDS = 2.0
_log = logging.getLogger("keypool.valkey")


class ValkeyEngine:
    """See the module, and the Engine protocol for the calls. Made by valkey_open.py."""

    name = "valkey"

    def __init__(
        self,
        nodes: Nodes,
        measured: Measured,
        pool: str,
        facts: PoolFacts,
        presence: Presence,
        *,
        rules: PoolRules,
    ) -> None:
        self._nodes = nodes
        self._pool_key = f"{{{pool}}}:pool"
        self._measured = measured
        self._life_us = round(rules.keepalive_seconds * 1e6)
        self._loop = asyncio.get_running_loop()
        self._presence = presence
        self._server = presence.server
        self._started_at = self._loop.time()
        self._draining = False
        self._partitions = Partitions(nodes, facts)
        self._looks = Looks(self._partitions, self._server, rules)
        self._draws = Draws(self._partitions, self._looks, rules)
        self._making = Making(self._partitions, self._looks, self._server, rules)
        self._pages = Pages(self._partitions)
        self._waiters = Waiters(
            rules.max_waiters, self._draws.take_in_order, self._draws.give_back, self._tell_waiting
        )
        self._wake = Wake(nodes, pool, facts.partitions, self._freed)
        nodes.on_back = self._waiters.wake
        self._partitions.on_available = self._may_serve
        self._looks.start()

    # -- the calls

    async def generate(self, count: int) -> list[GeneratedKey]:
        """Make keys, all or none. O(count * log n), and O(partitions) near `max_keys`."""
        return await self._making.make(count)

    async def acquire(self, owner: str | None, wait: float, timed: Timed | None = None) -> Lease:
        """Serve a key, now or within `wait` seconds. O(log n), and O(partitions) if none is available."""
        lease = None
        if not self._waiters:
            taken = await self._draws.take(owner, 1)
            lease = taken[0] if taken else None
        if lease is None and (wait > 0 or self._waiters):
            lease = await self._waiters.wait(owner, wait, timed)
        if lease is None:
            self._refuse()
        return lease

    async def acquire_many(self, owner: str | None, count: int) -> list[Lease]:
        """Serve up to `count` keys. O(count * log n)."""
        if self._waiters:
            first = await self._waiters.wait(owner, 0)
            if first is None:
                self._refuse()
            try:
                more = await self._draws.take(owner, 0 if self._waiters else count - 1)
            except (GeneratorExit, asyncio.CancelledError):
                self._draws.give_back(first)
                raise
            return [first, *more]
        taken = await self._draws.take(owner, count)
        if not taken:
            self._refuse()
        return taken

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
        words = {1: "done", 0: "done", -1: "unknown", -2: "stale"}
        return [words[outcome] for outcome, _, _ in await self._unblock(items, ended)]

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Put off a key's expiry. O(log n)."""
        text = await self._partitions.text_of(ref)
        partition = self._partitions.of(text)
        call = self._nodes.call(partition, "keepalive", (self._life_us, text))
        available, id = await call
        self._partitions.note(partition, available)
        if not id:
            raise UnknownKey
        return KeptAlive(id, self._partitions.left(self._life_us, call.sent_at))

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[bool]:
        """Put off expiries one by one. O(items * log n)."""
        texts = await self._partitions.texts_of(refs)
        asked = [(self._partitions.of(text), text) for text in texts if text is not None]
        ids = iter(await self._partitions.each("keepalive", asked, lambda partition: (self._life_us,)))
        return [text is not None and bool(next(ids)) for text in texts]

    async def delete(self, ref: Ref) -> Identity:
        """Purge a key. O(log n)."""
        gone = (await self.delete_many([ref]))[0]
        if gone is None:
            raise UnknownKey
        return gone

    async def delete_many(self, refs: Sequence[Ref]) -> list[Identity | None]:
        """Purge keys one by one. O(items * log n)."""
        texts = await self._partitions.texts_of(refs)
        known = [text for text in texts if text is not None]
        ids = iter(
            await self._partitions.each("delete", [(self._partitions.of(text), text) for text in known])
        )
        gone = [(text, next(ids)) if text is not None else ("", 0) for text in texts]
        return [Identity(id, hint(text)) if id else None for text, id in gone]

    async def get(self, ref: Ref) -> Row:
        """How a key stands. O(log n)."""
        text, found, sent_at = await self._get(ref, False)
        return row_of(text, found, self._partitions.late(sent_at))

    async def reveal(self, ref: Ref) -> Revealed:
        """A key's text, told as an event. O(log n)."""
        text, found, _ = await self._get(ref, True)
        return Revealed(found[0], text)

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(partitions * log n + page)."""
        asked = page_query(query)
        rows, position = await self._pages.page(asked)
        return Page(rows, None if position is None else encode(asked, position))

    async def stats(self) -> Stats:
        """All counts. O(partitions)."""
        look = await self._looks.look()
        counters: Any = look.counters[:-1]  # Stats has them in this order
        refused = look.counters[-1] + self._looks.refused
        return Stats(  # type: ignore[call-arg]
            look.total,
            look.available,
            look.total - look.available,
            len(self._waiters) + look.waiting_elsewhere,
            *counters,
            refused,
            round(self._loop.time() - self._started_at, 3),
            self.name,
            __version__,
        )

    async def notes(self) -> Mapping[str, int]:
        """What `keep_notes` was given by any server of the pool. O(notes)."""
        told = await self._ask("HGETALL", self._pool_key)
        return {
            name.decode().removeprefix(NOTE): int(value)
            for name, value in zip(told[::2], told[1::2], strict=True)
            if name.startswith(NOTE.encode())
        }

    async def keep_notes(self, notes: Mapping[str, int | None]) -> None:
        """Keep some numbers beside what is written of the pool. O(notes)."""
        for name, value in notes.items():
            field = NOTE + name
            if value is None:
                await self._ask("HDEL", self._pool_key, field)
            else:
                await self._ask("HSET", self._pool_key, field, value)

    async def _ask(self, command: str, *words: str | int) -> Reply:
        try:
            async with asyncio.timeout(_NOTE_SECONDS):
                return await self._nodes.ask(self._pool_key, command, *words)
        except (OSError, ReplyError, Lost) as error:  # a TimeoutError is an OSError
            raise StorageUnavailable(f"Valkey: {str(error) or 'no answer'}") from None

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(partitions)."""
        if seconds == EXPIRING and self._looks.last is not None:
            at, look = self._looks.last
            if self._loop.time() - at < LATEST_LOOK:
                return look.expiring
        replies = await self._looks.at(range(self._partitions.count), seconds)
        return sum(reply[3] for reply in replies)

    @property
    def told(self) -> int:
        """How many events there had been at the last look. O(1)."""
        return self._looks.told

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events of all servers, oldest first. O(RECENT_EVENTS)."""
        return latest(self._looks.events, count, key_id)

    def ready(self) -> None:
        """Raise Draining once the server stops, StorageUnavailable while no partition can be reached."""
        if self._draining:
            raise Draining
        if len(self._nodes.unreachable) == self._partitions.count:
            raise StorageUnavailable(f"Valkey: {self._nodes.failing or 'keys are being given time'}")

    @property
    def degraded(self) -> str | None:
        """Which part of the pool can't be reached, and why; None while all can. O(partitions)."""
        count = len(self._nodes.unreachable)
        if not count:
            return None
        return f"{count} of {self._partitions.count} partitions can't be reached: {self._nodes.failing}"

    @property
    def clock_steps(self) -> int:
        """How many times Valkey's clock was set by more than 5 s, as this server saw it."""
        return self._presence.clock_steps

    def storage_up(self) -> bool:
        """Whether all is well with Valkey. O(1)."""
        return self._nodes.failing is None

    def tallies(self) -> dict[str, Tally]:
        """What was measured, by the name of its metric. O(1)."""
        return {
            "acquire_wait_seconds": self._waiters.seconds,
            "release_lateness_seconds": self._looks.release_lateness,
            "expiry_lateness_seconds": self._looks.expiry_lateness,
            "pipeline_seconds": self._measured.seconds,
            "pipeline_commands": self._measured.commands,
        }

    def oldest_wait(self) -> float:
        """Seconds that the first in this server's queue has waited, 0 if nobody waits. O(1)."""
        return self._waiters.oldest()

    def figures(self) -> dict[str, float]:
        """How many times commands were sent, and how the last of these went, for the dashboard. O(1)."""
        seconds, commands = self._measured.seconds, self._measured.commands
        return {
            "pipelines": seconds.count,
            "pipeline_seconds": round(seconds.last, 6),
            "pipeline_commands": commands.last,
        }

    def drain(self) -> None:
        """Tell all waiters that the server stops, and take no more. O(waiters)."""
        self._draining = True
        self._waiters.drain()

    async def close(self) -> None:
        """Count what isn't counted yet, and stop."""
        self._looks.stop()
        await self._waiters.close()
        if self._nodes.failing is None:
            try:
                if self._looks.refused:
                    await self._nodes.call(0, "refuse", (self._looks.refused,))
                await self._partitions.all("leave", self._server)
            except StorageUnavailable as error:
                _log.warning("the pool wasn't told that this server stops: %s", error.detail)
        await self._presence.leave()
        await self._wake.close()
        await self._nodes.close()
        await self._looks.ended()

    # -- those who wait

    def _freed(self, partition: int, whose: str) -> None:
        """A key was freed there, and it is some server's turn."""
        if whose not in (self._server, "*"):
            return
        if self._waiters:
            self._partitions.available[partition] = max(1, self._partitions.available[partition])
            self._waiters.wake()
        elif whose == self._server:
            self._partitions.in_background(partition, "wait", self._server, 0, 0)  # let others have it

    def _may_serve(self) -> None:
        """A partition has keys to give. If others wait elsewhere, the script that freed one says whose it is."""
        if self._waiters and not self._looks.elsewhere:
            self._waiters.wake()

    async def _tell_waiting(self, count: int) -> None:
        """Let the pool know how many wait here."""
        await self._partitions.all("wait", self._server, count, round(_COUNTS_FOR * 1e6))

    # -- steps of the calls

    async def _unblock(
        self, items: Sequence[tuple[Ref, int | None]], ended: list[EndedLease] | None
    ) -> list[Reply]:
        texts = await self._partitions.texts_of([ref for ref, _ in items])
        asked = [
            (self._partitions.of(text), text, "" if lease is None else lease)
            for text, (_, lease) in zip(texts, items, strict=True)
            if text is not None
        ]
        said = iter(await self._partitions.each("unblock", asked))
        replies = [(-1, 0, 0) if text is None else next(said) for text in texts]
        if ended is not None:
            for text, (_, lease), (outcome, id, latest_lease) in zip(texts, items, replies, strict=True):
                if text is not None and lease is None and outcome == 1:
                    ended.append(EndedLease(id, hint(text), latest_lease))
        return replies

    async def _get(self, ref: Ref, revealed: bool) -> tuple[str, Reply, float]:
        """The key's text, what get.lua says of it, and when that was sent."""
        text = await self._partitions.text_of(ref)
        partition = self._partitions.of(text)
        call = self._nodes.call(partition, "get", (text, "1" if revealed else ""))
        available, *found = await call
        self._partitions.note(partition, available)
        if not found:
            raise UnknownKey
        return text, found[0], call.sent_at

    def _refuse(self) -> NoReturn:
        """Say that no key is available. Raises NoKeyAvailable."""
        self._looks.refused += 1
        left = None
        if self._looks.last is not None and (next_release := self._looks.last[1].next_release) is not None:
            left = round(max(0.0, next_release - (self._loop.time() - self._looks.last[0])), 3)
        raise NoKeyAvailable(left)
