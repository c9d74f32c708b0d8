"""The partitions of a pool: which one a key stands in, what they are asked, and how many keys each has to give."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keypool.core.answers import Ref
from keypool.core.errors import UnknownKey
from keypool.engine.valkey.link import Reply
from keypool.engine.valkey.nodes import Answer, Nodes, Word

_TOO_FEW_TO_TELL = 0.005  # seconds: as early as a release may be


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What `{POOL}:pool` says: see valkey.py."""

    partitions: int
    born: int
    base_tick: int
    base_id: int


class Partitions:
    """See the module. `available` is how many keys each had to give when it last answered."""

    def __init__(self, nodes: Nodes, facts: PoolFacts) -> None:
        self.nodes = nodes
        self.facts = facts
        self.count = facts.partitions
        self.available = [0] * self.count
        self.on_available: Callable[[], None] = lambda: None
        """Called when a partition answers that it has keys to give."""
        self._loop = asyncio.get_running_loop()
        nodes.on_trouble = self._unreachable

    def of(self, text: str) -> int:
        """The partition of a key."""
        return zlib.crc32(text.encode("utf-8", "surrogatepass")) % self.count

    # -- asking; all raise StorageUnavailable

    async def call(self, partition: int, script: str, *arguments: Word) -> Reply:
        """A script's answer. O(1) here."""
        reply = await self.nodes.call(partition, script, arguments)
        self.note(partition, reply[0])
        return reply

    async def all(self, script: str, *arguments: Word) -> list[Reply]:
        """The answers of all partitions to the same call, in one go."""
        replies = await all_of(
            [self.nodes.call(partition, script, arguments) for partition in range(self.count)]
        )
        for partition, reply in enumerate(replies):
            self.note(partition, reply[0])
        return replies

    async def each(
        self,
        script: str,
        items: Sequence[tuple[int, Word] | tuple[int, Word, Word]],
        before: Callable[[int], Sequence[Word]] = lambda partition: (),
    ) -> list[Reply]:
        """What a script says of each item (partition, words), one call a partition. Their order is kept."""
        if len(items) == 1:
            partition, *words = items[0]
            reply = await self.call(partition, script, *before(partition), *words)
            return [reply[1]]
        places: dict[int, list[int]] = {}
        arguments: dict[int, list[Word]] = {}
        for place, (partition, *words) in enumerate(items):
            if partition not in places:
                places[partition], arguments[partition] = [], list(before(partition))
            places[partition].append(place)
            arguments[partition] += words
        calls = [self.nodes.call(partition, script, words) for partition, words in arguments.items()]
        answers: list[Reply] = [None] * len(items)
        for (partition, where), reply in zip(places.items(), await all_of(calls), strict=True):
            self.note(partition, reply[0])
            for place, said in zip(where, reply[1:], strict=True):
                answers[place] = said
        return answers

    def in_background(self, partition: int, script: str, *arguments: Word) -> None:
        """A call that nobody waits for; if it fails, a deadline does its work."""

        def done(call: asyncio.Future[Reply]) -> None:
            if not call.cancelled() and call.exception() is None:
                self.note(partition, call.result()[0])

        self.nodes.call(partition, script, arguments).add_done_callback(done)

    def note(self, partition: int, available: int) -> None:
        """So many keys can be acquired there, as it just said; -1 says nothing."""
        if available >= 0:
            self.available[partition] = available
            if available:
                self.on_available()

    def _unreachable(self, partitions: Sequence[int]) -> None:
        """Nothing can be acquired there, so acquires are sent to the others."""
        for partition in partitions:
            self.available[partition] = 0

    # -- texts and ids

    async def text_of(self, ref: Ref) -> str:
        """The text that a key has or would have. Raises UnknownKey."""
        if isinstance(ref, str):
            return ref
        text = (await self.texts_of_ids([ref]))[0]
        if text is None:
            raise UnknownKey
        return text

    async def texts_of(self, refs: Sequence[Ref]) -> list[str | None]:
        """The same for many; None for an id that nobody has."""
        ids = [ref for ref in refs if isinstance(ref, int)]
        found = iter(await self.texts_of_ids(ids)) if ids else iter(())
        return [next(found) if isinstance(ref, int) else ref for ref in refs]

    async def texts_of_ids(self, ids: Sequence[int]) -> list[str | None]:
        """The texts of ids. An id that was moved in may be anywhere: all partitions are asked."""
        if all(id > self.facts.base_id * self.count for id in ids):
            items = [((id - 1) % self.count, id) for id in ids]
            return [None if text is None else text.decode() for text in await self.each("find", items)]
        found = [reply[1:] for reply in await self.all("find", *ids)]
        texts = (
            next((text for text in several if text is not None), None) for several in zip(*found, strict=True)
        )
        return [None if text is None else text.decode() for text in texts]

    # -- lengths of time, as of the answer: or a holder would believe in its key for longer than it has it

    def late(self, sent_at: float) -> float:
        """Seconds by which what a script answered is out of date, if it was sent then: at most so many. 0 if
        they are too few to tell."""
        late = self._loop.time() - sent_at
        return late if late > _TOO_FEW_TO_TELL else 0.0

    def left(self, microseconds: int, sent_at: float) -> float:
        """A length of time in a script's answer, as of now: seconds, rounded."""
        return round(max(0.0, microseconds / 1e6 - self.late(sent_at)), 3)


async def all_of(calls: Sequence[Answer]) -> list[Reply]:
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
