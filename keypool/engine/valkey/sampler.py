"""Sampling keys: each available key of the pool with the same chance, over partitions, in few round trips.

The technique is rejection sampling. The server knows for each partition p a bound B(p) that is not less than the keys
available there. A draw chooses one of B places, the sum of all bounds, each with the same chance. In the script
(lua/acquire.lua) the first places of p, as many as keys are available there now, stand for these keys, one each. If
the draw fell on another place it is void, and another draw is made.

Proof that no key is favoured: in one draw, a key of p is served with the chance B(p)/B * 1/B(p) = 1/B, whichever
partition it is in, and however many keys are available there or elsewhere. So each draw that isn't void serves each
available key with the same chance, and which draws are made depends on counts, never on which key is which. All that
is needed is that B(p) is not too small.

B(p) is how many keys the partition has in all, blocked or not (PartitionPoller.totals). That changes slowly, and
never by acquire, unblock or a release, whichever server they are made at. The exception: keys that another server
generated since the last poll, a second ago at most, may not be counted yet; until then a key of their partition may
have less than its share.

A draw is void with the chance blocked / all. Where most keys seem to be blocked, and after some void draws, all
partitions are polled, and B(p) is how many keys are available there at that moment: a draw is void only if one of
those was served to another caller since. With one partition none of this is needed: its script draws among the keys
that are available.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import attrgetter

from keypool.core.answers import Lease
from keypool.core.errors import StorageUnavailable
from keypool.core.rules import PoolRules
from keypool.engine.valkey.calls import OutcomeUnknown, ScriptCall, all_of, seconds_left
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.poller import EXPIRING, PartitionPoller

_MAX_ROUNDS = 8  # of draws, before an acquire that always comes too late gives up
_MAX_ROUNDS_BY_TOTALS = 4  # of these, before all partitions are polled
_MIN_SHARE = 0.25  # of the keys that must be available for draws among all keys to be worthwhile


class PartitionSampler:
    """See the module."""

    def __init__(self, partitions: Partitions, poller: PartitionPoller, rules: PoolRules) -> None:
        self._partitions = partitions
        self._available = partitions.available
        self._poller = poller
        self._block_us = round(rules.block_seconds * 1e6)
        self._tick = 0  # of the latest lease that this server knows of
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._ends: list[int] = []  # cumulated totals of the partitions
        self._ends_version = -1  # the poller's `totals_version` that they are of

    async def take(self, owner: str | None, count: int) -> list[Lease]:
        """Acquire up to `count` keys, in order of their leases; none only if none was available.

        O(count * log n), mostly in one round trip; in a few, and O(partitions) each, if many keys are blocked.
        """
        taken: list[Lease] = []
        calls: list[ScriptCall] = []
        rounds = 0
        try:
            while len(taken) < count and rounds < _MAX_ROUNDS:
                missing = count - len(taken)
                if by_totals := self._is_worthwhile(missing, rounds):
                    plan = self._among_all(missing)
                # The only partition need not be polled: its script finds out whether it has keys.
                elif (
                    self._partitions.count == 1 and not rounds and self._available[0]
                ) or await self._poll():
                    plan = self._among_available(missing)
                else:
                    break
                bounds = self._poller.totals if by_totals else self._available
                calls = [
                    self._acquire(partition, bounds[partition], not by_totals, [owner] * draws)
                    for partition, draws in plan.items()
                ]
                again = 0
                for call, reply in zip(calls, await all_of(calls), strict=True):
                    taken += self._leases_in(call)
                    again |= reply[0]
                calls = []
                rounds += not again
        except BaseException:  # the caller is gone, or a partition can't be reached
            for call in calls:
                self._take_back(call)
            for lease in taken:
                self.give_back(lease)
            raise
        if len(taken) > 1:
            taken.sort(key=attrgetter("lease"))
        return taken

    async def take_in_order(self, owners: Sequence[str | None], poll: bool) -> list[Lease | OutcomeUnknown]:
        """Acquire a key for each owner, in order: what became of the first of them, which are less than all if no more
        keys were available. Unless `poll`, only partitions that are known to have keys are called.

        Partitions are called one after the other, and each serves the owners in order, so that every lease has the name
        of its holder from the beginning. An owner whose acquire was sent and not answered isn't tried again, as it may
        have been served. O(owners * log n), in a round trip for each partition that serves.
        """
        done: list[Lease | OutcomeUnknown] = []
        rounds = 0
        try:
            while len(done) < len(owners) and rounds < _MAX_ROUNDS:
                if (rounds or not any(self._available)) and not (poll and await self._poll()):
                    break
                again = False
                for partition, draws in self._among_available(len(owners) - len(done)).items():
                    some = owners[len(done) : len(done) + draws]
                    again = await self._serve(partition, some, done) or again
                rounds += not again
        except StorageUnavailable:
            if not done:
                raise
        except BaseException:
            for lease in done:
                if isinstance(lease, Lease):
                    self.give_back(lease)
            raise
        return done

    async def _serve(
        self, partition: int, owners: Sequence[str | None], done: list[Lease | OutcomeUnknown]
    ) -> bool:
        """Serve the first of these owners there; whether overdue keys were in the way, so that a repeat may help."""
        call = self._acquire(partition, self._available[partition], True, owners)
        try:
            again: bool = (await call)[0] == 1
        except OutcomeUnknown as error:
            done += [error] * len(owners)
            raise
        except BaseException:
            self._take_back(call)
            raise
        done += self._leases_in(call)
        return again

    # -- which partitions to draw from

    def _is_worthwhile(self, missing: int, rounds: int) -> bool:
        """Whether draws among all keys will probably serve so many, by what partitions last replied."""
        if self._partitions.count == 1 or rounds >= _MAX_ROUNDS_BY_TOTALS:
            return False
        client, totals = self._partitions.client, self._poller.totals
        if client.degraded:  # keys are drawn from the partitions that can be reached
            unreachable = set(client.unreachable)
            self._ends = list(accumulate(0 if n in unreachable else total for n, total in enumerate(totals)))
            self._ends_version = -1
        elif self._ends_version != self._poller.totals_version:
            self._ends = list(accumulate(totals))
            self._ends_version = self._poller.totals_version
        available, total = sum(self._available), self._ends[-1]
        enough = _MIN_SHARE * total <= available <= total and available > 0
        return enough and (missing == 1 or missing <= _MIN_SHARE * available)

    async def _poll(self) -> bool:
        """Poll all partitions, until a key is available or nothing is overdue; whether one is.

        While some are unreachable the others serve what they have. If they have nothing, it is not known whether a key
        is available: raises StorageUnavailable.
        """
        client = self._partitions.client
        if client.degraded:
            reachable = sorted({*range(self._partitions.count)} - {*client.unreachable})
            statuses = await self._poller.poll(reachable, EXPIRING)
            if any(status.available for status in statuses):
                return True
        snapshot = await self._poller.snapshot()
        while not snapshot.available and snapshot.overdue:
            snapshot = await self._poller.snapshot()
        return snapshot.available > 0

    def _among_all(self, count: int) -> Mapping[int, int]:
        """How many draws fall on each partition, among all keys."""
        ends = self._ends
        if count == 1:
            return {bisect(ends, self._random.random() * ends[-1]): 1}
        return Counter(self._random.choices(range(len(ends)), cum_weights=ends, k=count))

    def _among_available(self, count: int) -> Mapping[int, int]:
        """The same among the keys that are available, no more draws than there are."""
        available = self._available
        if len(available) == 1:
            return {0: min(count, available[0])} if available[0] else {}
        most = min(count, sum(available))
        return Counter(self._random.sample(range(len(available)), counts=available, k=most) if most else ())

    # -- calling acquire.lua

    def _acquire(self, partition: int, bound: int, takes: bool, owners: Sequence[str | None]) -> ScriptCall:
        facts, chance = self._partitions.facts, self._random.random
        if facts.partitions == 1:
            bound = 0
        words: list[Word] = [bound, "1" if takes else "", self._tick, facts.born, facts.base_tick]
        words += [facts.partitions, partition, self._block_us]
        for owner in owners:
            words += [owner or "", chance()]
        return self._partitions.call(partition, "acquire", words, self._give_back_leases)

    def _leases_in(self, call: ScriptCall) -> list[Lease]:
        _, tick, *leases = call.result()
        self._tick = max(self._tick, tick)
        age = call.age()
        block_left = seconds_left(self._block_us, age)
        return [
            Lease(id, text.decode(), lease, block_left, seconds_left(expires, age))
            for text, id, lease, expires in leases
        ]

    def _take_back(self, call: ScriptCall) -> None:
        """Nobody wants the reply any more, whether or not it has come."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._give_back_leases(call.result())

    def _give_back_leases(self, reply: Reply) -> None:
        for text, _, lease, _ in reply[2:]:
            self._free(text.decode(), lease)

    def give_back(self, lease: Lease) -> None:
        """Free a key whose lease nobody got."""
        self._free(lease.key, lease.lease)

    def _free(self, text: str, lease: int) -> None:
        self._partitions.call(self._partitions.of(text), "unblock", (text, lease))
