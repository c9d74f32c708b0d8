"""Sampling keys uniformly: every available key of the pool has the same chance, in few round trips.

The technique is rejection sampling. For each partition p the server has an upper bound B(p) of the keys available
there. A draw chooses one of B places, B being the sum of all bounds, each with the same probability. The first places
of p stand for the keys that are available there when the script runs (lua/acquire.lua), one each. A draw of any other
place is void, and another draw is made.

Proof of uniformity: one draw serves a given key of p with probability B(p)/B * 1/B(p) = 1/B, whichever partition it is
in, and however many keys are available there or elsewhere. So a draw that isn't void serves each available key with
the same probability, and whether another draw is made depends on counts only. All that is required is that B(p) is
not too small.

B(p) is the number of keys in the partition, blocked or not (PartitionPoller.totals). That changes slowly, and never by
acquire, unblock or a release, at whichever server. The exception: keys that another server generated since the last
poll, a second ago at most, may not be counted yet; until then a key of their partition may have a smaller chance.

A draw is void with probability blocked / all. So if most keys seem to be blocked, and after some void draws, all
partitions are polled, and B(p) is the number of keys available there at that moment: then a draw is void only if one of
those was served to another caller since. With one partition none of this is needed: its script draws among the
available keys.
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

_MAX_ROUNDS = 8  # of draws, after which an acquire gives up: other callers were faster each time
_MAX_ROUNDS_BY_TOTALS = 4  # of these by `totals`, after which all partitions are polled
_MIN_SHARE = 0.25  # of available keys from which draws among all keys are worthwhile


class PartitionSampler:
    """See the module."""

    def __init__(self, partitions: Partitions, poller: PartitionPoller, rules: PoolRules) -> None:
        self._partitions = partitions
        self._available = partitions.available
        self._poller = poller
        self._block_us = round(rules.block_seconds * 1e6)
        self._tick = 0  # the highest tick of a lease (acquire.lua) that this server knows
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._ends: list[int] = []  # cumulative totals of the partitions
        self._ends_version = -1  # the `totals_version` that they were computed from

    async def take(self, owner: str | None, count: int) -> list[Lease]:
        """Acquire up to `count` keys, in order of their leases. Raises StorageUnavailable.

        O(count * log n), mostly in one round trip; if many keys are blocked, a few of O(partitions) each.
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
        except BaseException:  # the caller hung up, or a partition can't be reached
            for call in calls:
                self._take_back(call)
            for lease in taken:
                self.give_back(lease)
            raise
        if len(taken) > 1:
            taken.sort(key=attrgetter("lease"))
        return taken

    async def take_in_order(self, owners: Sequence[str | None], poll: bool) -> list[Lease | OutcomeUnknown]:
        """Acquire a key for each owner, in order. Returns the outcomes, fewer than owners if keys ran out. Without
        `poll`, calls only partitions known to have keys. Raises StorageUnavailable if nobody was served.

        Partitions are called one after the other, and each serves the owners in order, so that every lease has its
        holder's name from the beginning. An acquire that was sent but not answered isn't repeated, as it may have been
        executed. O(owners * log n), in a round trip for each partition that serves.
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
        """Serve owners from one partition. Returns whether overdue keys were in the way, so that a repeat may help."""
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
        """Whether draws among all keys will probably serve `missing` keys, going by the latest replies."""
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
        """Poll all partitions until a key is available or nothing is overdue. Returns whether a key is available.

        While some partitions are unreachable, the others serve what they have. If that is nothing, whether a key is
        available isn't known: raises StorageUnavailable.
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
        """Draw `count` times among all keys. Returns how many draws fell on each partition."""
        ends = self._ends
        if count == 1:
            return {bisect(ends, self._random.random() * ends[-1]): 1}
        return Counter(self._random.choices(range(len(ends)), cum_weights=ends, k=count))

    def _among_available(self, count: int) -> Mapping[int, int]:
        """The same among the available keys, with at most one draw for each."""
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
        """Give back the keys that a call acquires or has acquired."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._give_back_leases(call.result())

    def _give_back_leases(self, reply: Reply) -> None:
        for text, _, lease, _ in reply[2:]:
            self._free(text.decode(), lease)

    def give_back(self, lease: Lease) -> None:
        """Free a key whose lease was not delivered."""
        self._free(lease.key, lease.lease)

    def _free(self, text: str, lease: int) -> None:
        self._partitions.call(self._partitions.of(text), "unblock", (text, lease))
