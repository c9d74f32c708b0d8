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

Ids are `number * partitions + partition + 1`, so an id tells its partition, unless it was moved in (those are at
most `base_id * partitions`: all partitions are asked). The number grows within a partition, and over all of
them with the calls of one server; several servers may give them out of order, but none twice.
Lease numbers: see lua/acquire.lua.

Deadlines go by the clock of the Valkey that has the partition. Every script deals first with what is overdue,
32 keys of each kind at most, and treats what is left by its deadline all the same; every server sweeps besides,
each partition when its next deadline has come. So a deadline holds with no server alive.

A uniformly random key over partitions: the engine keeps in mind how many keys were available in each when it
last answered, draws a partition with that chance, and the script does the rest (lua/acquire.lua). A draw that
is void is repeated, from the third time on after asking all partitions, and before an acquire is told that no
key is available all have said so: a bounded number of round trips, one nearly always.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import zlib
from bisect import bisect
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from keypool import __version__
from keypool.answers import (
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
from keypool.cursor import ListQuery, encode, page_query
from keypool.engine.valkey_link import Measured, Reply
from keypool.engine.valkey_look import Look, Told, events_in, latest, until_due
from keypool.engine.valkey_nodes import Nodes, Word
from keypool.engine.valkey_pages import Pages, row_of
from keypool.engine.valkey_waiters import Waiters
from keypool.engine.valkey_wake import Wake
from keypool.errors import (
    Draining,
    NoKeyAvailable,
    PoolFull,
    StaleLease,
    StorageUnavailable,
    UnknownKey,
)
from keypool.events import Event
from keypool.keys import State, hint, random_text
from keypool.tally import SECONDS, Tally

RECENT_EVENTS = 1000

_ROUNDS = 8  # of draws, before an acquire that always comes too late gives up
_ROUNDS_BY_HEART = 2  # of these, by the counts that partitions told when they last answered
_LATEST_LOOK = 1.0  # seconds after which all partitions are looked at again, whatever is due
_EARLIEST_LOOK = 0.01  # seconds between two sweeps of one partition
_MARGIN = 0.002  # seconds after a deadline at which it is swept
_SWEPT = 64  # keys of each kind and partition that one sweep deals with
_EXPIRING = 60.0
_COUNTS_FOR = 3.0  # seconds that a word about waiters counts
_TOO_FEW_TO_TELL = 0.005  # seconds: as early as a release may be
_SPARE_KEYS, _SPARE_SHARE = 10_000, 0.1  # a pool with less room than this is nearly full
_ROOM_SECONDS, _ROOM_PAUSE = 3.0, 0.01  # that a server may take to fill it, and between two times of asking
_log = logging.getLogger("keypool.valkey")


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What `{POOL}:pool` says."""

    partitions: int
    born: int
    base_tick: int
    base_id: int


class ValkeyEngine:
    """See the module, and the Engine protocol for the calls. Made by valkey_open.py."""

    name = "valkey"

    def __init__(
        self,
        nodes: Nodes,
        measured: Measured,
        pool: str,
        facts: PoolFacts,
        *,
        block_seconds: float = 60.0,
        keepalive_seconds: float = 300.0,
        key_length: int = 20,
        max_keys: int = 1_000_000,
        max_waiters: int = 10_000,
    ) -> None:
        self._nodes = nodes
        self._measured = measured
        self._facts = facts
        self._partitions = facts.partitions
        self._block = block_seconds
        self._block_us = round(block_seconds * 1e6)
        self._life = keepalive_seconds
        self._life_us = round(keepalive_seconds * 1e6)
        self._key_length = key_length
        self._max_keys = max_keys
        self._loop = asyncio.get_running_loop()
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._server = os.urandom(8).hex()
        self._started_at = self._loop.time()
        self._available = [0] * self._partitions
        self._totals = [max_keys] * self._partitions  # until they have been asked
        self._tick = 0  # of the latest lease that this server knows of
        self._id_number = facts.base_id - 1  # of the latest id
        self._refused = 0  # not told to the pool yet
        self._making = 0
        self._room = asyncio.Lock()
        self._elsewhere = 0  # acquires that wait at other servers
        self._draining = False
        self._closed = False
        self.events: deque[Told] = deque(maxlen=RECENT_EVENTS)
        self._heard = [-1] * self._partitions
        self._told = 0
        self._last_look: tuple[float, Look] | None = None
        self._askers: list[asyncio.Future[Look]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = False
        self._looks = 0
        self._latest_look = [0] * self._partitions
        self._due = [0.0] * self._partitions
        self._timer: asyncio.TimerHandle | None = None
        self._latest = min(_LATEST_LOOK, max(0.02, min(block_seconds, keepalive_seconds) / 2))
        self.release_lateness = Tally(SECONDS)
        self.expiry_lateness = Tally(SECONDS)
        self._waiters = Waiters(max_waiters, self._take, self._hand_over, self._give_back, self._tell_waiting)
        nodes.on_back = self._waiters.wake
        self._wake = Wake(nodes, pool, self._partitions, self._freed)
        self._pages = Pages(self._all, self._texts_of, self._partitions)
        self._sweep()

    # -- the calls

    async def generate(self, count: int) -> list[GeneratedKey]:
        """Make keys, all or none. O(count * log n), and O(partitions) once a second or near `max_keys`."""
        known = sum(self._totals) + self._making + count
        if known <= self._max_keys - max(_SPARE_KEYS, _SPARE_SHARE * self._max_keys):
            return await self._generate(count)
        async with self._room:  # one after the other, or two that fit one by one would fill it beyond
            await self._hold_room()
            try:
                await self._require_room(count)
                return await self._generate(count)
            finally:
                self._in_background(0, "room", self._server, 0)

    async def _generate(self, count: int) -> list[GeneratedKey]:
        started = self._loop.time()
        texts = [random_text(self._key_length) for _ in range(count)]
        batch = [
            (self._partition_of(text), number, text) for number, text in enumerate(texts, self._id_number + 1)
        ]
        self._id_number += count
        self._making += count
        try:
            ids = await self._each(
                "generate", batch, lambda partition: (self._life_us, self._partitions, partition)
            )
        finally:
            self._making -= count
        self._id_number = max(self._id_number, (ids[-1] - 1) // self._partitions)
        for partition, *_ in batch:
            self._totals[partition] += 1
        expires_in = self._left(self._life_us, started)
        return [
            GeneratedKey(id, text, State.AVAILABLE, expires_in) for id, text in zip(ids, texts, strict=True)
        ]

    async def acquire(self, owner: str | None, wait: float) -> Lease:
        """Serve a key, now or within `wait` seconds. O(log n), and O(partitions) if none is available."""
        lease = None
        if not self._waiters:
            taken = await self._take([owner], True)
            lease = taken[0][1] if taken else None
        if lease is None and (wait > 0 or self._waiters):
            lease = await self._waiters.wait(owner, wait)
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
                more = await self._take([owner] * (0 if self._waiters else count - 1), True)
            except (GeneratorExit, asyncio.CancelledError):
                self._give_back(first)
                raise
            return [first, *(lease for _, lease in more)]
        taken = await self._take([owner] * count, True)
        if not taken:
            self._refuse()
        return [lease for _, lease in taken]

    async def unblock(self, ref: Ref, lease: int | None) -> Unblocked:
        """Free a key. O(log n)."""
        outcome, id, latest_lease = (await self._unblock([(ref, lease)]))[0]
        if outcome == -1:
            raise UnknownKey
        if outcome == -2:
            assert lease is not None
            raise StaleLease(lease, latest_lease or None)
        return Unblocked(id, State.AVAILABLE, outcome == 1)

    async def unblock_many(self, items: Sequence[tuple[Ref, int | None]]) -> list[str]:
        """Free keys one by one. O(items * log n)."""
        words = {1: "done", 0: "done", -1: "unknown", -2: "stale"}
        return [words[outcome] for outcome, _, _ in await self._unblock(items)]

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Put off a key's expiry. O(log n)."""
        started = self._loop.time()
        id = (await self._keepalive([ref]))[0]
        if not id:
            raise UnknownKey
        return KeptAlive(id, self._left(self._life_us, started))

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[bool]:
        """Put off expiries one by one. O(items * log n)."""
        return [bool(id) for id in await self._keepalive(refs)]

    async def delete(self, ref: Ref) -> Identity:
        """Purge a key. O(log n)."""
        gone = (await self.delete_many([ref]))[0]
        if gone is None:
            raise UnknownKey
        return gone

    async def delete_many(self, refs: Sequence[Ref]) -> list[Identity | None]:
        """Purge keys one by one. O(items * log n)."""
        texts = await self._texts(refs)
        known = [text for text in texts if text is not None]
        ids = iter(await self._each("delete", [(self._partition_of(text), text) for text in known]))
        gone = [(text, next(ids)) if text is not None else ("", 0) for text in texts]
        return [Identity(id, hint(text)) if id else None for text, id in gone]

    async def get(self, ref: Ref) -> Row:
        """How a key stands. O(log n)."""
        started = self._loop.time()
        text, found = await self._get(ref, False)
        return row_of(text, found, self._late(started))

    async def reveal(self, ref: Ref) -> Revealed:
        """A key's text, told as an event. O(log n)."""
        text, found = await self._get(ref, True)
        return Revealed(found[0], text)

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(partitions * (log n + page))."""
        asked = page_query(query)
        started = self._loop.time()
        rows, position = await self._pages.page(asked)
        late = self._late(started)
        cursor = None if position is None else encode(asked, position)
        return Page([row_of(row[0], row[1:], late) for row in rows], cursor)

    async def stats(self) -> Stats:
        """All counts. O(partitions)."""
        look = await self._look()
        counters: Any = look.counters[:-1]  # Stats has them in this order
        refused = look.counters[-1] + self._refused
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

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(partitions)."""
        if seconds == _EXPIRING and self._last_look is not None:
            at, look = self._last_look
            if self._loop.time() - at < _LATEST_LOOK:
                return look.expiring
        replies = await self._look_at(range(self._partitions), seconds)
        return sum(reply[3] for reply in replies)

    @property
    def told(self) -> int:
        """How many events there had been at the last look. O(1)."""
        return self._told

    def recent(self, count: int, key_id: int | None = None) -> list[Event]:
        """The latest `count` events of all servers, oldest first. O(RECENT_EVENTS)."""
        return latest(self.events, count, key_id)

    def ready(self) -> None:
        """Raise Draining once the server stops, StorageUnavailable while something is wrong with Valkey."""
        if self._draining:
            raise Draining
        if self._nodes.failing is not None:
            raise StorageUnavailable(f"Valkey: {self._nodes.failing}")

    def storage_up(self) -> bool:
        """Whether all is well with Valkey. O(1)."""
        return self._nodes.failing is None

    def tallies(self) -> dict[str, Tally]:
        """What was measured, by the name of its metric. O(1)."""
        return {
            "acquire_wait_seconds": self._waiters.seconds,
            "release_lateness_seconds": self.release_lateness,
            "expiry_lateness_seconds": self.expiry_lateness,
            "pipeline_seconds": self._measured.seconds,
            "pipeline_commands": self._measured.commands,
        }

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
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._waiters.close()
        if self._nodes.failing is None:
            try:
                if self._refused:
                    await self._nodes.call(0, "refuse", (self._refused,))
                await self._all("leave", self._server)
            except StorageUnavailable as error:
                _log.warning("the pool wasn't told that this server stops: %s", error.detail)
        await self._wake.close()
        await self._nodes.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- asking partitions

    def _partition_of(self, text: str) -> int:
        return zlib.crc32(text.encode("utf-8", "surrogatepass")) % self._partitions

    async def _call(self, partition: int, script: str, *arguments: Word) -> Reply:
        """A script's answer. O(1) here."""
        reply = await self._nodes.call(partition, script, arguments)
        self._note(partition, reply[0])
        return reply

    async def _all(self, script: str, *arguments: Word) -> list[Reply]:
        """The same call to all partitions, in one go."""
        replies = await _all_of(
            [self._nodes.call(partition, script, arguments) for partition in range(self._partitions)]
        )
        for partition, reply in enumerate(replies):
            self._note(partition, reply[0])
        return replies

    async def _each(
        self,
        script: str,
        items: Sequence[tuple[int, Word] | tuple[int, Word, Word]],
        before: Callable[[int], Sequence[Word]] = lambda partition: (),
    ) -> list[Reply]:
        """What a script says of each item (partition, words), one call a partition. Their order is kept."""
        if len(items) == 1:
            partition, *words = items[0]
            reply = await self._call(partition, script, *before(partition), *words)
            return [reply[1]]
        places: dict[int, list[int]] = {}
        arguments: dict[int, list[Word]] = {}
        for place, (partition, *words) in enumerate(items):
            if partition not in places:
                places[partition], arguments[partition] = [], list(before(partition))
            places[partition].append(place)
            arguments[partition] += words
        calls = [self._nodes.call(partition, script, words) for partition, words in arguments.items()]
        answers: list[Reply] = [None] * len(items)
        for (partition, where), reply in zip(places.items(), await _all_of(calls), strict=True):
            self._note(partition, reply[0])
            for place, said in zip(where, reply[1:], strict=True):
                answers[place] = said
        return answers

    def _note(self, partition: int, available: int) -> None:
        """So many keys can be acquired there, as it just said; -1 says nothing."""
        if available < 0:
            return
        self._available[partition] = available
        # If others wait elsewhere, whose turn it is is said by the script that frees a key.
        if available and self._waiters and not self._elsewhere:
            self._waiters.wake()

    def _freed(self, partition: int, whose: str) -> None:
        """A key was freed there, and it is some server's turn."""
        if whose not in (self._server, "*"):
            return
        if self._waiters:
            self._available[partition] = max(1, self._available[partition])
            self._waiters.wake()
        elif whose == self._server:
            self._in_background(partition, "wait", self._server, 0, 0)  # let others have it

    # -- texts and ids

    async def _text_of(self, ref: Ref) -> str:
        """The text that a key has or would have. Raises UnknownKey."""
        if isinstance(ref, str):
            return ref
        text = (await self._texts_of([ref]))[0]
        if text is None:
            raise UnknownKey
        return text

    async def _texts(self, refs: Sequence[Ref]) -> list[str | None]:
        """The same for many; None for an id that nobody has."""
        ids = [ref for ref in refs if isinstance(ref, int)]
        found = iter(await self._texts_of(ids)) if ids else iter(())
        return [next(found) if isinstance(ref, int) else ref for ref in refs]

    async def _texts_of(self, ids: Sequence[int]) -> list[str | None]:
        """The texts of ids. An id that was moved in may be anywhere: all partitions are asked."""
        if all(id > self._facts.base_id * self._partitions for id in ids):
            items = [((id - 1) % self._partitions, id) for id in ids]
            return [None if text is None else text.decode() for text in await self._each("find", items)]
        found = [reply[1:] for reply in await self._all("find", *ids)]
        texts = (
            next((text for text in several if text is not None), None) for several in zip(*found, strict=True)
        )
        return [None if text is None else text.decode() for text in texts]

    # -- steps of the calls

    async def _unblock(self, items: Sequence[tuple[Ref, int | None]]) -> list[Reply]:
        texts = await self._texts([ref for ref, _ in items])
        asked = [
            (self._partition_of(text), text, "" if lease is None else lease)
            for text, (_, lease) in zip(texts, items, strict=True)
            if text is not None
        ]
        said = iter(await self._each("unblock", asked))
        return [(-1, 0, 0) if text is None else next(said) for text in texts]

    async def _keepalive(self, refs: Sequence[Ref]) -> list[int]:
        texts = await self._texts(refs)
        asked = [(self._partition_of(text), text) for text in texts if text is not None]
        said = iter(await self._each("keepalive", asked, lambda partition: (self._life_us,)))
        return [0 if text is None else next(said) for text in texts]

    async def _get(self, ref: Ref, revealed: bool) -> tuple[str, Reply]:
        text = await self._text_of(ref)
        reply = await self._call(self._partition_of(text), "get", text, "1" if revealed else "")
        if len(reply) == 1:
            raise UnknownKey
        return text, reply[1]

    async def _hold_room(self) -> None:
        """Wait until no other server fills the pool."""
        while not (await self._call(0, "room", self._server, round(_ROOM_SECONDS * 1e6)))[1]:
            turn = self._loop.create_future()
            self._loop.call_later(_ROOM_PAUSE, _done, turn)
            await turn

    async def _require_room(self, count: int) -> None:
        """Raise PoolFull unless so many more keys fit. O(partitions)."""
        while True:
            look = await self._look()
            if look.total + self._making + count <= self._max_keys:
                return
            # What is being made may be counted already, and what is overdue isn't there any more.
            if not self._making and not look.crowded:
                raise PoolFull(look.total, count, self._max_keys)

    def _refuse(self) -> NoReturn:
        """Say that no key is available. Raises NoKeyAvailable."""
        self._refused += 1
        left = None
        if self._last_look is not None and (next_release := self._last_look[1].next_release) is not None:
            left = round(max(0.0, next_release - (self._loop.time() - self._last_look[0])), 3)
        raise NoKeyAvailable(left)

    def _late(self, started: float) -> float:
        """Seconds by which an answer that was asked for then is late, 0 if they are too few to tell."""
        late = self._loop.time() - started
        return late if late > _TOO_FEW_TO_TELL else 0.0

    def _left(self, microseconds: int, started: float) -> float:
        """A length of time as it is told: as of the answer, or a holder would believe in its key too long."""
        return round(max(0.0, microseconds / 1e6 - self._late(started)), 3)

    # -- acquiring

    async def _take(self, owners: Sequence[str | None], sure: bool) -> list[tuple[str | None, Lease]]:
        """Acquire a key for each owner, as many as there are. If not `sure`, only where keys are known to be."""
        wanted = list(owners)
        taken: list[tuple[str | None, Lease]] = []
        calls: list[asyncio.Future[Reply]] = []
        rounds, crowded = 0, False
        try:
            while wanted and rounds < _ROUNDS:
                known = any(self._available) and rounds < _ROUNDS_BY_HEART
                if not known and not crowded and not (sure and (await self._look()).available):
                    break
                started = self._loop.time()
                plan, wanted = self._plan(wanted)
                calls = [self._ask_for(partition, some) for partition, some in plan.items()]
                replies = await _all_of(calls)
                calls, crowded = [], False
                for (partition, some), reply in zip(plan.items(), replies, strict=True):
                    crowded = crowded or reply[1] == 1
                    for owner, lease in self._leases_in(partition, some, reply, started):
                        if lease is None:
                            wanted.append(owner)
                        else:
                            taken.append((owner, lease))
                rounds += not crowded
        except (GeneratorExit, asyncio.CancelledError):  # hung up: nobody will hear of these
            for call in calls:
                self._take_back(call)
            for _, lease in taken:
                self._give_back(lease)
            raise
        return sorted(taken, key=_number)

    def _plan(self, owners: Sequence[str | None]) -> tuple[dict[int, list[str | None]], list[str | None]]:
        """Which partition is asked for which owner's key: each key of the pool has the same chance. Also the
        owners for whom there seems to be none.
        """
        available = list(self._available)
        plan: dict[int, list[str | None]] = {}
        for number, owner in enumerate(owners):
            ends = list(accumulate(available))
            if not ends[-1]:
                return plan, list(owners[number:])
            partition = bisect(ends, self._random.random() * ends[-1])
            available[partition] -= 1
            plan.setdefault(partition, []).append(owner)
        return plan, []

    def _ask_for(self, partition: int, owners: Sequence[str | None]) -> asyncio.Future[Reply]:
        facts, draw = self._facts, self._random.random
        words: list[Word] = [self._available[partition], self._tick, facts.born, facts.base_tick]
        words += [self._partitions, partition, self._block_us, self._random.getrandbits(31)]
        for owner in owners:
            words += [owner or "", draw()]
        return self._nodes.call(partition, "acquire", words, self._return_unheard)

    def _leases_in(
        self, partition: int, owners: Sequence[str | None], reply: Reply, started: float
    ) -> Iterator[tuple[str | None, Lease | None]]:
        """What a partition says to `_ask_for`: each owner with the key served."""
        self._note(partition, reply[0])
        self._tick = max(self._tick, reply[2])
        for owner, served in zip(owners, reply[3:], strict=True):
            if served is None:
                yield owner, None
            else:
                text, id, lease, expires = served
                release_in, expires_in = self._left(self._block_us, started), self._left(expires, started)
                yield owner, Lease(id, text.decode(), lease, release_in, expires_in)

    def _take_back(self, call: asyncio.Future[Reply]) -> None:
        """Nobody wants the answer any more, whether or not it has come."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._return_unheard(call.result())

    def _return_unheard(self, reply: Reply) -> None:
        for served in reply[3:]:
            if served is not None:
                self._free(served[0].decode(), served[2])

    def _give_back(self, lease: Lease) -> None:
        self._free(lease.key, lease.lease)

    def _free(self, text: str, lease: int) -> None:
        self._in_background(self._partition_of(text), "unblock", text, lease)

    def _hand_over(self, lease: Lease, owner: str | None) -> None:
        """The lease was acquired in the name of somebody who left, and is somebody else's now."""
        self._in_background(self._partition_of(lease.key), "rename", lease.key, lease.lease, owner or "")

    def _in_background(self, partition: int, script: str, *arguments: Word) -> None:
        """A call that nobody waits for; if it fails, the deadline does its work."""

        def done(call: asyncio.Future[Reply]) -> None:
            if not call.cancelled() and call.exception() is None:
                self._note(partition, call.result()[0])

        self._nodes.call(partition, script, arguments).add_done_callback(done)

    async def _tell_waiting(self, count: int) -> None:
        """Let the pool know how many wait here."""
        await self._all("wait", self._server, count, round(_COUNTS_FOR * 1e6))

    # -- looking and sweeping

    def _look(self) -> asyncio.Future[Look]:
        """How all partitions stand, at a moment after this one. Who asks in the meantime shares it."""
        asker: asyncio.Future[Look] = self._loop.create_future()
        self._askers.append(asker)
        if not self._looking:
            self._looking = True
            self._start(self._look_for_askers())
        return asker

    async def _look_for_askers(self) -> None:
        while self._askers:
            askers, self._askers = self._askers, []
            try:
                look = await self._look_everywhere()
            except Exception as error:
                for asker in askers:
                    if not asker.done():
                        asker.set_exception(error)
                        asker.exception()  # whether or not somebody still waits for it
            else:
                for asker in askers:
                    if not asker.done():
                        asker.set_result(look)
        self._looking = False

    async def _look_everywhere(self) -> Look:
        refused, self._refused = self._refused, 0
        if refused:
            self._in_background(self._random.randrange(self._partitions), "refuse", refused)
        look = Look()
        for partition, reply in enumerate(await self._look_at(range(self._partitions), _EXPIRING)):
            look.add(partition, reply)
        self._last_look = self._loop.time(), look
        return look

    async def _look_at(self, partitions: Sequence[int], expiring: float) -> list[Reply]:
        ahead = round(expiring * 1e6)
        self._looks += 1
        number = self._looks
        calls = [
            self._nodes.call(partition, "look", (self._server, self._heard[partition], ahead, _SWEPT))
            for partition in partitions
        ]
        replies = await _all_of(calls)
        now = self._loop.time()
        events: list[Told] = []
        for partition, reply in zip(partitions, replies, strict=True):
            if number < self._latest_look[partition]:
                continue  # a later look was faster, as another node may be
            self._latest_look[partition] = number
            self._note(partition, reply[0])
            self._totals[partition] = reply[1]
            self._elsewhere = reply[2]
            self._id_number = max(self._id_number, reply[17])
            heard = self._heard[partition]
            if heard < reply[18]:
                events += events_in(reply)[heard - reply[18] :]
                self._told += reply[18] - max(heard, 0)
            # It may be less than it was, if a failover has lost the latest changes.
            self._heard[partition] = reply[18]
            for microseconds, tally in ((reply[6], self.expiry_lateness), (reply[7], self.release_lateness)):
                if microseconds >= 0:
                    tally.add(microseconds / 1e6)
            left = until_due(reply)
            if left != 0:  # else a crowd is overdue: at once
                wait = self._latest if left is None else min(self._latest, left + _MARGIN)
                self._due[partition] = now + max(wait, _EARLIEST_LOOK)
        events.sort(key=lambda told: told[0])
        self.events.extend(events)
        return replies

    def _sweep(self) -> None:
        """Look at every partition that has something due, and come again when the next has."""
        now = self._loop.time()
        due = [partition for partition in range(self._partitions) if self._due[partition] <= now]
        if due:
            self._start(self._sweep_some(due))
        else:
            self._come_again()

    async def _sweep_some(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._due[partition] = 0.0
        try:
            await self._look_at(partitions, _EXPIRING)
        except Exception as error:
            if isinstance(error, StorageUnavailable):
                _log.debug("could not sweep: %s", error.detail)
            else:
                _log.exception("could not sweep")
            again = self._loop.time() + _LATEST_LOOK / 4
            for partition in partitions:
                self._due[partition] = max(self._due[partition], again)
        self._come_again()

    def _come_again(self) -> None:
        if not self._closed:
            self._timer = self._loop.call_at(min(self._due), self._sweep)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _number(taken: tuple[str | None, Lease]) -> int:
    return taken[1].lease


async def _all_of(calls: Sequence[asyncio.Future[Reply]]) -> list[Reply]:
    """All answers, when all have come. Raises what the first that failed raised."""
    replies: list[Reply] = []
    failed: Exception | None = None
    for call in calls:
        try:
            replies.append(await call)
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return replies
