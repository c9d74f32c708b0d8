"""Kills a server under load, and finds whatever it told that is not so afterwards.

    Workers ask a real server for everything at once ----+
    Crasher kills it, starts it again on the same file   +--> Ledger: who asked what, when; what was told
    examine() looks at all there is, in the quiet -------+       |
                                                                 v
                                                          judge(): sentences, each a broken promise

What was asked has two moments (of `time.monotonic`), before and after, and took effect somewhere between
them; a call that was cut off may have taken effect until the server's death, or never. The judge takes for
certain only what follows from that, whatever order the server did things in, so that everything it says is a
fault of the server's; `tests/test_crash.py` shows that it finds each kind of loss.

Nothing here imports the product. `bench/crash.py` runs the same for longer.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import os
import random
import subprocess
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any, Final

from support import (
    API,
    EARLY,
    LATE,
    ROOT,
    Answer,
    Client,
    ServerProcess,
    Wire,
    clean_environment,
    eventually,
    expect_row,
    hint,
)

LEGACY: Final = API + "/random_api_key/"
DRIFT: Final = 0.02  # of the wall clock, which counts across a restart, from the monotonic one, which judges
COUNTERS: Final = ("generated", "acquired", "unblocked", "deleted", "kept_alive")


# ---------------------------------------------------------------------------------------------- what is known


@dataclass(eq=False, slots=True)
class Span:
    """From the moment that something was asked to the last in which it can have happened."""

    asked: float
    ended: float = math.inf


@dataclass(slots=True)
class Seen:
    """What one answer told of a living key; None where it didn't tell. `lease` is the key's latest, 0 if it
    was never served; `owner` was told if `how` is "row" or "acquire".
    """

    span: Span
    how: str
    expires_in: float | None = None
    blocked: bool | None = None
    lease: int | None = None
    release_in: float | None = None
    owner: str | None = None


@dataclass(eq=False, slots=True)
class Unblock:
    """An unblock that may have freed a key: of any lease, or of one."""

    span: Span
    lease: int | None


@dataclass(slots=True)
class Stale:
    """An unblock that was refused because its lease wasn't the latest."""

    span: Span
    lease: int


@dataclass(eq=False, slots=True)
class Story:
    """All that is known of one key. `made` is None if nobody was told that it was."""

    text: str
    id: int | None = None
    made: Span | None = None
    seen: list[Seen] = field(default_factory=list)
    gone: list[Span] = field(default_factory=list)
    deletes: list[Span] = field(default_factory=list)
    keepalives: list[Span] = field(default_factory=list)
    unblocks: list[Unblock] = field(default_factory=list)
    stale: list[Stale] = field(default_factory=list)

    def __str__(self) -> str:
        return f"key {'of unknown id' if self.id is None else f'id:{self.id}'} {hint(self.text)}"


class Attempt:
    """One thing asked for that counts in stats, until it is known what became of it."""

    def __init__(self, ledger: Ledger, span: Span, counter: str, count: int) -> None:
        self.span = span
        self._ledger = ledger
        self._counter = counter
        self._count = count
        ledger.maybe[counter] += count

    def settle(self, done: int, perhaps: int = 0) -> None:
        """So many were done for certain, and so many more perhaps."""
        with self._ledger.lock:
            self._ledger.maybe[self._counter] += perhaps - self._count
            self._ledger.sure[self._counter] += done


class Ledger:
    """Everything that was asked of one data file's servers, and what they told. Threads may share it."""

    def __init__(
        self,
        block_seconds: float,
        keepalive_seconds: float,
        *,
        told_short: bool = False,
        pool: str | None = None,
    ) -> None:
        """`pool` is the name of the pool, None for `default` as the first paths name it.

        `told_short`: lengths of time are reckoned from a server that is asked over a network, and so may be
        told shorter than they are by as long as the answer took. Never longer.
        """
        self.pool = pool
        self.base = API if pool is None else f"{API}/pools/{pool}"
        self.told_short = told_short
        self.block_seconds = block_seconds
        self.keepalive_seconds = keepalive_seconds
        self.stories: dict[str, Story] = {}
        self.living: dict[str, None] = {}  # texts of keys that nobody was told are gone
        self.sure: Counter[str] = Counter()
        self.maybe: Counter[str] = Counter()
        self.unknown_makes: list[Span] = []
        self.outages: list[Span] = []
        """Of storage, each over before its end, which may be as late as the server's: keys live for half a keepalive
        from then on.
        """
        self.told_stats: list[tuple[dict[str, Any], Counter[str], Counter[str], bool]] = []
        self.answers = 0
        self.lock = threading.RLock()
        self._texts: dict[int, str] = {}
        self._hints: dict[str, str] = {}
        self._open: list[Span] = []
        self.made_twice: list[str] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Ledger:
        raise NotImplementedError("a ledger has a lock: copy it by pickle")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()

    # ---- asking

    def asks(self, counter: str = "", count: int = 1) -> Attempt:
        """Something is about to be asked."""
        with self.lock:
            span = Span(time.monotonic())
            self._open.append(span)
            return Attempt(self, span, counter, count)

    def died(self, at: float) -> None:
        """The server is dead: what it hasn't done by now, it never did."""
        with self.lock:
            for span in self._open:
                span.ended = min(span.ended, at)
            self._open.clear()

    # ---- told

    def know(self, text: str, id: int | None = None) -> Story:
        """The story of a key, begun if it is new."""
        story = self.stories.get(text)
        if story is None:
            story = self.stories[text] = Story(text)
            self._hints[hint(text)] = text
            self.living[text] = None
        if id is not None:
            known = self._texts.setdefault(id, text)
            if known != text or story.id not in (None, id):
                self.made_twice.append(f"id:{id} was given to {hint(known)} and to {hint(text)}")
            story.id = id
        return story

    def find(self, row: Mapping[str, Any]) -> Story | None:
        """Whose story a row of a list belongs to; None for a key that nobody was told the text of."""
        text = self._texts.get(row["id"]) or self._hints.get(row["hint"])
        return None if text is None else self.know(text, row["id"])

    def made(self, span: Span, key: Mapping[str, Any]) -> None:
        """A key was generated, as the answer tells it."""
        with self.lock:
            story = self.know(key["key"], key.get("id"))
            if story.made is not None:
                self.made_twice.append(f"the text {hint(story.text)} was generated twice")
            story.made = span
            story.seen.append(Seen(span, "generate", key.get("expires_in")))

    def saw(self, text: str, seen: Seen, id: int | None = None) -> None:
        """An answer told of a living key."""
        with self.lock:
            self.know(text, id).seen.append(seen)

    def leased(self, span: Span, key: Mapping[str, Any], owner: str | None) -> None:
        """A key was served."""
        text = key.get("key") or key["api_key"]
        release_in = key.get("release_in")
        seen = Seen(span, "acquire", key.get("expires_in"), True, key.get("lease"), release_in, owner)
        self.saw(text, seen, key.get("id"))

    def saw_row(self, span: Span, row: Mapping[str, Any], story: Story) -> None:
        """A row of a list or of GET."""
        seen = Seen(span, "row", row["expires_in"], row["state"] == "blocked", row["lease"] or 0)
        seen.release_in, seen.owner = row["release_in"], row["owner"]
        self.saw(story.text, seen, row["id"])

    def lost(self, text: str, span: Span) -> None:
        """An answer told that a key isn't there."""
        with self.lock:
            self.know(text).gone.append(span)
            self.living.pop(text, None)

    def stats(self, told: dict[str, Any], *, quiet: bool) -> None:
        """The counters; `quiet` if nothing else was being asked."""
        with self.lock:
            self.told_stats.append((told, Counter(self.sure), Counter(self.maybe), quiet))

    def pick(self, random: random.Random, dead: float = 0.0) -> Story | None:
        """Some living key, or with this chance one that is gone."""
        with self.lock:
            if self.stories and random.random() < dead:
                return random.choice(list(self.stories.values()))
            return self.stories[random.choice(list(self.living))] if self.living else None


# -------------------------------------------------------------------------------------------------- the judge


class Floor:
    """Numbers that only grow, each told at a moment: which was the largest told by another?"""

    def __init__(self, told: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(told)
        self._moments = [moment for moment, _ in ordered]
        self._largest = list(itertools.accumulate((value for _, value in ordered), max))

    def by(self, moment: float) -> float:
        """The largest that was told before this moment."""
        place = bisect_left(self._moments, moment)
        return self._largest[place - 1] if place else -math.inf


def judge(ledger: Ledger, *, partitioned: bool = False) -> list[str]:
    """What is wrong, each fault a sentence that begins with its kind; nothing if every promise was kept.

    A `partitioned` pool promises no order of ids, and stats that add up only while nothing is asked.
    """
    faults = [f"made twice: {what}" for what in ledger.made_twice]
    for story in ledger.stories.values():
        faults += [f"{fault} ({story})" for fault in _Life(story, ledger).faults()]
        faults += [f"{fault} ({story})" for fault in _Holding(story, ledger).faults()]
    faults += _leases(ledger)
    faults += [] if partitioned else _ids(ledger)
    unknown = [story for story in ledger.stories.values() if story.made is None]
    if len(unknown) > ledger.maybe["generated"]:
        faults.append(f"made by nobody: {len(unknown)} keys, {ledger.maybe['generated']} possible: {unknown}")
    for told in ledger.told_stats:
        if told[3] or not partitioned:
            faults += _counters(*told)
    return faults


def _nothing(span: Span) -> float:
    return 0.0


def _shortfall(span: Span) -> float:
    """Seconds by which lengths of time in an answer may be told short."""
    return span.ended - span.asked


class _Life:
    """Whether a key lived as long as was promised, and no longer."""

    def __init__(self, story: Story, ledger: Ledger) -> None:
        self._story = story
        self._short = _shortfall if ledger.told_short else _nothing
        self._life = ledger.keepalive_seconds
        self._last_make = max((span.ended for span in ledger.unknown_makes), default=-math.inf)
        self._gone_at = min((span.ended for span in story.gone), default=math.inf)
        promises = [seen for seen in story.seen if seen.expires_in is not None]
        self._promised = Floor(
            (seen.span.ended, seen.span.asked + (seen.expires_in or 0)) for seen in promises
        )
        self._kept = Floor((span.asked, span.ended) for span in story.keepalives)
        self._spared = Floor((span.asked, span.ended) for span in ledger.outages)

    def faults(self) -> Iterator[str]:
        for seen in self._story.seen:
            if seen.span.asked > self._gone_at:
                yield f"came back: told by {seen.how} after it was told to be gone"
            yield from self._expiry(seen)
        if self._story.gone:
            yield from self._loss(min(self._story.gone, key=lambda span: span.ended))

    def _expiry(self, seen: Seen) -> Iterator[str]:
        made = self._last_make if self._story.made is None else self._story.made.ended
        latest = max(made, self._kept.by(seen.span.ended)) + self._life + LATE
        spared = min(self._spared.by(seen.span.ended), seen.span.ended)
        latest = max(latest, spared + self._life / 2 + LATE)
        if seen.span.asked > latest:
            yield f"lived too long: told by {seen.how} {seen.span.asked - latest:.3f} s after the last moment"
        if seen.expires_in is None:
            return
        if seen.span.asked + seen.expires_in > latest:
            yield f"lives too long: expires_in {seen.expires_in} told by {seen.how} is more than possible"
        promised = self._promised.by(seen.span.asked) - LATE - self._short(seen.span)
        if seen.span.ended + seen.expires_in < promised:
            yield f"lost keepalive: expires_in {seen.expires_in} told by {seen.how} is less than promised"

    def _loss(self, gone: Span) -> Iterator[str]:
        """Told to be gone: it must have been deleted or have expired."""
        before = [seen for seen in self._story.seen if seen.span.asked <= gone.ended]
        alive_at = max((seen.span.asked for seen in before), default=-math.inf)
        if any(span.asked <= gone.ended and span.ended >= alive_at for span in self._story.deletes):
            return
        promised = max(
            (seen.span.asked + seen.expires_in for seen in before if seen.expires_in is not None),
            default=-math.inf,
        )
        if gone.ended < promised - EARLY - DRIFT:
            yield f"lost key: gone {promised - gone.ended:.3f} s before it may expire, and nobody deleted it"


class _Holding:
    """Whether a key was held by one at a time, for as long as was promised, and no longer."""

    def __init__(self, story: Story, ledger: Ledger) -> None:
        self._story = story
        self._short = _shortfall if ledger.told_short else _nothing
        self._block = ledger.block_seconds
        told = [seen for seen in story.seen if seen.lease is not None]
        given = {seen.lease for seen in told if seen.how == "acquire"}
        self._latest = Floor(
            [(seen.span.ended, seen.lease or 0) for seen in told]
            + [(stale.span.ended, stale.lease + 1) for stale in story.stale if stale.lease in given]
        )
        self._over = Floor(
            (seen.span.ended, seen.lease if seen.lease is not None else self._latest.by(seen.span.asked))
            for seen in story.seen
            if seen.blocked is False
        )
        self._stated = sorted(
            (seen for seen in story.seen if seen.blocked is not None), key=lambda seen: seen.span.asked
        )
        self._asked = [seen.span.asked for seen in self._stated]

    def faults(self) -> Iterator[str]:
        for seen in self._story.seen:
            if seen.lease is not None:
                yield from self._order(seen)
        yield from self._releases()
        for seen in self._story.seen:
            if seen.how == "acquire":
                yield from self._meanwhile(seen)

    def _order(self, seen: Seen) -> Iterator[str]:
        """The lease told must not be older than what was told before."""
        assert seen.lease is not None
        before = self._latest.by(seen.span.asked)
        if seen.lease < before or (seen.how == "acquire" and seen.lease == before):
            yield f"lease went back: {seen.how} told {seen.lease} after {before:.0f}"
        if seen.blocked and seen.lease <= self._over.by(seen.span.asked):
            yield f"lost unblock: lease {seen.lease} was told to be over, and {seen.how} tells it is on"

    def _releases(self) -> Iterator[str]:
        """A block ends when it was promised to end, whoever tells of it."""
        ends: dict[int, tuple[float, float]] = {}
        for seen in self._stated:
            if seen.lease is None or seen.release_in is None:
                continue
            least, most = ends.get(seen.lease, (-math.inf, math.inf))
            least = max(least, seen.span.asked + seen.release_in)
            most = min(most, seen.span.ended + seen.release_in + self._short(seen.span))
            ends[seen.lease] = least, most
            if least - most > LATE:
                yield f"block moved: lease {seen.lease} is to end at moments {least - most:.3f} s apart"

    def _meanwhile(self, held: Seen) -> Iterator[str]:
        """Nothing may be told that contradicts a lease while it certainly lasts."""
        end = self._certain_end(held)
        first = bisect_right(self._asked, held.span.ended)
        for seen in self._stated[first : bisect_left(self._asked, end)]:
            if seen.span.ended >= end:
                continue
            other = None not in (seen.lease, held.lease) and seen.lease != held.lease
            if seen.how == "acquire" or (seen.blocked and other):
                yield f"held by two: lease {seen.lease} told by {seen.how} while lease {held.lease} lasted"
            elif not seen.blocked:
                yield f"lost acquire: {seen.how} tells it is free while lease {held.lease} lasted"
            elif seen.how == "row" and seen.owner != held.owner:
                yield f"lost owner: {seen.owner!r} in place of {held.owner!r}"
        for stale in self._story.stale:
            if stale.lease == held.lease and stale.span.asked > held.span.ended and stale.span.ended < end:
                yield f"holder refused: lease {held.lease} was called stale while it lasted"

    def _certain_end(self, held: Seen) -> float:
        """Until when nobody can have ended a lease."""
        release_in = self._block if held.release_in is None else held.release_in
        end = held.span.asked + release_in - EARLY - DRIFT
        for unblock in self._story.unblocks:
            if held.lease is not None and unblock.lease not in (None, held.lease):
                continue
            if unblock.span.ended >= held.span.asked:
                end = min(end, max(unblock.span.asked, held.span.asked))
        return end


def _leases(ledger: Ledger) -> Iterator[str]:
    """A lease number belongs to one key and one acquire, and is larger than all that were told before."""
    told = [(seen, story) for story in ledger.stories.values() for seen in story.seen if seen.lease]
    of: dict[int, Story] = {}
    given: set[int] = set()
    largest = Floor((seen.span.ended, seen.lease or 0) for seen, _ in told)
    for seen, story in told:
        assert seen.lease is not None
        if of.setdefault(seen.lease, story) is not story:
            yield f"lease repeated: {seen.lease} is of {of[seen.lease]} and of {story}"
        if seen.how == "acquire":
            if seen.lease in given:
                yield f"lease repeated: {seen.lease} was given twice ({story})"
            given.add(seen.lease)
            if seen.lease <= largest.by(seen.span.asked):
                before = largest.by(seen.span.asked)
                yield f"lease went back: {seen.lease} was given after {before:.0f} was told ({story})"


def _ids(ledger: Ledger) -> Iterator[str]:
    """Ids grow."""
    made = [
        (story.made, story.id)
        for story in ledger.stories.values()
        if story.made is not None and story.id is not None
    ]
    largest = Floor((span.ended, id) for span, id in made)
    for span, id in made:
        if id <= largest.by(span.asked):
            yield f"id went back: {id} was given after {largest.by(span.asked):.0f}"


def _counters(stats: dict[str, Any], sure: Counter[str], maybe: Counter[str], quiet: bool) -> Iterator[str]:
    """The numbers of stats, against what was done for certain by then, and what perhaps."""
    if stats["generated"] - stats["deleted"] - stats["expired"] != stats["total"]:
        yield f"stats don't add up: {stats}"
    if stats["available"] + stats["blocked"] != stats["total"]:
        yield f"stats don't add up: {stats}"
    if stats["acquired"] - stats["unblocked"] - stats["released"] < stats["blocked"]:
        yield f"stats don't add up: {stats}"
    if not quiet:
        return
    for name in COUNTERS:
        if not sure[name] <= stats[name] <= sure[name] + maybe[name]:
            yield f"lost count: {name} is {stats[name]}, wanted {sure[name]} and up to {maybe[name]} more"


# ------------------------------------------------------------------------------------------------ the clients


class Cut(Exception):
    """The connection ended before the answer."""


class Unknown(Exception):
    """503: it may have happened or not."""


class Undecided(Unknown):
    """503 about a key whose deadline has passed, while a commit takes long on a busy machine."""


class Worker:
    """One client that asks for anything, one call after the other, until it is cut off or told to stop."""

    def __init__(
        self, server: ServerProcess, ledger: Ledger, seed: int, stop: threading.Event, keys: int
    ) -> None:
        self.name = f"worker {seed}"
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.failure: BaseException | None = None
        self.cut_at = math.inf
        self.refused = 0
        """Answers of 503 storage-unavailable."""
        self.undecided = 0
        """Those of them that a busy machine is the reason for."""
        self._server = server
        self._ledger = ledger
        self._random = random.Random(seed)
        self._stop_asked = stop
        self._keys = keys
        self._base = ledger.base
        self._client = Client(server)
        self._held: list[tuple[str, int]] = []
        shares: dict[Callable[[], None], int] = {
            self._generate: 6, self._generate_batch: 1, self._generate_legacy: 2,
            self._acquire: 16, self._acquire_waiting: 4, self._acquire_batch: 3, self._acquire_legacy: 3,
            self._unblock: 14, self._unblock_batch: 3, self._unblock_legacy: 2,
            self._keepalive: 16, self._keepalive_batch: 4,
            self._delete: 3, self._delete_batch: 1, self._delete_legacy: 1,
            self._get: 12, self._reveal: 2, self._stats: 2, self._page: 1, self._hang_up: 3,
        }  # fmt: skip
        if ledger.pool is not None:  # the first version's paths are about `default`
            for call in (
                self._generate_legacy,
                self._acquire_legacy,
                self._unblock_legacy,
                self._delete_legacy,
            ):
                del shares[call]
        self._calls = list(shares)
        self._weights = list(shares.values())

    def _run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self._call()
        except Cut:
            self.cut_at = time.monotonic()
        except BaseException as error:
            self.failure = error
        finally:
            self._client.close()

    def _call(self) -> None:
        """Ask for one thing, whichever. Raises Cut."""
        [call] = self._random.choices(self._calls, self._weights)
        try:
            call()
        except Unknown as unknown:
            self.refused += 1
            self.undecided += isinstance(unknown, Undecided)
            self._stop_asked.wait(0.05)  # as a client with manners would

    def _ask(self, attempt: Attempt, method: str, path: str, **how: Any) -> Answer:
        try:
            answer = self._client.request(method, path, **how)
        except (OSError, http.client.HTTPException) as error:
            raise Cut from error
        attempt.span.ended = answer.answered_at
        with self._ledger.lock:
            self._ledger.answers += 1
        if answer.status == 503:
            problem = answer.expect_problem(503, "storage-unavailable")
            raise Undecided if "until the current commit is done" in problem["detail"] else Unknown
        return answer

    def _batch(self, attempt: Attempt, **body: object) -> Answer:
        return self._ask(attempt, "POST", self._base + "/batch", json=body)

    def _name(self, story: Story) -> str:
        """What a key is called in a path or a batch: its text, or sometimes its id."""
        return f"id:{story.id}" if story.id is not None and self._random.random() < 0.2 else story.text

    def _pick(self) -> Story | None:
        return self._ledger.pick(self._random, dead=0.05)

    def _several(self) -> list[Story]:
        picked = [self._pick() for _ in range(self._random.randint(1, 8))]
        return [story for story in picked if story is not None]

    # ---- generate

    def _generate_by(self, count: int, method: str, path: str, **how: Any) -> None:
        if len(self._ledger.living) > self._keys:
            return
        attempt = self._ledger.asks("generated", count)
        self._ledger.unknown_makes.append(attempt.span)
        answer = self._ask(attempt, method, path, **how).expect(201)
        self._ledger.unknown_makes.remove(attempt.span)
        made = answer.get("keys", [answer])
        attempt.settle(count)
        assert len(made) == count, f"asked for {count}: {answer}"
        for key in made:
            self._ledger.made(attempt.span, key | {"key": key.get("key") or key["api_key"]})

    def _generate(self) -> None:
        self._generate_by(1, "POST", self._base + "/keys")

    def _generate_batch(self) -> None:
        count = self._random.randint(1, 8)
        self._generate_by(count, "POST", self._base + "/batch", json={"op": "generate", "count": count})

    def _generate_legacy(self) -> None:
        self._generate_by(1, "POST", LEGACY)

    # ---- acquire

    def _leased(self, attempt: Attempt, keys: Sequence[Mapping[str, Any]], owner: str | None) -> None:
        attempt.settle(len(keys))
        for key in keys:
            self._ledger.leased(attempt.span, key, owner)
            self._held.append((key["key"], key["lease"]))

    def _acquire_with(self, body: dict[str, object]) -> None:
        attempt = self._ledger.asks("acquired")
        answer = self._ask(attempt, "POST", self._base + "/keys/acquire", json=body)
        if answer.status == 404:
            answer.expect_problem(404, "no-key-available")
            attempt.settle(0)
        else:
            self._leased(attempt, [answer.expect(200)], self.name)

    def _acquire(self) -> None:
        self._acquire_with({"owner": self.name})

    def _acquire_waiting(self) -> None:
        self._acquire_with({"owner": self.name, "wait": self._random.random()})

    def _acquire_batch(self) -> None:
        count = self._random.randint(1, 5)
        attempt = self._ledger.asks("acquired", count)
        answer = self._batch(attempt, op="acquire", count=count, owner=self.name)
        keys = [] if answer.status == 404 else answer.expect(200)["keys"]
        self._leased(attempt, keys, self.name)

    def _acquire_legacy(self) -> None:
        attempt = self._ledger.asks("acquired")
        answer = self._ask(attempt, "GET", LEGACY)
        if answer.status == 404:
            attempt.settle(0)
            return
        attempt.settle(1)
        self._ledger.leased(attempt.span, answer.expect(200), None)

    # ---- unblock

    def _unblock(self) -> None:
        """Of a key held, with its lease; or of any, with none; or with one that may be over."""
        lease: int | None = None
        if self._held and self._random.random() < 0.8:
            text, lease = self._held.pop(self._random.randrange(len(self._held)))
            story = self._ledger.stories[text]
            if self._random.random() < 0.2:
                self._held.append((text, lease))  # and so once more, when it is over
        elif (picked := self._pick()) is not None:
            story = picked
        else:
            return
        attempt = self._ledger.asks("unblocked")
        tried = self._tries_unblock(story, attempt, lease)
        body = {} if lease is None else {"lease": lease}
        answer = self._ask(attempt, "POST", f"{self._base}/keys/{self._name(story)}/unblock", json=body)
        if answer.status == 200:
            attempt.settle(int(answer.json["changed"]))
            self._freed(story, attempt, lease, answer.json["id"])
            return
        attempt.settle(0)
        self._unblock_refused(story, attempt, tried, stale=answer.status == 409)
        assert answer.status in (404, 409), str(answer)

    def _tries_unblock(self, story: Story, attempt: Attempt, lease: int | None) -> Unblock:
        with self._ledger.lock:
            tried = Unblock(attempt.span, lease)
            story.unblocks.append(tried)
            return tried

    def _freed(self, story: Story, attempt: Attempt, lease: int | None, id: int | None = None) -> None:
        self._ledger.saw(story.text, Seen(attempt.span, "unblock", blocked=False, lease=lease), id)

    def _unblock_refused(self, story: Story, attempt: Attempt, tried: Unblock, *, stale: bool) -> None:
        with self._ledger.lock:
            story.unblocks.remove(tried)
            if stale:
                assert tried.lease is not None
                story.stale.append(Stale(attempt.span, tried.lease))
                story.seen.append(Seen(attempt.span, "unblock"))
            else:
                self._ledger.lost(story.text, attempt.span)

    def _unblock_batch(self) -> None:
        items: dict[str, tuple[Story, int | None]] = {}
        for _ in range(min(len(self._held), self._random.randint(0, 4))):
            text, lease = self._held.pop()
            items[text] = self._ledger.stories[text], lease
        for story in self._several():
            items.setdefault(story.text, (story, None))
        if not items:
            return
        attempt = self._ledger.asks("unblocked", len(items))
        tried = {text: self._tries_unblock(story, attempt, lease) for text, (story, lease) in items.items()}
        keys = [
            text if lease is None else {"key": text, "lease": lease} for text, (_, lease) in items.items()
        ]
        told = self._batch(attempt, op="unblock", keys=keys).expect(200)
        assert told["done"] + len(told["unknown"]) + len(told["stale"]) == len(items), told
        attempt.settle(0, perhaps=told["done"])  # it doesn't tell how many of them changed
        for text, (story, given) in items.items():
            if text in told["unknown"] or text in told["stale"]:
                self._unblock_refused(story, attempt, tried[text], stale=text in told["stale"])
            else:
                self._freed(story, attempt, given)

    def _unblock_legacy(self) -> None:
        if (story := self._pick()) is None:
            return
        attempt = self._ledger.asks("unblocked")
        tried = self._tries_unblock(story, attempt, None)
        answer = self._ask(attempt, "PUT", f"{LEGACY}?api_key={story.text}")
        if answer.status == 400:
            attempt.settle(0)
            self._unblock_refused(story, attempt, tried, stale=False)
        else:
            answer.expect(200)
            attempt.settle(0, perhaps=1)
            self._freed(story, attempt, None)

    # ---- keepalive and delete: what was done, item by item

    def _keepalive(self) -> None:
        if (story := self._pick()) is None:
            return
        attempt = self._tries("kept_alive", "keepalives", [story])
        answer = self._ask(attempt, "POST", f"{self._base}/keys/{self._name(story)}/keepalive")
        if answer.status == 404:
            self._told_unknown(attempt, "keepalives", [story], 0)
        else:
            told = answer.expect(200)
            attempt.settle(1)
            self._ledger.saw(story.text, Seen(attempt.span, "keepalive", told["expires_in"]), told["id"])

    def _keepalive_batch(self) -> None:
        stories = self._several()
        if not stories:
            return
        attempt = self._tries("kept_alive", "keepalives", stories)
        told = self._batch(attempt, op="keepalive", keys=[story.text for story in stories]).expect(200)
        unknown = [story for story in stories if story.text in told["unknown"]]
        assert told["done"] + len(told["unknown"]) == len(stories), told
        self._told_unknown(attempt, "keepalives", unknown, told["done"])
        for story in stories:
            if story not in unknown:
                self._ledger.saw(story.text, Seen(attempt.span, "keepalive"))

    def _delete(self) -> None:
        self._delete_by(lambda story: ("DELETE", f"{self._base}/keys/{self._name(story)}"), 204, 404)

    def _delete_legacy(self) -> None:
        self._delete_by(lambda story: ("DELETE", f"{LEGACY}?api_key={story.text}"), 200, 400)

    def _delete_by(self, call: Callable[[Story], tuple[str, str]], done: int, unknown: int) -> None:
        if (story := self._pick()) is None:
            return
        attempt = self._tries("deleted", "deletes", [story])
        answer = self._ask(attempt, *call(story))
        if answer.status == unknown:
            self._told_unknown(attempt, "deletes", [story], 0)
        else:
            answer.expect(done)
            attempt.settle(1)
            self._ledger.lost(story.text, attempt.span)

    def _delete_batch(self) -> None:
        stories = list({story.text: story for story in self._several()[:3]}.values())
        if not stories:
            return
        attempt = self._tries("deleted", "deletes", stories)
        told = self._batch(attempt, op="delete", keys=[story.text for story in stories]).expect(200)
        assert told["done"] + len(told["unknown"]) == len(stories), told
        unknown = [story for story in stories if story.text in told["unknown"]]
        self._told_unknown(attempt, "deletes", unknown, told["done"])
        for story in stories:
            if story not in unknown:
                self._ledger.lost(story.text, attempt.span)

    def _tries(self, counter: str, spans: str, stories: Sequence[Story]) -> Attempt:
        with self._ledger.lock:
            attempt = self._ledger.asks(counter, len(stories))
            for story in stories:
                getattr(story, spans).append(attempt.span)
            return attempt

    def _told_unknown(self, attempt: Attempt, spans: str, stories: Sequence[Story], done: int) -> None:
        """These keys were unknown: nothing was done to them, and they are gone."""
        attempt.settle(done)
        with self._ledger.lock:
            for story in stories:
                while attempt.span in getattr(story, spans):
                    getattr(story, spans).remove(attempt.span)
                self._ledger.lost(story.text, attempt.span)

    # ---- looking

    def _get(self) -> None:
        if (story := self._pick()) is None:
            return
        attempt = self._ledger.asks()
        answer = self._ask(attempt, "GET", f"{self._base}/keys/{self._name(story)}")
        if answer.status == 404:
            self._ledger.lost(story.text, attempt.span)
        else:
            self._ledger.saw_row(attempt.span, expect_row(answer.expect(200)), story)

    def _reveal(self) -> None:
        if (story := self._pick()) is None:
            return
        attempt = self._ledger.asks()
        answer = self._ask(attempt, "POST", f"{self._base}/keys/{self._name(story)}/reveal")
        if answer.status == 404:
            self._ledger.lost(story.text, attempt.span)
        else:
            told = answer.expect(200)
            assert told["key"] == story.text, told
            self._ledger.saw(story.text, Seen(attempt.span, "reveal"), told["id"])

    def _stats(self) -> None:
        stats = self._ask(self._ledger.asks(), "GET", self._base + "/stats").expect(200)
        self._ledger.stats(stats, quiet=False)

    def _page(self) -> None:
        order = self._random.choice(("id", "expiry", "release"))
        page = self._ask(self._ledger.asks(), "GET", f"{self._base}/keys?order={order}&limit=20").expect(200)
        for row in page["keys"]:  # may lead the disk: looked at, not believed
            expect_row(row)

    # ---- hanging up

    def _hang_up(self) -> None:
        """Ask on a connection of its own, and close it before the answer, or after it has come unread."""
        story = self._pick()
        name = "none" if story is None else story.text
        calls: list[tuple[str, str, str, dict[str, Any]]] = [
            ("acquired", "POST", self._base + "/keys/acquire", {"json": {"owner": "gone", "wait": 1}}),
            ("acquired", "POST", self._base + "/keys/acquire", {}),
            ("generated", "POST", self._base + "/keys", {}),
            ("kept_alive", "POST", f"{self._base}/keys/{name}/keepalive", {}),
            ("unblocked", "POST", f"{self._base}/keys/{name}/unblock", {}),
            ("deleted", "DELETE", f"{self._base}/keys/{name}", {}),
        ]
        [(counter, method, path, how)] = self._random.choices(calls, (4, 2, 1, 1, 1, 1))
        with self._ledger.lock:
            span = self._ledger.asks(counter).span
            if counter == "acquired":  # a lease that nobody hears of is taken back, which is an unblock
                self._ledger.maybe["unblocked"] += 1
            elif counter == "generated":
                self._ledger.unknown_makes.append(span)
            elif story is not None:
                self._tries_unheard(story, span, counter)
        try:
            with Wire(self._server) as wire:
                wire.ask(method, path, **how)
                if self._random.random() < 0.5:
                    time.sleep(self._random.random() * 0.02)
                wire.reset()
        except OSError as error:
            raise Cut from error

    @staticmethod
    def _tries_unheard(story: Story, span: Span, counter: str) -> None:
        if counter == "kept_alive":
            story.keepalives.append(span)
        elif counter == "deleted":
            story.deletes.append(span)
        else:
            story.unblocks.append(Unblock(span, None))


# -------------------------------------------------------------------------------------------- looking around


def examine(server: ServerProcess, ledger: Ledger) -> None:
    """Have a server that nobody else asks tell all that it has, into the ledger."""
    with Client(server) as client:
        ledger.stats(client.get(ledger.base + "/stats").expect(200), quiet=True)
        _walk(client, ledger)
        _ask_after_the_dead(client, ledger)
        for text in list(ledger.living)[:20]:
            answer = _get(client, f"{ledger.base}/keys/{text}")
            span = Span(answer.asked_at, answer.answered_at)
            if answer.status == 404:
                ledger.lost(text, span)
            else:
                ledger.saw_row(span, expect_row(answer.expect(200)), ledger.stories[text])
        ledger.stats(client.get(ledger.base + "/stats").expect(200), quiet=True)


def _get(client: Client, path: str) -> Answer:
    """The answer to a GET, once it is decided whether the key has expired (see Undecided)."""

    def decided() -> Answer | None:
        answer = client.get(path)
        return None if answer.status == 503 else answer

    answer = eventually(decided, "a commit is done")
    assert answer is not None
    return answer


def _walk(client: Client, ledger: Ledger) -> None:
    """All rows by id; a key that isn't among them is gone."""
    began, met, after = time.monotonic(), set(), ""
    while True:
        answer = client.get(f"{ledger.base}/keys?limit=500{after}")
        page = answer.expect(200)
        for row in page["keys"]:
            story = ledger.find(expect_row(row))
            if story is not None:
                met.add(story.text)
                ledger.saw_row(Span(answer.asked_at, answer.answered_at), row, story)
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    span = Span(began, time.monotonic())
    for text in [text for text in ledger.living if text not in met]:
        ledger.lost(text, span)


def _ask_after_the_dead(client: Client, ledger: Ledger) -> None:
    """Keep alive whatever is known to be gone: nothing may be found."""
    dead = [text for text in ledger.stories if text not in ledger.living]
    for at in range(0, len(dead), 1000):
        attempt = ledger.asks("kept_alive", len(dead[at : at + 1000]))
        answer = client.batch(op="keepalive", keys=dead[at : at + 1000])
        attempt.span.ended = answer.answered_at
        told = answer.expect(200)
        attempt.settle(told["done"])
        unknown = set(told["unknown"])
        for text in dead[at : at + 1000]:
            if text in unknown:
                ledger.lost(text, attempt.span)
            else:
                ledger.saw(text, Seen(attempt.span, "keepalive"))


# ---------------------------------------------------------------------------------------------------- crashes


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that are still there, dead ones apart."""
    return [child for child, parent, state in _processes() if parent == pid and state != "Z"]


def _processes() -> Iterator[tuple[int, int, str]]:
    """Every process: its id, its parent's, its state as a letter."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
        )
        for line in listed.stdout.splitlines():
            pid, parent, state = line.split()
            yield int(pid), int(parent), state[0]
        return
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            yield int(folder.name), int(parent), state


def lives(pid: int) -> bool:
    """Whether a process is there, and more than a dead one that nobody has asked after."""
    return any(child == pid and state != "Z" for child, _, state in _processes())


def command_of(pid: int) -> str:
    """The command that a process runs; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = (
            ["ps", "-ww", "-o", "args=", "-p", str(pid)] if not Path("/proc/self").exists() else ["true"]
        )
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def writer_of(server: ServerProcess) -> int:
    """The process id of a server's writer, which it may be about to start."""

    def found() -> list[int]:
        return children_of(server.pid) if server.running else [0]

    [writer] = eventually(found, "a writer process")
    return writer


@dataclass
class Tally:
    """What came of all rounds so far."""

    kills: int = 0
    writer_kills: int = 0
    answers: int = 0
    refused: int = 0
    most_refused: int = 0
    """503s in the round with the most of them, for each kill of the writer."""


class Crasher:
    """One data file, and server after server on it. All of it follows from the seed, but for the timing."""

    def __init__(
        self,
        path: Path,
        seed: int,
        *,
        block_seconds: float = 1.0,
        keepalive_seconds: float = 6.0,
        workers: int = 12,
        keys: int = 80,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        pools: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """`pools` are others beside `default`, each with its block and keepalive in seconds."""
        self.path = path
        self.ledger = Ledger(block_seconds, keepalive_seconds)
        others = [Ledger(*seconds, pool=name) for name, seconds in (pools or {}).items()]
        self.ledgers = [self.ledger, *others]
        self.tally = Tally()
        self._random = random.Random(seed)
        self._seeds = itertools.count(seed * 1_000_000)
        self._workers = workers
        self._keys = keys
        self._env = dict(env or {})
        self._defined = False
        self._flags = [
            f"--data={path}", "--port=0", "--log-level=warning",
            f"--block-seconds={block_seconds}", f"--keepalive-seconds={keepalive_seconds}", *flags,
        ]  # fmt: skip

    def set_env(self, **env: str) -> None:
        """Start the servers from now on with these variables."""
        self._env |= env

    def start(self) -> ServerProcess:
        """A server on the file."""
        flags = [flag for flag in self._flags if flag != "--log-level=warning"]
        return ServerProcess(flags, cwd=self.path.parent, env=self._env)

    def kill_at_start(self) -> None:
        """Start a server, and kill it before it is up, or just when it is."""
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "server.py"), *self._flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=clean_environment(self._env), cwd=self.path.parent, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(self._random.uniform(0.1, 0.9))
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.wait() == -SIGKILL, "a server ended by itself at its start"
        self.tally.kills += 1

    def round(self, *, answers: int = 0, writer_kills: int = 0, both: bool = False) -> list[str]:
        """Start, look around, load it, kill it under load. What is wrong so far.

        The kill comes after so many answers (a number drawn if it is 0); before it the writer is killed so
        many times, and with `both` once more right before the server.
        """
        server = self.start()
        if writer_kills or both:
            server.allow(r"can't be written")
        try:
            self._define(server)
            for ledger in self.ledgers:
                examine(server, ledger)
            self._load_and_kill(server, answers or self._random.randint(30, 400), writer_kills, both)
            server.check()
        finally:
            server.close()
        return self._faults()

    def _define(self, server: ServerProcess) -> None:
        """Make the pools that aren't there: those of a server that ran before must be."""
        with Client(server) as client:
            for ledger in self.ledgers[1:]:
                settings = {
                    "block_seconds": ledger.block_seconds,
                    "keepalive_seconds": ledger.keepalive_seconds,
                }
                answer = client.put(f"{API}/pools/{ledger.pool}", json=settings)
                assert answer.status == (200 if self._defined else 201), f"a pool was lost: {answer}"
        self._defined = True

    def _faults(self) -> list[str]:
        return [
            fault if ledger.pool is None else f"{fault} in {ledger.pool}"
            for ledger in self.ledgers
            for fault in judge(ledger)
        ]

    def look(self) -> list[str]:
        """Start once more, look around, and end in peace. What is wrong in the end."""
        with self.start() as server:
            self._define(server)
            for ledger in self.ledgers:
                examine(server, ledger)
        return self._faults()

    def _load_and_kill(self, server: ServerProcess, answers: int, writer_kills: int, both: bool) -> None:
        stop = threading.Event()
        workers = [
            Worker(server, ledger, next(self._seeds), stop, self._keys)
            for ledger in self.ledgers
            for _ in range(self._workers // len(self.ledgers))
        ]
        before = self._answers()
        for worker in workers:
            worker.thread.start()
        try:
            for _ in range(writer_kills):
                self._wait_for(answers, workers, server)
                self._outage()
                kill(writer_of(server))
                if self._random.random() < 0.5:  # or the next one is killed while it starts
                    _wait_for_storage(server)
            _wait_for_storage(server)
            self._wait_for(answers, workers, server)
            if both:
                self._outage()
                kill(writer_of(server))
            killed_at = time.monotonic()
            server.signal(SIGKILL)
            server.wait()
        finally:
            stop.set()
        for ledger in self.ledgers:
            ledger.died(time.monotonic())
            for outage in ledger.outages:
                outage.ended = min(outage.ended, time.monotonic())
        for worker in workers:
            worker.thread.join(30)
            assert not worker.thread.is_alive(), f"{worker.name} still waits for a dead server"
            if worker.failure is not None:
                raise AssertionError(
                    f"{worker.failure!r} of {worker.name}; the log:\n{server.log}"
                ) from worker.failure
            assert worker.cut_at > killed_at, "a connection was cut by a living server"
        self._count(self._answers() - before, workers, writer_kills + both)

    def _answers(self) -> int:
        return sum(ledger.answers for ledger in self.ledgers)

    def _outage(self) -> None:
        """Storage fails now, for all pools."""
        for ledger in self.ledgers:
            ledger.outages.append(Span(time.monotonic()))

    def _wait_for(self, answers: int, workers: list[Worker], server: ServerProcess) -> None:
        """Until so many more answers have come, refused ones apart."""

        def answered() -> int:
            return self._answers() - sum(worker.refused for worker in workers)

        target = answered() + answers

        def come() -> bool:
            failed = any(worker.failure is not None for worker in workers)
            return failed or not server.running or answered() >= target

        eventually(come, f"{answers} answers more", within=60)

    def _count(self, answers: int, workers: list[Worker], writer_kills: int) -> None:
        refused = sum(worker.refused for worker in workers)
        if not writer_kills:
            wrongly = refused - sum(worker.undecided for worker in workers)
            assert wrongly == 0, f"{wrongly} calls got 503 though nothing was wrong"
        self.tally.kills += 1
        self.tally.writer_kills += writer_kills
        self.tally.answers += answers
        self.tally.refused += refused
        self.tally.most_refused = max(self.tally.most_refused, refused // max(1, writer_kills))


def _wait_for_storage(server: ServerProcess) -> None:
    """Until the server says that it can write."""
    with Client(server) as client:
        eventually(lambda: client.get("/readyz").status == 200, "a server that can write again")


def kill(pid: int) -> None:
    """Kill a process, if it is still there."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
