"""The pool in a Valkey or Redis (6.2 and newer), or a cluster of them, shared by any number of servers.

How it is stored. The pool has `--partitions` partitions, and a key is in partition CRC-32(text) mod partitions. The
names of a partition's Valkey keys start with its hash tag (`{POOL:3.17}:`), so they are all in one slot of a cluster,
and a call is one script (lua/*.lua) on one partition, executed as a whole or not at all; lua/common.lua lists the names
and what each holds. In addition there is one hash, `{POOL}:pool`:

    layout      4: what this page describes
    secret      of the handles, in hexadecimal
    partitions  their number; never changes
    born        moment of the first start, in microseconds since the epoch
    base_tick   where lease numbers start: 0, or (last lease of the pool that was moved in) // partitions + 1
    base_id     where ids start: 0, or (last id of the pool that was moved in) // partitions + 1
    note.NAME   numbers that other parts of a server store: see web/session.py
    pools_version, pools_last   of the registry of the other pools (registry.py)
    gone.NUMBER the partitions of a pool that is gone, until its history is deleted (pools.py)
    and the settings that all servers of the pool share, by their names

and a sorted set, `{POOL}:servers`: the running servers, by the moment of their latest heartbeat (presence.py). What the
dashboard keeps of `default` (web/kept_charts.py) is one string, `{POOL}:charts`; `{POOL}:charts_turn` is there while no
server may write it.

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
have replied that they have none; nearly always it takes one round trip while most keys are available. The scripts
enforce `--max-keys` (creation.py). How an attempt finds its leases again: attempts.py.

The rules of outcomes are in the scripts, too, and take the settings of the server that calls. The guard of quarantines
counts its own partition, and what the server found in the others just before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from operator import attrgetter
from typing import Any, NoReturn

import msgspec

from keypool import __version__
from keypool.core.answers import (
    EndedLease,
    Extended,
    Extension,
    GeneratedKey,
    HistoryPage,
    HolderRows,
    Identity,
    Imported,
    ImportedKey,
    KeptAlive,
    KeyPatch,
    Lease,
    NewKey,
    Page,
    PoolRow,
    RareEventRows,
    Ref,
    Revealed,
    Row,
    Stats,
    Unblock,
    Unblocked,
    WaiterRows,
    Written,
)
from keypool.core.cursor import (
    EventQuery,
    HistoryQuery,
    HolderQuery,
    ListQuery,
    WaiterQuery,
    next_of,
    number_after,
    order_of,
    page_query,
    position_after,
)
from keypool.core.errors import (
    BlockLimit,
    Draining,
    LeaseOver,
    ManySeats,
    NoKeyAvailable,
    PoolDraining,
    ShareSpent,
    StaleLease,
    StorageUnavailable,
    UnknownKey,
)
from keypool.core.events import HOLDER, Event, Origin
from keypool.core.handles import Handle, Handles
from keypool.core.keys import State, hint
from keypool.core.outcomes import Outcome, Report
from keypool.core.rules import PoolRules
from keypool.engine import NOTE, Attempt, Client, Timed
from keypool.engine.history import history_page
from keypool.engine.holder_calls import rare_row_of
from keypool.engine.valkey.attempts import RepeatedLease
from keypool.engine.valkey.calls import all_of, seconds_left
from keypool.engine.valkey.creation import KeyGenerator
from keypool.engine.valkey.details import Editor, FoundKey, Locks
from keypool.engine.valkey.holders import HolderPages, word_of
from keypool.engine.valkey.importing import Importer
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.pages import ListedKey, Pages, hint_of, row_of
from keypool.engine.valkey.partitions import Name, Named, Partitions
from keypool.engine.valkey.past import past_lease_of
from keypool.engine.valkey.poller import EXPIRING, POLL_SECONDS, QUIET_SECONDS, PartitionPoller
from keypool.engine.valkey.presence import Presence
from keypool.engine.valkey.registry import namespace
from keypool.engine.valkey.rekeying import rekey
from keypool.engine.valkey.sampler import PartitionSampler
from keypool.engine.valkey.scripts import keys_of
from keypool.engine.valkey.shares import Shares, spent
from keypool.engine.valkey.subscriber import ReleaseSubscriber
from keypool.engine.valkey.waiters import Waiters
from keypool.engine.waiters import Request
from keypool.ops.histogram import Histogram

_NOTE_SECONDS = 2.0
_NO_THRESHOLD = 2**53  # failures in a row that no key has
_LAST_ID = 2**53  # larger than any id
_UNKNOWN, _STALE, _OVER, _PENDING, _AT_LIMIT, _MANY = -1, -2, -3, -4, -6, -7
_WORDS = {
    1: "done",
    0: "done",
    _UNKNOWN: "unknown",
    _STALE: "stale",
    _OVER: "over",
    _PENDING: "over",
    _MANY: "many_seats",
}
"""The outcomes of unblock.lua and extend.lua; the others are those of `limit`."""
_STATES = {state.value.encode(): state for state in State}
_pack = msgspec.msgpack.Encoder().encode
_log = logging.getLogger("keypool.valkey")


class ValkeyEngine:
    """See the module, and the Engine protocol for the calls. Made by opening.py."""

    name = "valkey"

    def __init__(
        self,
        pool_name: str,
        partitions: Partitions,
        presence: Presence,
        subscriber: ReleaseSubscriber,
        shares: Shares,
    ) -> None:
        self.pool_name = pool_name
        self.rules = partitions.rules
        self.pool_draining = False
        facts = partitions.facts
        self.handles = Handles(facts.secret, facts.number)
        self._client = client = partitions.client
        self._nodes = client.nodes
        pool = namespace(self._nodes.url.pool, facts.number)
        self._pool_key = f"{{{pool}}}:pool"
        self._loop = asyncio.get_running_loop()
        self._presence = presence
        self._started_at = self._loop.time()
        self._draining = False
        self._guarding = asyncio.Lock()
        server = presence.server
        self._partitions = partitions
        self._poller = PartitionPoller(
            partitions, server, POLL_SECONDS if facts.number == 0 else QUIET_SECONDS
        )
        self._shares = shares
        client.on_shares = shares.moved
        self._sampler = PartitionSampler(partitions, self._poller, self.handles, server, shares=shares)
        self._generator = KeyGenerator(partitions, self._poller, server)
        locks = Locks(partitions, server)
        self._details = Editor(partitions, locks, self._find)
        self._importer = Importer(partitions, self._poller, self._generator, self._details, locks)
        self._details.adder = self._importer
        self._pages = Pages(partitions)
        self._holders = HolderPages(partitions)
        self._waiters = Waiters(partitions, self._sampler, self._poller, server, shares)
        self._subscriber = subscriber
        self._channels = [keys_of(pool, number, facts.partitions)[-1] for number in range(facts.partitions)]
        subscriber.add(self._channels, self._waiters.key_freed)
        self._poller.sweep()

    # -- the pool

    async def set_rules(self, rules: PoolRules, revision: int) -> None:
        """Go by these settings from now on, those of a revision of the pool (registry.py).

        O(partitions). Raises StorageUnavailable if not all of them know it now.
        """
        self.rules = rules
        self._partitions.set_rules(rules)
        self._poller.set_interval()
        self._generator.set_limits()
        rest_us, pace = round(rules.rest_seconds * 1e6), rules.pace
        paced = "" if pace is None else f"{pace.interval * 1e6} {pace.tolerance * 1e6}"
        share = -(-rules.history_leases // self._partitions.count)
        draining = "1" if self.pool_draining else ""
        await self._partitions.all("rules", revision, rest_us, draining, paced, share)

    def close_pool(self) -> None:
        """Raise PoolDraining in all waiters, and in calls that want keys or make some, from now on. O(waiters)."""
        self.pool_draining = True
        self._waiters.drain(PoolDraining)

    async def close_if_empty(self) -> int:
        """The same on all servers, if the pool has no keys. Returns how many it has. Raises StorageUnavailable."""
        return sum(reply[0] for reply in await self._partitions.all("close"))

    async def purge(self, origin: Origin, held_too: bool, after: list[int], limit: int) -> tuple[int, bool]:
        """Purge a slice of the keys that nobody holds, or of all keys. Raises StorageUnavailable. O(limit * log n).

        `after` are the ids up to which keys were looked at, by partition, and is updated. Returns how many keys are
        left, and whether there is more to do at once.
        """
        left, more = 0, False
        for partition in range(self._partitions.count):
            words = (word_of(origin), int(held_too), after[partition], limit)
            total, last, cooling = await self._client.call(partition, "drain", words)
            left += total
            more = more or last >= 0
            # Keys that cool after a lease are found by their ids only.
            after[partition] = last if last >= 0 else 0 if cooling else _LAST_ID
        return left, more

    def row(self) -> PoolRow:
        """Counts, as of the latest replies and polls, and settings. O(partitions)."""
        poller = self._poller
        statuses = [status for status in poller.statuses if status is not None]
        total = sum(poller.totals) if statuses else 0
        cooling = sum(status.cooling for status in statuses)
        quarantined = sum(status.quarantined for status in statuses)
        available = min(sum(self._client.available), total - cooling - quarantined)
        return PoolRow(
            self.pool_name,
            total,
            available,
            total - available - cooling - quarantined,
            cooling,
            quarantined,
            len(self._waiters) + poller.waiting_elsewhere,
            self.pool_draining,
            self.rules.settings(),
        )

    # -- the calls

    async def generate(self, count: int, origin: Origin = HOLDER) -> list[GeneratedKey]:
        """Generate keys, all or none. O(count * log n), and O(partitions) near `max_keys`."""
        if self.pool_draining:
            raise PoolDraining
        return await self._generator.generate(count, word_of(origin))

    async def import_key(self, item: NewKey, expire: bool, origin: Origin) -> ImportedKey:
        """Add a key from elsewhere, unless the pool has its secret. O(log n), O(partitions) near `max_keys`."""
        if self.pool_draining:
            raise PoolDraining
        return await self._importer.import_key(item, expire, word_of(origin))

    async def import_many(
        self, items: Sequence[NewKey | Imported], update: bool, expire: bool, origin: Origin
    ) -> list[Imported]:
        """Add keys from elsewhere, one by one. O(items * log n), O(partitions) near `max_keys`."""
        if self.pool_draining:
            raise PoolDraining
        return await self._importer.import_many(items, update, expire, word_of(origin))

    async def update(self, ref: Ref, patch: KeyPatch, origin: Origin) -> Row:
        """Change name, labels, data, pace or seats of a key. O(seats · log n), O(partitions) for a name."""
        if patch.seats is not None and self.pool_draining:
            raise PoolDraining
        return await self._details.update(ref, patch, word_of(origin))

    async def replace(self, ref: Ref, secret: str, origin: Origin) -> Row:
        """Give a key another text. O(log n)."""
        return await self._details.replace(ref, secret, word_of(origin))

    async def find(self, text: str) -> Row:
        """The row of the key with this text, id, name, or hint. O(partitions * log n)."""
        return await self._details.find(text)

    @property
    def total(self) -> int:
        """How many keys the pool has, as of the latest polls. O(partitions)."""
        return sum(status.total for status in self._poller.statuses if status is not None)

    async def rekey(self, on_slice: Callable[[int], Awaitable[object]]) -> None:
        """Encrypt all keys under the first secrets key, in slices (rekeying.py). O(n log n)."""
        await rekey(self._partitions, on_slice)

    async def acquire(
        self,
        owner: str | None,
        wait: float,
        timed: Timed | None = None,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> Lease:
        """Lease a key, now or within `wait` seconds. O(log n), and O(partitions) if none is available."""
        if self.pool_draining:
            raise PoolDraining
        digest = None if attempt is None else attempt.digest
        request = Request(owner, block_seconds, digest, client)
        if client is None or client.max_held is None:
            lease = await self._acquire(request, wait, timed)
        else:
            lease = await self._acquire_in_share(request, client, wait, timed)
        if attempt is not None:
            attempt.replayed = isinstance(lease, RepeatedLease)
        return lease

    async def _acquire(self, request: Request, wait: float, timed: Timed | None) -> Lease:
        if not self._waiters.waiting:
            taken = await self._sampler.take(request, 1)
            if taken:
                return taken[0]
        elif request.attempt is not None and (held := await self._sampler.held(request.attempt)):
            return held[0]
        if wait <= 0 and not self._waiters.waiting:
            self._refuse()
        return await self._waiters.wait(request, wait, timed) or self._refuse()

    async def _acquire_in_share(
        self, request: Request, client: Client, wait: float, timed: Timed | None
    ) -> Lease:
        """The same for a client that may hold so many leases and no more. Raises ShareSpent."""
        if request.attempt is not None and (held := await self._sampler.held(request.attempt)):
            return held[0]
        if not self._has_earlier(client):
            taken, error = await self._take_in_share(request, client, 1, self._sampler.take)
            if taken:
                return taken[0]
            if wait <= 0:
                self._refuse(error)
        lease = await self._waiters.wait(request, wait, timed)
        return lease or self._refuse(await self._shares.spent(client))

    def _has_earlier(self, client: Client) -> bool:
        """Whether acquires wait that are to be served before a new one of this client."""
        return bool(self._waiters.waiting) or self._waiters.has_lane(client)

    async def _take_in_share(
        self,
        request: Request,
        client: Client,
        count: int,
        take: Callable[[Request, int], Coroutine[Any, Any, list[Lease]]],
    ) -> tuple[list[Lease], ShareSpent | None]:
        """Acquire as many keys as the client may have, `count` at most; and the error if it may have none."""
        purse, left = await self._shares.reserve(client, count, self._sampler.block_of(request))
        if not purse.reservations:
            return [], spent(client, left)
        try:
            return await take(request._replace(purse=purse), len(purse.reservations)), None
        finally:
            self._shares.give_back(purse)

    async def acquire_many(
        self,
        owner: str | None,
        count: int,
        block_seconds: float | None = None,
        attempt: Attempt | None = None,
        *,
        client: Client | None = None,
    ) -> list[Lease]:
        """Lease up to `count` keys. O(count * log n)."""
        if self.pool_draining:
            raise PoolDraining
        digest = None if attempt is None else attempt.digest
        request = Request(owner, block_seconds, digest, client)
        if client is None or client.max_held is None:
            leases = await self._acquire_many(request, count)
        else:
            leases = await self._acquire_many_in_share(request, client, count)
        if attempt is not None:
            attempt.replayed = isinstance(leases[0], RepeatedLease)
        return leases

    async def _acquire_many(self, request: Request, count: int) -> list[Lease]:
        if not self._waiters.waiting:
            return await self._sampler.take(request, count) or self._refuse()
        if request.attempt is not None and (held := await self._sampler.held(request.attempt)):
            return held
        first = await self._waiters.wait(request, 0) or self._refuse()
        try:
            return [first, *await self._sampler.take_more(request, 0 if self._waiters.waiting else count - 1)]
        except (GeneratorExit, asyncio.CancelledError):
            self._sampler.give_back(first)
            raise

    async def _acquire_many_in_share(self, request: Request, client: Client, count: int) -> list[Lease]:
        if request.attempt is not None and (held := await self._sampler.held(request.attempt)):
            return held
        if not self._has_earlier(client):
            taken, error = await self._take_in_share(request, client, count, self._sampler.take)
            return taken or self._refuse(error)
        first = await self._waiters.wait(request, 0)
        if first is None:
            self._refuse(await self._shares.spent(client))
        if count == 1 or self._has_earlier(client):
            return [first]
        try:
            more, _ = await self._take_in_share(request, client, count - 1, self._sampler.take_more)
            return [first, *more]
        except (GeneratorExit, asyncio.CancelledError):
            self._sampler.give_back(first)
            raise

    async def unblock(
        self,
        ref: Ref,
        lease: int | None,
        ended: list[EndedLease] | None = None,
        report: Report | None = None,
        origin: Origin = HOLDER,
        *,
        uses: int = 1,
    ) -> Unblocked:
        """End a lease, and take its holder's report. O(log n), O(partitions) for a report of INVALID."""
        [reply], age = await self._unblock([Unblock(ref, lease, report, uses)], ended, origin)
        if reply[0] < 0:
            self._raise_refusal(ref, lease, reply)
        outcome, id, _, state, left, guarded, _ = reply
        available_in = seconds_left(left, age) if left else None
        return Unblocked(id, _STATES[state], outcome == 1, available_in, guarded == 1)

    async def unblock_many(
        self, items: Sequence[Unblock], ended: list[EndedLease] | None = None, origin: Origin = HOLDER
    ) -> list[str]:
        """End leases and take reports, one by one. O(items * log n), and a round trip for each partition with a report
        of INVALID, so that the guard counts what the partitions before it did.
        """
        replies, _ = await self._unblock(items, ended, origin)
        return [_WORDS[reply[0]] for reply in replies]

    async def _unblock(
        self, items: Sequence[Unblock], ended: list[EndedLease] | None, origin: Origin
    ) -> tuple[list[Reply], float]:
        """The replies of unblock.lua, one for each item, and how old they are."""
        words = [
            ("" if item.lease is None else item.lease, _report(item.report), item.uses) for item in items
        ]
        outcomes = {item.report.outcome for item in items if item.report is not None}
        common = word_of(origin), self._outcome_rules(0, 0) if outcomes else ""

        async def send(known: list[Named]) -> tuple[list[Reply], float]:
            if Outcome.INVALID in outcomes and self._partitions.count > 1:
                found, age = await self._quarantine_in_turn(known, common[0])
            else:
                found, age = await self._partitions.each("unblock", known, common)
            for named, reply in zip(known, found, strict=True):
                if reply[0] == 1 and reply[4]:  # it cools
                    self._poller.expect(named[0], reply[4] / 1e6)
            return found, age

        refs = [item.ref for item in items]
        names = await self._partitions.names_of(refs)
        found, age = await send(
            [_joined(name, words[place]) for place, name in enumerate(names) if name is not None]
        )
        replies = _in_places(names, found, (_UNKNOWN, 0, 0))
        if self._partitions.may_be_elsewhere:
            age = max(age, await self._look_elsewhere(refs, replies, _UNKNOWN, send, words))
        if ended is not None:
            for item, reply in zip(items, replies, strict=True):
                if item.lease is None and reply[0] == 1:
                    ref = item.ref.text if isinstance(item.ref, Written) else item.ref
                    # Only what the script replied may be a hint already: a text may have an ellipsis in it, too.
                    shown = _hint_of(reply[6].decode()) if reply[6] else hint(str(ref))
                    ended.append(EndedLease(reply[1], shown, reply[2]))
        return replies, age

    async def _about(
        self,
        refs: Sequence[Ref],
        send: Callable[[list[Named]], Awaitable[tuple[list[Reply], float]]],
        missing: Reply,
        words: Sequence[tuple[Word, ...]] | None = None,
    ) -> tuple[list[Reply], float]:
        """The replies of a script about keys, one for each ref, and how old they are.

        `send` calls the script with names, and behind each name its `words`; `missing` is the reply about no key. Keys
        that aren't found in the partition of their text are looked for where else they may be.
        """
        names = await self._partitions.names_of(refs)
        words = words or [()] * len(refs)
        found, age = await send(
            [_joined(name, words[place]) for place, name in enumerate(names) if name is not None]
        )
        replies = _in_places(names, found, missing)
        if self._partitions.may_be_elsewhere:
            unknown = missing if isinstance(missing, int) else missing[0]
            age = max(age, await self._look_elsewhere(refs, replies, unknown, send, words))
        return replies, age

    async def _look_elsewhere(
        self,
        refs: Sequence[Ref],
        replies: list[Reply],
        unknown: int,
        send: Callable[[list[Named]], Awaitable[tuple[list[Reply], float]]],
        words: Sequence[tuple[Word, ...]],
    ) -> float:
        """Call the script where the keys may be that weren't found, and put its replies in their places.

        `unknown` is how a reply about no key begins. Returns how old the replies are.
        """
        lost = [
            place
            for place, reply in enumerate(replies)
            if isinstance(refs[place], str | Written)
            and (reply if isinstance(reply, int) else reply[0]) == unknown
        ]
        if not lost:
            return 0.0
        others = await self._partitions.other_names_of([refs[place] for place in lost])
        again = {place: name for place, name in zip(lost, others, strict=True) if name is not None}
        if not again:
            return 0.0
        found, age = await send([_joined(name, words[place]) for place, name in again.items()])
        for place, reply in zip(again, found, strict=True):
            replies[place] = reply
        return age

    async def _quarantine_in_turn(self, items: Sequence[Named], origin: Word) -> tuple[list[Reply], float]:
        """Call unblock.lua for one partition after the other, with what its guard must know of the others.

        One batch at a time, after a look at all partitions that can be reached.
        """
        replies: list[Reply] = [None] * len(items)
        oldest = 0.0
        async with self._guarding:
            quarantined, totals = await self._poller.quarantined_and_totals()
            for partition in dict.fromkeys(item[0] for item in items):
                places = [place for place, item in enumerate(items) if item[0] == partition]
                elsewhere = (sum(each) - each[partition] for each in (quarantined, totals))
                found, age = await self._partitions.each(
                    "unblock",
                    [items[place] for place in places],
                    (origin, self._outcome_rules(*elsewhere)),
                )
                oldest = max(oldest, age)
                for place, reply in zip(places, found, strict=True):
                    replies[place] = reply
                    quarantined[partition] += reply[0] == 1 and reply[3] == b"quarantined"
        return replies, oldest

    def _outcome_rules(self, quarantined_elsewhere: int, keys_elsewhere: int) -> bytes:
        """The second argument of unblock.lua."""
        rules = self.rules
        lengths = (rules.cooldown_seconds, rules.max_cooldown_seconds, rules.max_retry_after_seconds)
        return _pack((
            *(round(seconds * 1e6) for seconds in lengths),
            _NO_THRESHOLD if rules.error_threshold is None else rules.error_threshold,
            round(rules.forget_seconds * 1e6),
            rules.max_quarantined_percent,
            quarantined_elsewhere,
            keys_elsewhere,
        ))  # fmt: skip

    async def extend(self, ref: Ref, lease: int, seconds: float | None) -> Extended:
        """Let a lease end later. O(log n)."""
        [reply], age = await self._extend([Extension(ref, lease, seconds)])
        outcome, id, latest, release, left, _ = reply
        if outcome in (_UNKNOWN, _STALE):
            self._raise_refusal(ref, lease, reply)
        if outcome in (_OVER, _PENDING):
            raise LeaseOver(outcome == _PENDING)
        if outcome != 1:
            longest = self.rules.longest_block if outcome == _AT_LIMIT else None
            raise BlockLimit(seconds_left(release, age), longest=longest)
        return Extended(id, latest, seconds_left(release, age), seconds_left(left, age))

    async def extend_many(self, items: Sequence[Extension]) -> list[str]:
        """Let leases end later, one by one. O(items * log n)."""
        replies, _ = await self._extend(items)
        return [_WORDS.get(reply[0], "limit") for reply in replies]

    async def _extend(self, items: Sequence[Extension]) -> tuple[list[Reply], float]:
        """The replies of extend.lua, one for each item, and how old they are."""
        longest, block = self.rules.longest_block, self.rules.block_seconds
        words = [
            # No more than `longest` can matter, and a number that is too large would not be a whole one in Lua.
            (item.lease, "" if item.seconds is None else round(min(item.seconds, longest) * 1e6))
            for item in items
        ]
        replies, age = await self._about(
            [item.ref for item in items],
            lambda known: self._partitions.each("extend", known, (round(longest * 1e6), round(block * 1e6))),
            (_UNKNOWN, 0, 0, 0, 0, b""),
            words,
        )
        if (attempts := self._sampler.attempts) is not None:
            for outcome, _, _, release, _, attempt in replies:
                if outcome == 1 and attempt:
                    attempts.keep(attempt, release / 1e6)
        return replies, age

    async def quarantine(self, ref: Ref, reason: str | None, now: bool, origin: Origin) -> Row:
        """Take a key out of service. O(log n)."""
        return await self._change_row("quarantine", ref, (word_of(origin), reason or "", int(now)))

    async def quarantine_many(
        self, refs: Sequence[Ref], reason: str | None, now: bool, origin: Origin
    ) -> list[str]:
        """Take keys out of service, one by one. O(items * log n)."""
        replies, _ = await self._change("quarantine", refs, (word_of(origin), reason or "", int(now)), (0,))
        return [_word_of(reply[0]) for reply in replies]

    async def restore(self, ref: Ref, origin: Origin) -> Row:
        """Make a cooling or quarantined key available. O(log n)."""
        return await self._change_row("restore", ref, (word_of(origin),))

    async def restore_many(self, refs: Sequence[Ref], origin: Origin) -> list[str]:
        """Make cooling and quarantined keys available, one by one. O(items * log n)."""
        replies, _ = await self._change("restore", refs, (word_of(origin),), (0,))
        return [_word_of(reply[0]) for reply in replies]

    async def _change_row(self, script: str, ref: Ref, common: Sequence[Word]) -> Row:
        [[done, *row]], age = await self._change(script, [ref], common, (0,))
        if not row:
            self._raise_missing(ref, done)
        return row_of(ListedKey(*row[0]), age, self.rules.forget_seconds)

    async def _change(
        self, script: str, refs: Sequence[Ref], common: Sequence[Word], unknown: Reply
    ) -> tuple[list[Reply], float]:
        """Call a script that takes names and replies what it did about each. `unknown` is the reply about no key.

        Returns the replies, one for each ref, and how old they are.
        """
        return await self._about(refs, lambda names: self._partitions.each(script, names, common), unknown)

    async def keepalive(self, ref: Ref) -> KeptAlive:
        """Postpone a key's expiry. O(log n)."""
        partition, name = await self._partitions.name_of(ref)
        life_us = self._partitions.life_us
        call = self._client.call(partition, "keepalive", (life_us, name))
        [id] = await call
        age = call.age()
        if id == 0 and self._partitions.may_be_elsewhere:
            [id], age = await self._change("keepalive", [ref], (life_us,), 0)
        if isinstance(id, list):
            raise ManySeats(id[1])
        if id <= 0:
            self._raise_missing(ref, id)
        return KeptAlive(id, seconds_left(life_us, age) if life_us else None)

    async def keepalive_many(self, refs: Sequence[Ref]) -> list[str]:
        """Postpone expiries one by one. O(items * log n)."""
        ids, _ = await self._change("keepalive", refs, (self._partitions.life_us,), 0)
        return ["many_seats" if isinstance(id, list) else _word_of(id) for id in ids]

    async def delete(self, ref: Ref, origin: Origin = HOLDER) -> Identity:
        """Purge a key. O(log n)."""
        [[id, text, shown]], _ = await self._change("delete", [ref], (word_of(origin),), (0, "", ""))
        if id <= 0:
            self._raise_missing(ref, id)
        return Identity(id, hint_of(text, shown))

    async def delete_many(self, refs: Sequence[Ref], origin: Origin = HOLDER) -> list[Identity | str]:
        """Purge keys one by one. O(items * log n)."""
        replies, _ = await self._change("delete", refs, (word_of(origin),), (0, "", ""))
        return [Identity(id, hint_of(text, shown)) if id > 0 else _word_of(id) for id, text, shown in replies]

    async def get(self, ref: Ref) -> Row:
        """The row of a key. O(log n)."""
        found, age = await self._find(ref)
        return row_of(found.row, age, self.rules.forget_seconds)

    async def history(self, ref: Ref, query: HistoryQuery) -> HistoryPage:
        """Leases of a key that have ended. O(log n + page), O(partitions) for a key that was moved in."""
        before = number_after(query.after, "history")
        id = ref if isinstance(ref, int) else (await self.get(ref)).id
        words = (id, "" if before is None else before, query.limit + 1)
        where = self._partitions.of_id(id)
        replies = await all_of([self._partitions.call(partition, "history", words) for partition in where])
        found = [past_lease_of(id, past) for _, *leases in replies for past in leases]
        found.sort(key=attrgetter("lease"), reverse=True)
        if not found and before is None and not any(reply[0] for reply in replies):
            raise UnknownKey
        return history_page(found[: query.limit + 1], query)

    @property
    def history_kept(self) -> int:
        """How many leases the history has, as of the latest polls. O(partitions)."""
        return sum(status.past for status in self._poller.statuses if status is not None)

    async def reveal(self, ref: Ref, origin: Origin = HOLDER) -> Revealed:
        """A key's text, reported as an event. O(log n)."""
        found, _ = await self._find(ref, word_of(origin))
        text, details = self._details.read(found)
        data = None if details.data is None else msgspec.Raw(details.data)
        return Revealed(found.row.id, text, details.name, data)

    async def _find(self, ref: Ref, revealed_by: str = "") -> tuple[FoundKey, float]:
        """What get.lua replies about a key, and how old it is. Raises UnknownKey, StaleLease."""

        async def send(names: list[Named]) -> tuple[list[Reply], float]:
            if not names:
                return [], 0.0
            partition, name = names[0][0], names[0][1]
            call = self._client.call(partition, "get", (name, revealed_by))
            return await call, call.age()

        [found], age = await self._about([ref], send, 0)
        if isinstance(found, int):
            self._raise_missing(ref, found)
        row, sealed, seats = found
        return FoundKey(ListedKey(*row), sealed, seats), age

    def _raise_missing(self, ref: Ref, refusal: int) -> NoReturn:
        """Raise what a refusal of common.lua means."""
        if isinstance(ref, Written):
            ref = ref.other
        if refusal and isinstance(ref, Handle):
            raise StaleLease(ref.lease, -refusal)
        raise UnknownKey

    def _raise_refusal(self, ref: Ref, lease: int | None, reply: Reply) -> NoReturn:
        """Raise what the outcome of unblock.lua or extend.lua means about a lease."""
        outcome, seats, latest = reply[:3]
        if outcome == _UNKNOWN:
            raise UnknownKey
        if outcome == _MANY:
            raise ManySeats(seats)
        if isinstance(ref, Written):
            ref = ref.other
        if isinstance(ref, Handle):
            lease = ref.lease
        assert lease is not None  # no other is refused as stale
        raise StaleLease(lease, latest or None)

    async def page(self, query: ListQuery) -> Page:
        """A page of rows. O(partitions * log n + page)."""
        parsed = page_query(query)
        if parsed.owner is None:
            rows, position = await self._pages.page(parsed)
        else:
            rows, position = await self._holders.keys(parsed.owner, parsed.after, parsed.limit)
        return Page(rows, next_of(order_of(parsed), position))

    async def owners(self, query: HolderQuery) -> HolderRows:
        """Who holds keys. O(partitions * page * log n)."""
        rows, position = await self._holders.owners(position_after(query.after, "owners"), query.limit)
        return HolderRows(rows, next_of("owners", position))

    async def release_owner(self, owner: str, client: str | None, origin: Origin) -> int:
        """End the leases that an owner holds now, in slices, one partition after the other. O(leases * log n)."""
        return await self._holders.release(owner, client, word_of(origin))

    async def waiters(self, query: WaiterQuery) -> WaiterRows:
        """Who waits at this server. O(page + log n) for each client with a limited share."""
        rows, last = self._waiters.page(number_after(query.after, "waiters"), query.limit)
        return WaiterRows(rows, next_of("waiters", None if last is None else (last,)))

    async def rare_events(self, query: EventQuery) -> RareEventRows:
        """Rare events, newest first. O(partitions * page)."""
        after = position_after(query.after, "events")
        events, position = await self._holders.rare_events(query.kind, after, query.limit)
        rows = [rare_row_of(event) for event in events]
        return RareEventRows(rows, next_of("events", position))

    async def stats(self) -> Stats:
        """All counts. O(partitions)."""
        snapshot = await self._poller.snapshot()
        counters = dict(snapshot.counters)
        counters["refused"] += self._poller.refused
        return Stats(
            total=snapshot.total,
            available=snapshot.available,
            blocked=snapshot.blocked,
            cooling=snapshot.cooling,
            quarantined=snapshot.quarantined,
            waiting=len(self._waiters) + snapshot.waiting_elsewhere,
            uptime=round(self._loop.time() - self._started_at, 3),
            engine=self.name,
            version=__version__,
            **counters,
        )

    async def expiring(self, seconds: float) -> int:
        """Keys that expire within `seconds`. O(partitions)."""
        last = self._poller.last
        if seconds == EXPIRING and last is not None and self._loop.time() - last.taken_at < 2 * POLL_SECONDS:
            return last.expiring
        statuses = await self._poller.poll(range(self._partitions.count), seconds)
        return sum(status.expiring for status in statuses)

    def _refuse(self, error: ShareSpent | None = None) -> NoReturn:
        if error is not None:
            raise error
        self._poller.refused += 1
        last = self._poller.last
        if last is None:
            raise NoKeyAvailable
        next_release = last.next_release
        raise NoKeyAvailable(
            None if next_release is None else round(max(0.0, next_release - self._loop.time()), 3),
            blocked=last.blocked,
            cooling=last.cooling,
            quarantined=last.quarantined,
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

    def secrets(self) -> int:
        """How many different texts the keys have, as of the latest polls. O(partitions)."""
        return sum(each.total - each.further for each in self._poller.statuses if each is not None)

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
        """Count the refusals of the last second, and use the connections no more. Call `drain` first."""
        self._poller.stop()
        await self._waiters.close()
        self._subscriber.discard(self._channels)
        if self._poller.refused and self._nodes.failing is None and self._client.gone is None:
            try:
                await self._client.call(0, "refuse", (self._poller.refused,))
            except StorageUnavailable as error:
                _log.warning("%d refused acquires were not counted: %s", self._poller.refused, error.detail)
        await self._client.close()
        await self._poller.join()


def _report(report: Report | None) -> Word:
    """A report for unblock.lua."""
    return "" if report is None else _pack((report.outcome, report.retry_after, report.reason))


def _joined(name: Name, words: tuple[Word, ...]) -> Named:
    """A name of a key, and what goes behind it."""
    return name[0], name[1], *words


def _hint_of(text: str) -> str:
    """What may be shown of a text, of which a script replied that already if it is sealed."""
    return text if "…" in text else hint(text)


def _word_of(refusal: int) -> str:
    """The word of a batch's item: a refusal of common.lua, or more than 0."""
    return "done" if refusal > 0 else "stale" if refusal else "unknown"


def _in_places(names: Sequence[object], found: Sequence[Reply], missing: Reply) -> list[Reply]:
    """The replies about the names that there are, in their places, and `missing` in the others."""
    replies = iter(found)
    return [missing if name is None else next(replies) for name in names]
