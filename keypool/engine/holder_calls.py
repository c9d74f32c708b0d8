"""The embedded engine's calls about those who hold keys and those who wait for one, and about rare events.

See the Engine protocol.
"""

from __future__ import annotations

from keypool.core.answers import HolderRow, HolderRows, RareEventRow, RareEventRows, WaiterRow, WaiterRows
from keypool.core.cursor import EventQuery, HolderQuery, WaiterQuery, next_of, number_after, position_after
from keypool.core.events import Change, Origin
from keypool.core.keys import moment
from keypool.core.rare_events import NO_HINT, RareEvent
from keypool.engine.steps import SLICE_SECONDS, Steps
from keypool.engine.waiters import Waiter


class HolderCalls(Steps):
    """See the module."""

    async def owners(self, query: HolderQuery) -> HolderRows:
        """Who holds keys. O(log n + page). May be ahead of the disk by the commit in flight."""
        now = self.now()
        page = self.pool.holders(position_after(query.after, "owners"), query.limit, now)
        self._waiters.serve(now)  # with blocks that were found overdue
        rows = [
            HolderRow(each.owner, each.client, each.held, moment(each.acquired_at), each.released)
            for each in page.holders
        ]
        return HolderRows(rows, next_of("owners", page.next))

    async def release_owner(self, owner: str, client: str | None, origin: Origin) -> int:
        """End the leases that an owner holds now, in slices. O(leases · log n)."""
        self.journal.require()
        last, released, lease = self.pool.last_lease, 0, 0
        until = self.now() + SLICE_SECONDS
        try:
            while (key := self.pool.next_held(owner, client, lease)) is not None and key.lease <= last:
                lease = key.lease
                now = self.now()
                if self._find(key.id, now) is key and self._unblock(key, None, now, origin=origin).changed:
                    released += 1
                if now > until:
                    until = await self._pause()
        finally:
            self._waiters.serve(self.now())
            await self._all_kept()
        return released

    async def waiters(self, query: WaiterQuery) -> WaiterRows:
        """Who waits for a key. O(page + log n) for each client with a limited share."""
        found, last = self._waiters.queue.page(number_after(query.after, "waiters"), query.limit)
        rows = [waiter_row_of(waiter, waiter.since) for waiter in found]
        return WaiterRows(rows, next_of("waiters", None if last is None else (last,)))

    async def rare_events(self, query: EventQuery) -> RareEventRows:
        """Rare events, newest first. O(MOST_EVENTS). May be ahead of the disk by the commit in flight."""
        before = number_after(query.after, "events")
        kind = None if query.kind is None else Change(query.kind)
        events, last = self.rare.page(kind, before, query.limit)
        position = None if last is None else (last, 0, 0)
        return RareEventRows([rare_row_of(event) for event in events], next_of("events", position))

    def restore_events(self, events: list[RareEvent]) -> None:
        """Take over the rare events that a journal kept, after the keys. O(events).

        Hints that weren't kept are those of the keys, if they live.
        """
        for event in events:
            key = self.pool.peek(event.id) if event.hint == NO_HINT else None
            if key is not None:
                event.hint = key.hint
        self.rare.load(events)


def waiter_row_of(waiter: Waiter, since: float) -> WaiterRow:
    """A waiter as it is in an answer; it has waited since this moment."""
    client = waiter.request.client
    return WaiterRow(waiter.request.owner, None if client is None else client.name, moment(since))


def rare_row_of(event: RareEvent) -> RareEventRow:
    """A rare event as it is in an answer."""
    return RareEventRow(
        event.event,
        event.id,
        event.hint,
        event.owner,
        event.lease,
        moment(event.at),
        event.by,
        event.actor,
        event.count,
    )
