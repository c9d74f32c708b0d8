"""The embedded engine's calls for operators: keys from elsewhere, and what is decided about a key by hand.

See the Engine protocol.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from keypool.core.answers import Identity, Imported, ImportedKey, KeyPatch, NewKey, Ref, Revealed, Row
from keypool.core.errors import PoolError, UnknownKey
from keypool.core.events import HOLDER, Change, Origin
from keypool.core.keys import Key
from keypool.engine.shapes import data_of, expires_in, less_or_none
from keypool.engine.steps import SLICE_SECONDS, WORDS, Steps

_ID = re.compile(r"id:([1-9][0-9]{0,18})", re.ASCII)


class OperatorCalls(Steps):
    """See the module."""

    # -- keys from elsewhere

    async def import_key(self, item: NewKey, expire: bool, origin: Origin) -> ImportedKey:
        """Add a key from elsewhere, unless the pool has it. O(log n)."""
        self._require_importing(expire)
        now = self.now()
        try:
            key = self._known(item.secret, now)
            if key is None:
                now = await self._make_room(item.seats or 1)
                key = self._known(item.secret, now)
            existed = key is not None
            key = key or self.pool.import_key(item, now, origin, self._reserved)
            answer = ImportedKey(
                key.id,
                key.state,
                key.hint,
                key.details.name,
                expires_in(key, now),
                existed,
                self.pool.ids_of(key, now),
            )
        finally:
            self._waiters.serve(now)
            await self._all_kept()
        answer.expires_in = less_or_none(answer.expires_in, self._delay(now))
        return answer

    async def import_many(
        self, items: Sequence[NewKey | Imported], update: bool, expire: bool, origin: Origin
    ) -> list[Imported]:
        """Add keys from elsewhere, one by one; none if the pool has no room for all that are new. O(items · log n)."""
        self._require_importing(expire)
        reserved = await self._reserve(items)
        seen: dict[str, list[int]] = {}

        def add(item: NewKey | Imported, now: float) -> Imported:
            nonlocal reserved
            self._require_serving()  # if not, those that were added are purged with the others
            if isinstance(item, Imported):
                return item
            if item.secret in seen:
                return Imported("duplicate", seen[item.secret][0], ids=seen[item.secret])
            try:
                key = self._known(item.secret, now)
                status = "updated" if update else "existed"
                if key is None:
                    status = "created"
                    own = min(reserved, item.seats or 1)
                    key = self.pool.import_key(item, now, origin, self._reserved - own)
                    reserved -= own
                    self._reserved -= own
                elif update:
                    key = self.pool.update(key, item.patch, now, origin, self._reserved)
            except PoolError as error:
                return Imported("failed", code=error.code, detail=error.detail)
            ids = seen[item.secret] = self.pool.ids_of(key, now)
            return Imported(status, ids[0], ids=ids)

        try:
            return await self._in_slices(items, add)
        finally:
            self._reserved -= reserved

    def _require_importing(self, expire: bool) -> None:
        """Raise the error of an import at this time."""
        self.journal.require()
        self._require_serving()
        self.pool.require_lasting(expire)

    def _known(self, secret: str, now: float) -> Key | None:
        """The key with this text, by which the holder of another one may still name that. O(1)."""
        key = self._find(secret, now)
        return key if key is not None and key.text == secret else None

    async def _reserve(self, items: Sequence[NewKey | Imported]) -> int:
        """Reserve room for the keys that the pool doesn't have. Returns their number. Raises PoolFull."""
        new: dict[str, int] = {}
        until = self.now() + SLICE_SECONDS
        for item in items:
            if (now := self.now()) > until:
                until = await self._pause()
                now = self.now()
            if isinstance(item, NewKey) and self._known(item.secret, now) is None:
                new.setdefault(item.secret, item.seats or 1)
        wanted = sum(new.values())
        try:
            await self._make_room(wanted)
        except PoolError:
            await self._all_kept()
            raise
        self._reserved += wanted
        return wanted

    async def update(self, ref: Ref, patch: KeyPatch, origin: Origin) -> Row:
        """Change name, labels, data, pace or the number of seats of a key. O(seats · log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        try:
            if patch.seats is not None:
                self._require_serving()
            key = self.pool.update(key, patch, now, origin, self._reserved)
        except PoolError:
            await self._all_kept()
            raise
        return await self._kept_row(key)

    async def replace(self, ref: Ref, secret: str, origin: Origin) -> Row:
        """Give a key another text. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        try:
            self.pool.replace(key, secret, now, origin)
        except PoolError:
            await self._all_kept()
            raise
        return await self._kept_row(key)

    async def find(self, text: str) -> Row:
        """The row of the key with this text, id, name, or hint. O(log n)."""
        now = self.now()
        key = self._find(text, now)
        if key is None and (written := _ID.fullmatch(text)):
            key = self._find(int(written[1]), now)
        for find in (self.pool.find_name, self.pool.find_hint):
            if key is None:
                with contextlib.suppress(UnknownKey):
                    key = find(text, now)
        if key is None:
            await self._all_kept()
            raise UnknownKey
        return await self._kept_row(key)

    # -- by hand

    async def quarantine(self, ref: Ref, reason: str | None, now: bool, origin: Origin) -> Row:
        """Take a key out of service. O(log n)."""
        self.journal.require()
        key = self._find(ref, self.now()) or await self._raise_missing(ref)
        key = self.pool.quarantine(key, reason, now, self.now(), origin)
        return await self._kept_row(key)

    async def quarantine_many(
        self, refs: Sequence[Ref], reason: str | None, now: bool, origin: Origin
    ) -> list[str]:
        """Take keys out of service, one by one. O(items · log n)."""

        def quarantine(ref: Ref, moment: float) -> str:
            return self._tried(
                ref, moment, lambda key: self.pool.quarantine(key, reason, now, moment, origin)
            )

        return await self._in_slices(refs, quarantine)

    async def restore(self, ref: Ref, origin: Origin) -> Row:
        """Make a cooling or quarantined key available. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        self.pool.restore(key, now, origin)
        return await self._kept_row(key)

    async def restore_many(self, refs: Sequence[Ref], origin: Origin) -> list[str]:
        """Make cooling and quarantined keys available, one by one. O(items · log n)."""

        def restore(ref: Ref, now: float) -> str:
            return self._tried(ref, now, lambda key: self.pool.restore(key, now, origin))

        return await self._in_slices(refs, restore)

    async def reveal(self, ref: Ref, origin: Origin = HOLDER) -> Revealed:
        """The text of a key; the call is recorded as an event. O(1)."""
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        revealed = Revealed(key.id, key.text, key.details.name, data_of(key))
        self.events.append((Change.REVEALED, key, key.owner, key.lease, now, origin))
        self._uncounted += 1
        self._add_rare(Change.REVEALED, key, key.owner, now, origin)
        self._waiters.serve(now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
        return revealed

    async def delete(self, ref: Ref, origin: Origin = HOLDER) -> Identity:
        """Purge a key. O(log n)."""
        self.journal.require()
        now = self.now()
        key = self._find(ref, now) or await self._raise_missing(ref)
        self.pool.delete(key, origin, now)
        if (commit := self.journal.commit_of(key.id)) is not None:
            await commit
        return Identity(key.id, key.hint)

    async def delete_many(self, refs: Sequence[Ref], origin: Origin = HOLDER) -> list[Identity | str]:
        """Purge keys, one by one. O(items · log n)."""

        def delete(ref: Ref, now: float) -> Identity | str:
            key = self._find(ref, now)
            if key is None:
                return WORDS[type(self._missing(ref, now))]
            self.pool.delete(key, origin, now)
            return Identity(key.id, key.hint)

        return await self._in_slices(refs, delete)
