"""Drawing keys: each available key of the pool with the same chance, over partitions, in few round trips.

The technique is rejection sampling. The server knows for each partition p a number of places B(p) that is not
less than the keys available there; a draw chooses one of all places, B in sum, each with the same chance; and
in the script (lua/acquire.lua) the first places of p, as many as keys are available there now, stand for these
keys, one each. If the draw fell on another place it is void, and another draw is made.

Proof that no key is favoured: in one draw, a key of p is served with the chance
B(p)/B * 1/B(p) = 1/B, whichever partition it is in, and however many keys are available there or elsewhere.
So each draw that isn't void serves each available key with the same chance, and which draws are made depends on
counts, never on which key is which. All that is needed is that B(p) is not too small.

B(p) is how many keys the partition has in all, blocked or not (Looks.totals). That changes slowly, and
never by acquire, unblock or a release, whichever server they are made at. The exception: keys that another server
generated since the last look, a second ago at most, may not be counted yet; until then a key of their
partition may have less than its share.

A draw is void with the chance blocked / all. Where most keys seem to be blocked, and after some void draws,
all partitions are looked at, and B(p) is how many keys are available there at that moment: a draw is void only
if one of those was served to another since. With one partition none of this is needed: its script draws
among the keys that are available.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from keypool.core.answers import Lease
from keypool.core.errors import StorageUnavailable
from keypool.core.rules import PoolRules
from keypool.engine.valkey.link import Reply
from keypool.engine.valkey.nodes import Answer, OutcomeUnknown, Word
from keypool.engine.valkey.partitions import Partitions, all_of
from keypool.engine.valkey.poller import Looks

_ROUNDS = 8  # of draws, before an acquire that always comes too late gives up
_ROUNDS_BY_TOTALS = 4  # of these, before all partitions are looked at
_WORTH = 0.25  # share of the keys that must be available for draws among all keys to be worth it


class Draws:
    """See the module."""

    def __init__(self, partitions: Partitions, looks: Looks, rules: PoolRules) -> None:
        self._partitions = partitions
        self._looks = looks
        self._block_us = round(rules.block_seconds * 1e6)
        self._tick = 0  # of the latest lease that this server knows of
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._ends: list[int] = []  # of each partition's places among all
        self._ends_as_of = -1

    async def take(self, owner: str | None, count: int) -> list[Lease]:
        """Acquire up to `count` keys, in order of their leases; none only if none was available.

        O(count * log n), in one round trip mostly; in a few, and O(partitions) each, if many keys are blocked.
        """
        taken: list[Lease] = []
        calls: list[Answer] = []
        rounds = 0
        try:
            while len(taken) < count and rounds < _ROUNDS:
                missing = count - len(taken)
                if self._worth_drawing(missing, rounds):
                    places, takes = self._looks.totals, False
                    plan = self._among_all(missing)
                elif await self._some_available(rounds):
                    places, takes = self._partitions.available, True
                    plan = self._among_available(missing)
                else:
                    break
                calls = [
                    self._ask(partition, places[partition], takes, [owner] * draws)
                    for partition, draws in plan.items()
                ]
                await all_of(calls)
                again = False
                for partition, call in zip(plan, calls, strict=True):
                    taken += self._leases_in(partition, call)
                    again = again or call.result()[1] == 1
                calls = []
                rounds += not again
        except BaseException:  # the caller is gone, or a partition can't be reached
            for call in calls:
                self._take_back(call)
            for lease in taken:
                self.give_back(lease)
            raise
        if len(taken) > 1:
            taken.sort(key=_number)
        return taken

    async def take_in_order(self, owners: Sequence[str | None], sure: bool) -> list[Lease | OutcomeUnknown]:
        """What becomes of the first of these owners, in their order; of nothing for those beyond, since no more
        keys were available. If not `sure`, only where keys are known to be.

        Partitions are asked one after the other, and each serves the owners in order, so that every lease is in
        the name of its holder from the beginning. An owner whose key was asked for and not answered isn't asked
        for again, as it may have been served. O(owners * log n), in a round trip for each partition that serves.
        """
        done: list[Lease | OutcomeUnknown] = []
        rounds = 0
        try:
            while len(done) < len(owners) and rounds < _ROUNDS:
                if (rounds or not any(self._partitions.available)) and not (sure and await self._look()):
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
        """Serve the first of these owners there; whether keys were overdue, so that asking again may help."""
        call = self._ask(partition, self._partitions.available[partition], True, owners)
        try:
            again: bool = (await call)[1] == 1
        except OutcomeUnknown as error:
            done += [error] * len(owners)
            raise
        except BaseException:
            self._take_back(call)
            raise
        done += self._leases_in(partition, call)
        return again

    # -- which partitions to draw from

    def _worth_drawing(self, missing: int, rounds: int) -> bool:
        """Whether draws among all keys are likely to serve so many, by what partitions last said."""
        if self._partitions.count == 1 or rounds >= _ROUNDS_BY_TOTALS:
            return False
        in_trouble = self._partitions.nodes.in_trouble
        if in_trouble or self._ends_as_of != self._looks.totals_changed:
            self._ends_as_of = -1 if in_trouble else self._looks.totals_changed
            # Where a partition can't be reached, keys are drawn from the others.
            unreachable = self._partitions.nodes.unreachable if in_trouble else ()
            totals = enumerate(self._looks.totals)
            self._ends = list(accumulate(0 if number in unreachable else total for number, total in totals))
        available = sum(self._partitions.available)
        if available < _WORTH * self._ends[-1]:
            return False
        return 0 < available <= self._ends[-1] and (missing == 1 or missing <= _WORTH * available)

    async def _some_available(self, rounds: int) -> bool:
        """Whether some key is available, now that all partitions were looked at. The only one says it itself."""
        if self._partitions.count == 1 and not rounds and self._partitions.available[0]:
            return True
        return await self._look()

    async def _look(self) -> bool:
        """Look at all partitions, until a key is available or nothing is overdue; whether one is."""
        look = await self._looks.look()
        while not look.available and look.crowded:
            look = await self._looks.look()
        return look.available > 0

    def _among_all(self, count: int) -> Counter[int] | dict[int, int]:
        """How many draws fall on each partition, among all keys."""
        ends = self._ends
        if count == 1:
            return {bisect(ends, self._random.random() * ends[-1]): 1}
        return Counter(self._random.choices(range(len(ends)), cum_weights=ends, k=count))

    def _among_available(self, count: int) -> Counter[int] | dict[int, int]:
        """The same among the keys that are available, no more draws than there are."""
        available = self._partitions.available
        if len(available) == 1:
            return {0: min(count, available[0])} if available[0] else {}
        most = min(count, sum(available))
        return Counter(self._random.sample(range(len(available)), counts=available, k=most) if most else ())

    # -- asking

    def _ask(self, partition: int, places: int, takes: bool, owners: Sequence[str | None]) -> Answer:
        facts, draw = self._partitions.facts, self._random.random
        if facts.partitions == 1:
            places = 0
        words: list[Word] = [places, "1" if takes else "", self._tick, facts.born, facts.base_tick]
        words += [facts.partitions, partition, self._block_us]
        for owner in owners:
            words += [owner or "", draw()]
        return self._partitions.nodes.call(partition, "acquire", words, self._return_unheard)

    def _leases_in(self, partition: int, call: Answer) -> list[Lease]:
        """What a partition answered to `_ask`."""
        reply = call.result()
        self._partitions.note(partition, reply[0])
        self._tick = max(self._tick, reply[2])
        left = self._partitions.left
        return [
            Lease(id, text.decode(), lease, left(self._block_us, call.sent_at), left(expires, call.sent_at))
            for text, id, lease, expires in reply[3:]
        ]

    def _take_back(self, call: Answer) -> None:
        """Nobody wants the answer any more, whether or not it has come."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._return_unheard(call.result())

    def _return_unheard(self, reply: Reply) -> None:
        for text, _, lease, _ in reply[3:]:
            self._free(text.decode(), lease)

    def give_back(self, lease: Lease) -> None:
        """Nobody will hear of this lease."""
        self._free(lease.key, lease.lease)

    def _free(self, text: str, lease: int) -> None:
        self._partitions.in_background(self._partitions.of(text), "unblock", text, lease)


def _number(lease: Lease) -> int:
    return lease.lease
