"""What one pool's engine sees of the journal of the data file: it collects the changes of that pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from keypool.core.errors import StorageUnavailable
from keypool.core.keys import DEAD, Key
from keypool.core.rare_events import RareEvent
from keypool.engine import NOTE
from keypool.engine.durable.past import FileHistory
from keypool.engine.durable.rows import POOL_SHIFT, EventRow, Row, event_row_of, prefix_of, row_of
from keypool.engine.durable.states import Activity
from keypool.engine.journal import Commit, JournaledEngine
from keypool.engine.sealing import Sealer
from keypool.ops.histogram import Histogram

if TYPE_CHECKING:
    from keypool.engine.durable.journal import FileJournal

_IDLE = Activity.IDLE


class PoolJournal:
    """See the protocol `engine.journal.Journal` for the calls.

    `open` are the changed keys since the last batch was sent, `sent` those in the batch in flight, by id; likewise with
    rare events, by number. Only the FileJournal, which made this, replaces them. Leases that have ended with a change
    of a key go with it.
    """

    __slots__ = (
        "open",
        "sent",
        "history",
        "open_events",
        "sent_events",
        "grace",
        "number",
        "engine",
        "require",
        "unknown_outcome",
        "pause",
        "resume",
        "histograms",
        "measures",
        "_file",
        "_purged",
        "_prefix",
        "_sealer",
    )

    def __init__(
        self, file: FileJournal, number: int, engine: JournaledEngine, sealer: Sealer | None
    ) -> None:
        self.number = number
        self.engine = engine
        self.open: dict[int, Key] = {}
        self.sent: dict[int, Key] = {}
        self.history = FileHistory(file, number)
        self.open_events: dict[int, RareEvent] = {}
        self.sent_events: dict[int, RareEvent] = {}
        self.grace: int | None = None  # its end: in the next batch, or in the one in flight
        self._file = file
        self._purged: dict[str, int] = {}  # ids by text of keys whose purge isn't on disk yet
        self._prefix = prefix_of(number)
        self._sealer = sealer
        # Those that concern all pools alike. As attributes, because each change of a key calls `require`.
        self.require: Callable[[], None] = file.require
        self.unknown_outcome: Callable[[], StorageUnavailable] = file.unknown_outcome
        self.pause: Callable[[], None] = file.pause
        self.resume: Callable[[], None] = file.resume
        self.histograms: Callable[[], dict[str, Histogram]] = file.histograms
        self.measures: Callable[[], Mapping[str, float | Mapping[str, float]]] = file.measures

    @property
    def failing(self) -> str | None:
        """The reason why changes can't be kept; None while they can."""
        return self._file.failing

    # -- the engine's calls, see the protocol

    def touch(self, key: Key) -> None:
        """Put a key that was changed or purged into the next batch."""
        self.open[key.id] = key
        if key.expires_deadline == DEAD:
            self._purged[key.text] = key.id
        if self._file.activity is _IDLE:
            self._file.schedule()

    def keep_event(self, event: RareEvent) -> None:
        """Put a rare event that is new or has grown into the next batch."""
        self.open_events[event.number] = event
        if self._file.activity is _IDLE:
            self._file.schedule()

    def note(self, notes: Mapping[str, int | None]) -> Commit:
        """Put notes into the next batch."""
        return self._file.put_numbers({
            self._prefix + NOTE + name: value or 0 for name, value in notes.items()
        })  # fmt: skip

    def commit_of(self, id: int) -> Commit | None:
        """The commit to await before answering about this key."""
        if id in self.open:
            return self._file.next_batch.commit or self._file.open_commit()
        return self._file.sent_batch.commit if id in self.sent else None

    def commit_of_text(self, text: str) -> Commit | None:
        """The commit of the purge of the last key with this text."""
        id = self._purged.get(text)
        return None if id is None else self.commit_of(id)

    def commit_of_all(self) -> Commit | None:
        """The commit to await before answering about the pool as a whole."""
        if self.open:
            return self._file.open_commit()
        return self._file.sent_batch.commit if self.sent else None

    async def close(self) -> None:
        """Close the file if this is the journal of `default`. Raises StorageUnavailable."""
        if not self.number:
            await self._file.close()

    # -- the file's calls

    @property
    def has_open(self) -> bool:
        """Whether anything changed since the last batch was sent. O(1)."""
        return bool(self.open or self.open_events)

    @property
    def has_sent(self) -> bool:
        """Whether anything of the batch in flight is this pool's. O(1)."""
        return bool(self.sent or self.sent_events)

    def begin_batch(self) -> None:
        """Move the open changes into the batch that is about to be sent. O(1)."""
        self.sent, self.open = self.open, {}
        self.sent_events, self.open_events = self.open_events, {}
        self.history.sent, self.history.open = self.history.open, []

    def event_rows(self) -> list[EventRow]:
        """The rows of the rare events that are sent. O(events)."""
        sealed = self._sealer is not None
        return [event_row_of(event, self.number, sealed=sealed) for event in self.sent_events.values()]

    def take(self, keys: Iterator[Key], rows: list[Row], purged: list[int]) -> None:
        """Add the rows of these keys, and the ids of the rows of those that were purged. O(keys)."""
        number, sealer = self.number, self._sealer
        for key in keys:
            if key.expires_deadline == DEAD:
                purged.append(number << POOL_SHIFT | key.id)
            else:
                rows.append(row_of(key, number, sealer))

    def numbers(self) -> dict[str, int]:
        """The pool's numbers as they are kept in the file. `moment` is of all pools, so its name has no prefix."""
        numbers = self.engine.numbers() | self.history.numbers()
        if self.number:
            moment = numbers.pop("moment")
            numbers = {self._prefix + name: value for name, value in numbers.items()}
            numbers["moment"] = moment
        return numbers

    def kept(self) -> int:
        """What was sent is on disk. Returns how many keys that were. O(keys)."""
        sent, self.sent = self.sent, {}
        self.sent_events, self.history.sent = {}, []
        if self._purged:
            for id, key in sent.items():
                if key.expires_deadline == DEAD and self._purged.get(key.text) == id and id not in self.open:
                    del self._purged[key.text]
        return len(sent)

    def not_kept(self) -> None:
        """What was sent may not be on disk: it goes into the next batch. O(keys)."""
        sent, self.sent = self.sent, {}
        self.open = {**sent, **self.open}
        self.history.not_kept()
        self.open_events = {**self.sent_events, **self.open_events}
        self.sent_events = {}
