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
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import attrgetter

from msgspec import Raw

from keypool.core.answers import Lease
from keypool.core.errors import StorageUnavailable
from keypool.core.handles import Handles
from keypool.engine.valkey.attempts import KNOWN, Attempts, RepeatedLease
from keypool.engine.valkey.calls import NEVER_US, OutcomeUnknown, ScriptCall, all_of, expires_in, seconds_left
from keypool.engine.valkey.link import Reply, Word
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.poller import EXPIRING, PartitionPoller
from keypool.engine.valkey.rekeying import seal_leased
from keypool.engine.valkey.shares import Purse, Shares
from keypool.engine.valkey.vault import details_in
from keypool.engine.waiters import Request

_MAX_ROUNDS = 8  # of draws, after which an acquire is content with what it has: others were faster each time
_MAX_ROUNDS_BY_TOTALS = 4  # of these by `totals`, after which all partitions are polled
_DETAILED = 3  # words behind the five of each lease, if there is more to say than whether it is repeated
_RELEASE, _REPEATED = 4, 5  # of a lease in a reply (lua/leases.lua)
_Spent = tuple[Purse, str]  # a reservation, and where it is from
_MIN_SHARE = 0.25  # of available keys from which draws among all keys are worthwhile


class PartitionSampler:
    """See the module. `server` is this server's name in Valkey."""

    def __init__(
        self,
        partitions: Partitions,
        poller: PartitionPoller,
        handles: Handles,
        server: str,
        *,
        shares: Shares,
    ) -> None:
        self.attempts = Attempts(partitions, server) if partitions.count > 1 else None
        self._partitions = partitions
        self._available = partitions.available
        self._poller = poller
        self._handles = handles
        self._shares = shares
        self._spending: dict[
            ScriptCall, list[_Spent | None]
        ] = {}  # what the calls under way spend, by key wanted
        self._tick = 0  # the highest tick of a lease (acquire.lua) that this server knows
        self._random = random.Random()  # noqa: S311 - which free key is served is no secret
        self._ends: list[int] = []  # cumulative totals of the partitions
        self._ends_version = -1  # the `totals_version` that they were computed from

    async def take(self, request: Request, count: int) -> list[Lease]:
        """Acquire up to `count` keys, in order of their leases; or those that the attempt holds already.

        O(count * log n), mostly in one round trip, two with an attempt and several partitions; if many keys are
        blocked, a few of O(partitions) each. Raises StorageUnavailable.
        """
        attempt = request.attempt
        if attempt is None or self.attempts is None:
            taken = await self.take_more(request, count, "repeat")
            # Without an available key no script was called that would have found what the attempt holds.
            return taken if taken or attempt is None else await self.held(attempt)
        claim, block = self.attempts.new_claim(), self.block_of(request)
        held_for: float | None = block
        try:
            leases: list[Lease] = []
            if await self.attempts.claim_in_turn(attempt, claim, block) == KNOWN:
                leases = await self.held(attempt)
            leases = leases or await self.take_more(request, count)
            held_for = max((lease.release_in for lease in leases), default=None)
            return leases
        finally:
            self.attempts.end(attempt, claim, held_for)

    async def take_more(self, request: Request, count: int, form: str = "attempt") -> list[Lease]:
        """Acquire up to `count` keys, whether or not the attempt holds leases; unless `form` is "repeat"."""
        taken: list[Lease] = []
        calls: list[ScriptCall] = []
        rounds = 0
        try:
            # Without any key it goes on until no partition has one: in each round others were faster.
            while len(taken) < count and (rounds < _MAX_ROUNDS or not taken):
                plan = await self._plan(count - len(taken), rounds)
                if plan is None:
                    break
                calls = [
                    self._acquire(partition, bound, takes, [request] * draws, form)
                    for partition, (draws, bound, takes) in plan.items()
                ]
                again = 0
                for call, reply in zip(calls, await all_of(calls), strict=True):
                    taken += self._leases_in(call)
                    again |= reply[0]
                calls = []
                rounds += not again
                if taken and form == "repeat":
                    if isinstance(taken[0], RepeatedLease):
                        break
                    form = "attempt"  # what it holds by now is its own
        except BaseException:  # the caller hung up, or a partition can't be reached
            for call in calls:
                self._settle(call)
                self._take_back(call)
            for lease in taken:
                self.give_back(lease)
            raise
        if len(taken) > 1:
            taken.sort(key=attrgetter("lease"))
        return taken

    async def held(self, attempt: bytes) -> list[Lease]:
        """The leases of an attempt that are still held, in order. O(log n + leases), in all partitions if it may be."""
        if self.attempts is not None and not await self.attempts.is_known(attempt):
            return []
        calls = [
            self._partitions.call(number, "held", (attempt,)) for number in range(self._partitions.count)
        ]
        replies = await all_of(calls)
        leases = [
            lease
            for call, found in zip(calls, replies, strict=True)
            for lease in self._read(found, call.age())
        ]
        return sorted(leases, key=attrgetter("lease"))

    def block_of(self, request: Request) -> float:
        """Seconds for which a request blocks a key."""
        seconds = request.block_seconds
        return self._partitions.rules.block_seconds if seconds is None else seconds

    async def take_in_order(self, requests: Sequence[Request], poll: bool) -> list[Lease | OutcomeUnknown]:
        """Acquire a key for each request, in order; or the one that its attempt holds, in a pool with one partition.

        Returns the outcomes, fewer than requests if keys ran out. Without `poll`, calls only partitions known to have
        keys. Partitions are called one after the other, and each serves the requests in order, so that every lease has
        its holder's name from the beginning. An acquire that was sent but not answered isn't repeated, as it may have
        been executed. O(requests * log n), in a round trip for each partition that serves. Raises StorageUnavailable if
        nobody was served.
        """
        done: list[Lease | OutcomeUnknown] = []
        rounds = 0
        try:
            while len(done) < len(requests) and (rounds < _MAX_ROUNDS or poll):
                if (rounds or not any(self._available)) and not (poll and await self.poll()):
                    break
                again = False
                for partition, draws in self._among_available(len(requests) - len(done)).items():
                    some = requests[len(done) : len(done) + draws]
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
        self, partition: int, requests: Sequence[Request], done: list[Lease | OutcomeUnknown]
    ) -> bool:
        """Serve requests from one partition. Returns whether overdue keys were in the way: a repeat may help then."""
        call = self._acquire(partition, self._available[partition], True, requests, "repeat")
        try:
            again: bool = (await call)[0] == 1
        except OutcomeUnknown as error:
            self._settle(call)
            done += [error] * len(requests)
            raise
        except BaseException:
            self._settle(call)
            self._take_back(call)
            raise
        done += self._leases_in(call)
        return again

    # -- which partitions to draw from

    async def _plan(self, missing: int, rounds: int) -> dict[int, tuple[int, int, bool]] | None:
        """For each partition to call: how many draws, among how many places, and whether each draw takes one away.

        None if no partition has a key.
        """
        if self._is_worthwhile(missing, rounds):
            totals = self._poller.totals
            return {
                number: (draws, totals[number], False) for number, draws in self._among_all(missing).items()
            }
        # The only partition need not be polled: its script finds out whether it has keys.
        known = self._partitions.count == 1 and not rounds and self._available[0]
        if not known and not await self.poll():
            return None
        available = self._available
        found = self._among_available(missing)
        return {number: (draws, available[number], True) for number, draws in found.items()}

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

    async def poll(self) -> bool:
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

    def _acquire(
        self, partition: int, bound: int, takes: bool, requests: Sequence[Request], form: str
    ) -> ScriptCall:
        facts, chance = self._partitions.facts, self._random.random
        if facts.partitions == 1:
            bound = 0
        words: list[Word] = [bound, "1" if takes else "", self._tick, facts.born, facts.base_tick]
        words += [facts.partitions, partition, self._partitions.block_us]
        if all(
            request.attempt is None and request.block_seconds is None and request.client is None
            for request in requests
        ):
            words.append("owner")
            for request in requests:
                words += [request.owner or "", chance()]
        else:
            words.append(form)
            spending: list[_Spent | None] = []
            for request in requests:
                block_us = round(self.block_of(request) * 1e6)
                client = "" if request.client is None else request.client.name
                spent = None
                if request.purse is not None:
                    reservation = request.purse.take()
                    spent = request.purse, reservation
                    client = f"{client}\0{reservation}"
                spending.append(spent)
                words += [request.owner or "", chance(), block_us, request.attempt or b"", client]
                self._poller.expect(partition, block_us / 1e6)
            if any(spending):
                call = self._partitions.call(partition, "acquire", words, partial(self._orphaned, spending))
                self._spending[call] = spending
                return call
        return self._partitions.call(partition, "acquire", words, self._give_back_leases)

    def _leases_in(self, call: ScriptCall) -> list[Lease]:
        _, tick, *leases = call.result()
        self._tick = max(self._tick, tick)
        if self._spending:
            self._settle(call)
        if (vault := self._partitions.vault) is not None and vault.may_have_clear:
            seal_leased(self._partitions, vault, call.partition, leases)
        return self._read(leases, call.age())

    def _read(self, leases: Iterable[Sequence[Reply]], age: float) -> list[Lease]:
        """Leases as acquire.lua and held.lua reply them."""
        make = self._handles.make
        return [
            (RepeatedLease if repeated and repeated[0] else Lease)(
                id,
                text.decode(),
                lease,
                make(id, lease),
                seconds_left(release, age),
                seconds_left(expires, age) if expires < NEVER_US else None,
            )
            if len(repeated) < _DETAILED
            else self._detailed((text, id, lease, expires, release, *repeated), age)
            for text, id, lease, expires, release, *repeated in leases
        ]

    def _detailed(self, lease: Sequence[Reply], age: float) -> Lease:
        """A lease of a key that is sealed, or about which an operator wrote something."""
        text, id, number, expires, release, is_repeated, info, is_sealed = lease
        details = details_in(info)
        data = details.data
        if is_sealed:
            assert self._partitions.vault is not None
            clear, data = self._partitions.vault.open(text, id)
        else:
            clear = text.decode()
        return (RepeatedLease if is_repeated else Lease)(
            id,
            clear,
            number,
            self._handles.make(id, number),
            seconds_left(release, age),
            expires_in(expires, age),
            details.name,
            None if data is None else Raw(data),
        )

    # -- reservations in shares

    def _settle(self, call: ScriptCall) -> None:
        """Keep the reservations that a call has spent, and put the others back. Those of a call that is under way, or
        may have been executed, lapse by themselves, or are settled with its reply.
        """
        spending = self._spending.pop(call, None)
        if spending is None or not call.done() or call.cancelled():
            return
        error = call.exception()
        if error is None:
            self._put_back(spending, call.result()[2:])
        elif not isinstance(error, OutcomeUnknown):
            self._put_back(spending, [])

    def _put_back(self, spending: list[_Spent | None], leases: Sequence[Reply]) -> None:
        for place, spent in enumerate(spending):
            if spent is None:
                continue
            purse, reservation = spent
            lease = leases[place] if place < len(leases) else None
            if lease is None or (len(lease) > _REPEATED and lease[_REPEATED]):
                purse.reservations.append(reservation)
            else:
                self._shares.keep(purse.client, reservation, lease[_RELEASE] / 1e6)

    def _orphaned(self, spending: list[_Spent | None], reply: Reply) -> None:
        """Give back keys and reservations, as nobody waits for the reply."""
        self._give_back_leases(reply)
        self._put_back(spending, reply[2:])
        for spent in spending:
            if spent is not None:
                self._shares.give_back(spent[0])

    def _take_back(self, call: ScriptCall) -> None:
        """Give back the keys that a call acquires or has acquired."""
        if not call.cancel() and not call.cancelled() and call.exception() is None:
            self._give_back_leases(call.result())

    def _give_back_leases(self, reply: Reply) -> None:
        for lease in self._read(reply[2:], 0.0):
            self.give_back(lease)

    def give_back(self, lease: Lease) -> None:
        """Free a key whose lease was not delivered, unless its attempt had or has got it by another call."""
        if isinstance(lease, RepeatedLease):
            return
        # Partitions in which the key isn't don't know its id.
        for home in self._partitions.of_id(lease.id):
            self._partitions.call(home, "unblock", ("holder", "", b"\xff%d" % lease.id, lease.lease, "-", 1))
