"""Keeping keys alive and extending leases, without any I/O: what is due, what answers mean, when the next round is.

A round sends every key once, in batches of a thousand, at a third of the keepalive time: two rounds may fail
before a key expires. That time is in the answer to the keepalive of a single key, so the first round has one
more call. The pause is shortened at random by up to a tenth, so that keepers do not synchronise. A round that
failed is repeated, with growing pauses, until one succeeds; but if the token, the URL or the pool is refused, the
keeper stops, as no repetition could help. The pool `default` has that time for as long as its server runs; that of
other pools may change, so there each round has the one more call.

A key that never expires needs no keepalive, so one that is known not to (its `expires_in` is None) is not kept at all.
In a pool where no key expires, texts and ids are sent once, and then never again until another one is added: even if
the pool's setting changes, a key that was kept alive under it expires only after its next keepalive.

The leases of a client share one keeper, whichever of its pools they are of (LeaseRounds). A lease is named by its
handle, as several may be of one text. A text that has several seats names none of them: it is reported and left out.

Each lease to be extended is extended by a call of its own when a third of its block has passed, since only the answer
to a single call says how long it lasts then. One that can't last longer is not asked for again.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from keypool.client import calls
from keypool.client.answers import GeneratedKey, KeyLike, hint
from keypool.client.attempts import Pause, Send, Steps, result
from keypool.client.errors import (
    BlockLimit,
    Forbidden,
    KeyPoolError,
    LeaseLost,
    LeaseOver,
    ManySeats,
    MethodNotAllowed,
    NotFound,
    PoolClosed,
    Refused,
    StaleLease,
    Unauthorized,
    Unavailable,
    UnknownKey,
    UnknownPool,
    WrongHost,
)
from keypool.client.held import Held
from keypool.client.settings import DEFAULT_POOL, Retry, Settings, now

OnDead = Callable[[str], object]
OnError = Callable[[KeyPoolError], object]

log = logging.getLogger("keypool.client")

_LEAST_EXTENSION = 0.05  # seconds; a lease that can't be extended by more lasts as long as it may
_TAKEN = "was leased to someone else"
_FINAL = (Unauthorized, Forbidden, WrongHost, NotFound, MethodNotAllowed, UnknownPool)


class Rounds:
    """The keys of one keeper. Other threads may call `add` and `discard` and read, while one runs `steps`."""

    def __init__(
        self,
        settings: Settings,
        keys: Iterable[KeyLike] = (),
        on_dead: OnDead | None = None,
        on_error: OnError | None = None,
        keepalive_seconds: float | None = None,
    ) -> None:
        # No retries within a call: rounds are repeated instead, without end.
        self._settings = replace(settings, retry=Retry(0))
        self.keys: dict[str, KeyLike] = {_name(key): key for key in keys if _expires(key)}
        self.error: KeyPoolError | None = None
        self.keepalive_seconds = keepalive_seconds  # inf: keys of this pool never expire
        self._given = keepalive_seconds is not None
        self._fresh: dict[str, None] = {}
        self._extending: dict[Held, float] = {}  # with the moment of the next attempt
        self._on_dead = on_dead
        self._on_error = on_error
        self._failures = 0
        self._pauses = Retry(first=0.2, most=5.0)

    def add(self, key: KeyLike) -> None:
        """Keep another key alive, from now on, unless it never expires. O(1)."""
        if not _expires(key):
            return
        name = _name(key)
        self.keys[name] = key
        self._fresh[name] = None

    def extend(self, held: Held) -> None:
        """Extend a lease from now on, until it is discarded, lost, or lasts as long as it may. O(1)."""
        self._extending[held] = held.extension_due_at

    def discard(self, key: KeyLike) -> None:
        """Stop keeping a key alive. O(1)."""
        name = _name(key)
        if isinstance(key, Held):
            self._extending.pop(key, None)
            if self.keys.get(name) is not key:  # without handles: its lease may have ended, and another begun
                return
        self._forget(name)

    def steps(self) -> Steps[None]:
        """Rounds and pauses, until the token or the URL is refused. After `add`, the runner ends the pause early."""
        next_at = 0.0
        while not isinstance(self.error, _FINAL):
            due = now() >= next_at
            if due or self._fresh:
                keys = list(self.keys if due else self._fresh)
                self._fresh.clear()
                yield from self._round(keys, whole=due)
                next_at = now() + self.pause() if due else min(next_at, now() + self.pause())
                continue
            held, extend_at = self._next_extension()
            if held is not None and now() >= extend_at:
                yield from self._extend(held)
            else:
                until = min(next_at if self.keys else math.inf, extend_at)
                yield Pause(None if until == math.inf else max(0.0, until - now()))

    def pause(self) -> float:
        """Seconds between the end of a round and the next one."""
        third = (300.0 if self.keepalive_seconds is None else self.keepalive_seconds) / 3
        if self.error is not None:
            return min(third / 4, self._pauses.pause(self._failures))
        return third * random.uniform(0.9, 1.0)  # noqa: S311 - see the module

    def _round(self, keys: list[str], *, whole: bool) -> Steps[None]:
        error: KeyPoolError | None = None
        began = now()
        try:
            for part in calls.parts(keys):
                done = yield from result(calls.keepalive_part(part), self._settings)
                self._remove_dead(done.unknown)
                self._remove_dead(done.stale, _TAKEN)
                self._leave_out(done.many_seats)
            yield from self._read_keepalive_seconds(whole=whole)
            self._prolong(keys, began)
        except PoolClosed:
            raise
        except KeyPoolError as failed:
            error = failed
        self._record_outcome(error)

    def _next_extension(self) -> tuple[Held | None, float]:
        """The lease to be extended next, and the moment for that. O(leases)."""
        return min(list(self._extending.items()), key=lambda each: each[1], default=(None, math.inf))

    def _extend(self, held: Held) -> Steps[None]:
        """One attempt. It may take half of the time that is left, so that a silent server can be asked again."""
        left = held.released_at - now()
        next_at = math.inf
        try:
            extended = yield from held.extension(self._settings, within=max(0.5, left / 2))
            if extended.block_left > extended.release_in + _LEAST_EXTENSION:
                next_at = held.extension_due_at
        except (LeaseLost, BlockLimit, LeaseOver):
            pass  # a lost lease has said so; the others go on to their ends
        except PoolClosed:
            raise
        except KeyPoolError as error:
            if _is_final(error):
                log.warning("the lease of key %s is not extended: %s", held.hint, error)
            else:
                next_at = now() + min(max(left / 8, 0.05), 5.0)
        if held not in self._extending:
            return  # it was given back meanwhile
        if next_at == math.inf or held.over:
            self._extending.pop(held, None)
        else:
            self._extending[held] = next_at

    def _read_keepalive_seconds(self, *, whole: bool) -> Steps[None]:
        may_change = self._settings.pool != DEFAULT_POOL and whole
        if not self._given and (may_change or self.keepalive_seconds == math.inf):
            self.keepalive_seconds = None
        while self.keepalive_seconds is None and self.keys:
            yield from self._keep_one_alive(next(iter(self.keys)))

    def _keep_one_alive(self, key: str) -> Steps[None]:
        """Ask for the keepalive time by a keepalive of this key, unless it is dead."""
        named = self.keys[key]
        try:
            answer = yield from result(calls.keepalive(calls.handle(named) or named), self._settings)
        except UnknownKey:
            self._remove_dead([key])
        except ManySeats:
            self._leave_out([key])
        except StaleLease:  # somebody else holds the key by now; it is kept alive all the same
            if calls.handle(key):
                self._remove_dead([key], _TAKEN)
            else:
                self.keys[key] = key
        except Forbidden:  # only admins may name a key by its id
            if not isinstance(named, GeneratedKey):
                raise
            self.keepalive_seconds = named.expires_in
        else:
            self.keepalive_seconds = math.inf if answer.expires_in is None else answer.expires_in

    def _prolong(self, keys: Sequence[str], since: float) -> None:
        for text in keys:
            key = self.keys.get(text)
            if isinstance(key, Held) and self.keepalive_seconds is not None:
                key.kept_alive(since + self.keepalive_seconds)

    def _remove_dead(self, dead: Iterable[str], why: str = "was deleted or expired") -> None:
        for text in dead:
            key = self._forget(text)
            if key is not None:
                if isinstance(key, Held):
                    key.lose(f"{why} while it was held")
                self._report(self._on_dead, text)

    def _leave_out(self, texts: Iterable[str]) -> None:
        """Report texts of several seats, each of which expires by itself."""
        for text in texts:
            if self._forget(text) is not None:
                error = ManySeats(
                    f"key {hint(text)} has several seats: keep each of them alive, by its id or handle"
                )
                if self._on_error is None:
                    log.warning("%s", error)
                self._report(self._on_error, error)

    def _forget(self, text: str) -> KeyLike | None:
        self._fresh.pop(text, None)
        return self.keys.pop(text, None)

    def _record_outcome(self, error: KeyPoolError | None) -> None:
        self.error = error
        self._failures = 0 if error is None else self._failures + 1
        if isinstance(error, UnknownPool):
            for key in list(self.keys.values()):
                if isinstance(key, Held):
                    key.lose("was in a pool that is gone")
        if isinstance(error, _FINAL):
            log.error("the keeper stops: %s", error)
        elif self._failures == 1 and self._on_error is None:
            log.warning("keepalive failed, retrying: %s", error)
        if error is not None:
            self._report(self._on_error, error)

    def _report(self, callback: Callable[..., object] | None, about: object) -> None:
        if callback is None:
            return
        try:
            callback(about)
        except Exception:
            log.exception("a callback of the keeper failed")


def _name(key: KeyLike) -> str:
    """What a key is called here, and in batches."""
    if isinstance(key, Held):
        return key.handle or key._text  # noqa: SLF001 - which may be asked for when the lease is over, too
    return calls.text(key)


def _expires(key: KeyLike) -> bool:
    return getattr(key, "expires_in", 0.0) is not None


def _is_final(error: KeyPoolError) -> bool:
    """Whether no repetition of the call can help: the server refused it, or is too old for it."""
    return (isinstance(error, Refused) and not isinstance(error, Unavailable)) or type(error) is KeyPoolError


class LeaseRounds:
    """What keeps a client's leases: the rounds of each pool of which it holds any, one after the other.

    A pool whose keeper would stop is forgotten, until another of its leases is added.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[str, Rounds] = {}

    @property
    def keys(self) -> list[str]:
        """The texts of the keys that are kept alive, of all pools."""
        return [text for rounds in list(self._pools.values()) for text in rounds.keys]

    @property
    def error(self) -> KeyPoolError | None:
        """Why the latest round of a pool failed; None if none did."""
        return next((rounds.error for rounds in list(self._pools.values()) if rounds.error), None)

    def add(self, key: KeyLike) -> None:
        """Keep the key of a lease alive. O(1)."""
        self._rounds(self._pool_of(key)).add(key)

    def extend(self, held: Held) -> None:
        """Extend a lease from now on. O(1)."""
        self._rounds(held.pool).extend(held)

    def discard(self, key: KeyLike) -> None:
        """Do neither any more. O(1)."""
        if (rounds := self._pools.get(self._pool_of(key))) is not None:
            rounds.discard(key)

    def _pool_of(self, key: KeyLike) -> str:
        return key.pool if isinstance(key, Held) else self._settings.pool

    def _rounds(self, pool: str) -> Rounds:
        if pool not in self._pools:
            self._pools.setdefault(pool, Rounds(replace(self._settings, pool=pool)))
        return self._pools[pool]

    def steps(self) -> Steps[None]:
        """Rounds and pauses, without end. After `add` or `extend`, the runner ends the pause early."""
        under_way: dict[str, Steps[None]] = {}
        while True:
            seconds = math.inf
            for pool, rounds in list(self._pools.items()):
                if pool not in under_way:
                    under_way[pool] = rounds.steps()
                pause = yield from _until_pause(under_way[pool])
                if pause is None:
                    del under_way[pool], self._pools[pool]
                elif pause.seconds is not None:
                    seconds = min(seconds, pause.seconds)
            yield Pause(None if seconds == math.inf else seconds)


def _until_pause(steps: Steps[None]) -> Steps[Pause | None]:
    """Run steps to their next pause, which is the result; None if they end. Whoever is pausing goes on at once."""
    try:
        step = next(steps)
        while isinstance(step, Send):
            try:
                answer = yield step
            except KeyPoolError as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration:
        return None
    return step


class KeptKeys:
    """The members that both keepers share. `wake` ends the pause between two rounds."""

    def __init__(self, rounds: Rounds | LeaseRounds, wake: Callable[[], object]) -> None:
        self._rounds = rounds
        self._wake_up = wake

    @property
    def keys(self) -> list[str]:
        """The texts of the keys that are kept alive, without those that died."""
        return list(self._rounds.keys)

    @property
    def error(self) -> KeyPoolError | None:
        """Why the latest round failed; None if it did not."""
        return self._rounds.error

    def add(self, key: KeyLike) -> None:
        """Keep another key alive, from now on."""
        self._rounds.add(key)
        self._wake_up()

    def _extend(self, held: Held) -> None:
        """Extend a lease as well, from now on."""
        self._rounds.extend(held)
        self._wake_up()

    def discard(self, key: KeyLike) -> None:
        """Stop keeping a key alive, if it is kept."""
        self._rounds.discard(key)
