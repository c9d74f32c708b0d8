"""What the tests of the Valkey engine share: engines over one pool, and a look at what Valkey really holds."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec

import msgspec
import pytest
from engine_support import quiet
from valkeys import Valkey, new_pool, shared_valkey

from keypool.core.answers import GeneratedKey, KeptAlive, Row
from keypool.core.errors import KeypoolError
from keypool.core.rules import PoolRules
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.opening import open_valkey
from keypool.engine.valkey.pools import ValkeyPools
from keypool.engine.valkey.scripts import KEYS, Script, build, keys_of
from keypool.engine.valkey.url import parse
from keypool.engine.valkey.vault import details_in

P = ParamSpec("P")


@dataclass
class Place:
    """Where a test's pool is: in the Valkey that all tests of this process share."""

    valkey: Valkey
    pool: str
    url: str


def new_place() -> Place:
    """One that no other test has."""
    url = new_pool(shared_valkey())
    return Place(shared_valkey(), url.partition("pool=")[2], url)


def on_loop(test: Callable[P, Awaitable[None]], within: float = 180.0) -> Callable[P, None]:
    """Runs an async test on a loop of its own, and fails if an error was logged."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            async with asyncio.timeout(within):
                await test(*args, **kwargs)

        with quiet():
            asyncio.run(main())

    return run


@contextlib.asynccontextmanager
async def engine_on(
    url: str,
    partitions: int | None = 16,
    grace: float = 0.0,
    *,
    secrets: Sequence[bytes] = (),
    **rules: Any,
) -> AsyncIterator[ValkeyEngine]:
    """A server's engine over the pool that the URL names."""
    async with pools_on(url, partitions, grace, secrets=secrets, **rules) as pools:
        yield pools.default


SECRETS = (bytes(range(32)),)
"""The secrets keys of tests that need some."""


@contextlib.asynccontextmanager
async def sealed_on_valkey(partitions: int, **rules: Any) -> AsyncIterator[ValkeyEngine]:
    """An engine over a place of its own, which is checked at the end."""
    place = new_place()
    async with engine_on(place.url, partitions, secrets=SECRETS, **rules) as engine:
        yield engine
    check(place.valkey, place.pool, partitions)


@contextlib.asynccontextmanager
async def pools_on(
    url: str,
    partitions: int | None = 16,
    grace: float = 0.0,
    *,
    max_pools: int = 100,
    secrets: Sequence[bytes] = (),
    **rules: Any,
) -> AsyncIterator[ValkeyPools]:
    """A server's pools over the place that the URL names."""
    all_rules = PoolRules(restart_grace=grace, **rules)
    pools = await open_valkey(parse(url), partitions, all_rules, max_pools=max_pools, secrets_keys=secrets)
    try:
        yield pools
    finally:
        await pools.close()


async def eventually(condition: Callable[[], Any], what: str, within: float = 20.0) -> Any:
    """The first truthy result of the condition, awaited if need be; KeypoolErrors count as false."""
    deadline = asyncio.get_running_loop().time() + within
    while True:
        try:
            result = condition()
            if asyncio.iscoroutine(result) or asyncio.isfuture(result):
                result = await result
        except KeypoolError as error:
            result = None
            last: Any = error
        else:
            last = result
        if result:
            return result
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"in {within} s never came true: {what} (last: {last!r})")
        await asyncio.sleep(0.005)


def expires_in(answer: Row | KeptAlive | GeneratedKey) -> float:
    """The seconds that a key lives, which must not be for ever."""
    assert answer.expires_in is not None
    return answer.expires_in


async def become(engine: ValkeyEngine, what: str, within: float = 20.0, **wanted: int) -> None:
    """Return when the stats are those; fail after a while, saying what never came true."""

    async def reached() -> bool:
        stats = await engine.stats()
        return all(getattr(stats, name) == value for name, value in wanted.items())

    await eventually(reached, f"{what}: {wanted}", within)


async def serves(engine: ValkeyEngine) -> None:
    """Return when calls are served and the engine says so."""

    async def served() -> bool:
        engine.ready()
        return bool(await engine.stats())

    await eventually(served, "the engine serves again", within=30)


def with_constants(patch: pytest.MonkeyPatch, *, clock: str | None = None, **constants: int) -> None:
    """Let scripts have other constants than those in common.lua; and for a clock, instead of Valkey's own, the value
    under this name in Valkey, in microseconds. Leases given while it stands still begin a microsecond after each other,
    as the value under `leases_at` counts.
    """
    made = build({name: str(value) for name, value in constants.items()})
    if clock is not None:
        made = {name: _by_clock(script, clock) for name, script in made.items()}
    for module in ("nodes", "calls"):
        patch.setattr(f"keypool.engine.valkey.{module}.scripts", lambda: made)


def leases_at(clock: str) -> str:
    """The name of the value that counts leases by this clock."""
    return clock + ":leases"


def _by_clock(script: Script, clock: str) -> Script:
    own = "local clock = call('TIME')"
    assert own in script.text
    text = script.text.replace(own, f"local clock = {{0, tonumber(call('GET', '{clock}'))}}")
    if script.name == "acquire":
        # No two leases end at the same moment then, in which order would be chance.
        for old, new in (
            (
                "tick = tick + 1\n",
                f"tick = tick + 1\nlocal begun = NOW + call('INCR', '{leases_at(clock)}')\n",
            ),
            ("NOW + block + acquired", "begun + block"),
            ("owner ~= '' and owner, NOW", "owner ~= '' and owner, begun"),
        ):
            assert old in text, old
            text = text.replace(old, new)
    return Script(script.name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - as EVALSHA has it


NEVER = 9007199254740992
_AGE = """
local by, NEVER = tonumber(ARGV[1]), 9007199254740992
local secrets = {}
for _, text in ipairs(redis.call('HKEYS', KEYS[2])) do
  local record = cmsgpack.unpack(redis.call('HGET', KEYS[2], text))
  for _, field in ipairs({4, 5, 7, 19}) do
    if record[field] and record[field] ~= 0 and record[field] ~= NEVER then record[field] = record[field] - by end
  end
  if record[11] and record[11][2] ~= 0 then record[11][2] = record[11][2] - by end
  if record[21] then secrets[string.format('%.0f', record[21])] = true end
  redis.call('HSET', KEYS[2], text, cmsgpack.pack(record))
  if record[9] ~= 'q' then redis.call('ZADD', KEYS[3], record[5], text) end
  if record[4] ~= NEVER then redis.call('ZADD', KEYS[4], record[4], text) end
end
for first in pairs(secrets) do
  local secret = KEYS[1]:sub(1, -5) .. 'secret:' .. first
  for _, field in ipairs({'cools', 'cooled', 'ready'}) do
    if redis.call('HEXISTS', secret, field) == 1 then
      redis.call('HINCRBY', secret, field, string.format('%.0f', -by))
    end
  end
  local paced = redis.call('HGET', secret, 'paced')
  if paced then redis.call('HSET', secret, 'paced', string.format('%.17g', tonumber(paced) - by)) end
end
if ARGV[2] == '1' then redis.call('HINCRBY', KEYS[1], 'seen', string.format('%.0f', -by)) end
"""


_READ = """
local records = {}
for _, text in ipairs(redis.call('HKEYS', KEYS[1])) do
  local record = cmsgpack.unpack(redis.call('HGET', KEYS[1], text))
  local attempt = record[8] or ''
  if record[8] then record[8] = false end
  local bytes = {}
  for name, field in pairs({sealed = 14, info = 16, former = 17}) do
    bytes[name] = record[field] or ''
    if record[field] then record[field] = false end
  end
  records[#records + 1] = {text, attempt, cmsgpack.pack(record), bytes.sealed, bytes.info, bytes.former}
end
return records
"""


def age(valkey: Valkey, pool: str, partitions: int, seconds: float, *, unseen: bool = False) -> None:
    """Let the pool grow older: every deadline comes nearer by so much, as if the time had passed; `unseen`, while
    no server looked.
    """
    with valkey.commands() as commands:
        for partition in range(partitions):
            keys = keys_of(pool, partition, partitions)
            commands.ask("EVAL", _AGE, len(keys), *keys, round(seconds * 1e6), int(unseen))


def check(valkey: Valkey, pool: str, partitions: int) -> dict[str, int]:
    """Fails unless all that Valkey holds of a pool agrees with itself; the counters' sums."""
    sums: dict[str, int] = {}
    ids: set[int] = set()
    with valkey.commands() as commands:
        for partition in range(partitions):
            keys = dict(zip(KEYS, keys_of(pool, partition, partitions), strict=True))
            kept = {
                text: _Record(*msgspec.msgpack.decode(packed))._replace(
                    attempt=attempt, sealed=sealed, info=info, former=former
                )
                for text, attempt, packed, sealed, info, former in commands.ask(
                    "EVAL", _READ, 1, keys["records"]
                )
            }
            names = {text: details_in(record.info).name for text, record in kept.items()}
            tag = keys["meta"].removesuffix("meta")
            away = {text: record.id for text, record in kept.items() if record.mark == "q"}
            wanted = {
                "states": {text: record.release for text, record in kept.items() if text not in away},
                "expiry": {text: record.expires for text, record in kept.items() if record.expires != NEVER},
                "ids": {text: record.id for text, record in kept.items()},
                "texts": {_entry(text, record): 0 for text, record in kept.items() if _is_first(text)},
                "names": {
                    f"{name}\0{kept[text].id}".encode(): 0
                    for text, name in names.items()
                    if name is not None and _is_first(text)
                },
                "quarantine": away,
                "holders": {
                    f"{record.owner or ''}\0{record.client or ''}\0{record.lease:016d}{record.id}".encode(): 0
                    for record in kept.values()
                    if record.release and record.mark != "c"
                },
                "attempts": {record.attempt + text: 0 for text, record in kept.items() if record.attempt},
            }
            for name, scores in wanted.items():
                found = commands.ask("ZRANGE", keys[name], 0, -1, "WITHSCORES")
                there = {text: int(float(score)) for text, score in zip(found[::2], found[1::2], strict=True)}
                assert there == scores, f"{name} and the records disagree: {there} {scores}"
            for text, record in kept.items():
                assert record.id not in ids, f"two keys have the id {record.id}: {text!r}"
                assert record.mark in (False, "c", "q", "p"), record
                assert record.release or record.mark in (False, "q"), f"no moment when that ends: {record}"
                if record.mark in ("c", "q") or not record.release:
                    held = (
                        record.owner, record.acquired, record.attempt, record.replayed, record.client, record.former,
                        record.extended,
                    )  # fmt: skip
                    assert not any(held), f"nobody holds it: {record}"
                assert bool(record.sealed) == (text[:1] == b"\xfe") == bool(record.hint), record
                if record.former:
                    old = commands.ask_bytes("GET", tag.encode() + b"old:" + record.former)
                    heirs = [each for each in kept.values() if each.former == record.former]
                    assert old in {f"{each.id}.{each.lease}".encode() for each in heirs}
                    assert {each.seats for each in heirs} == {record.seats}
                ids.add(record.id)
            further = _check_seats(commands, tag, kept)
            counts = commands.ask("HGETALL", keys["meta"])
            numbers = {
                name.decode(): int(value)
                for name, value in zip(counts[::2], counts[1::2], strict=True)
                if name not in (b"sweepers", b"rekeyed", b"pace")
            }
            assert (numbers.get("further", 0), numbers.get("further_quarantined", 0)) == further
            assert numbers.get("cooling", 0) == sum(record.mark == "c" for record in kept.values())
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0) + value
    gone = sums.get("deleted", 0) + sums.get("expired", 0)
    assert sums.get("generated", 0) + sums.get("imported", 0) - gone == len(ids), (
        f"{sums} and {len(ids)} keys"
    )
    return sums


def _is_first(text: bytes) -> bool:
    """Whether a field is not that of a further seat."""
    return b"\0" not in (text[17:] if text[:1] == b"\xfe" else text)


def _check_seats(commands: Any, tag: str, kept: dict[bytes, _Record]) -> tuple[int, int]:
    """Fails unless the seats of each secret agree. Returns how many there are beyond the first ones, and of those that
    are quarantined likewise.
    """
    groups: dict[int, dict[bytes, _Record]] = {}
    for text, record in kept.items():
        if record.seats:
            groups.setdefault(record.seats, {})[text] = record
        else:
            assert _is_first(text), record
    further = further_quarantined = 0
    for first, seats in groups.items():
        ids = sorted(record.id for record in seats.values())
        stored = commands.ask("ZRANGE", f"{tag}seats:{first}", 0, -1)
        assert stored == [str(id).encode() for id in ids], f"seats: {stored}, records: {ids}"
        firsts = [text for text in seats if _is_first(text)]
        assert len(firsts) == 1, seats
        (text,) = firsts
        assert seats[text].id == ids[0], "the first seat has the text"
        assert len({(record.info, record.hint) for record in seats.values()}) == 1
        assert len({msgspec.msgpack.encode(record.history or False) for record in seats.values()}) == 1
        assert len({record.mark in ("q", "p") for record in seats.values()}) == 1, seats
        words = commands.ask("HGETALL", f"{tag}secret:{first}")
        numbers = {name.decode(): float(word) for name, word in zip(words[::2], words[1::2], strict=True)}
        quarantined = sum(record.mark == "q" for record in seats.values())
        assert numbers.get("quarantined", 0) == quarantined
        assert numbers.get("wanted") != len(ids), "stored only while there are more or fewer"
        if len(ids) > numbers.get("wanted", len(ids)):
            assert all(record.release and record.mark != "c" for record in seats.values()), seats
        further += len(ids) - 1
        further_quarantined += max(0, quarantined - 1)
    return further, further_quarantined


class _Record(NamedTuple):
    """A record, as lua/common.lua has it."""

    id: int
    created: int
    lease: int
    expires: int
    release: int
    owner: Any = False
    acquired: Any = False
    attempt: Any = False
    mark: Any = False
    reported: Any = False
    history: Any = False
    replayed: Any = False
    client: Any = False
    sealed: Any = False
    hint: Any = False
    info: Any = False
    former: Any = False
    share: Any = False
    paced: Any = False
    extended: Any = False
    seats: Any = False
    served: Any = False


def _entry(text: bytes, record: _Record) -> bytes:
    """What the order of texts has of a key."""
    if not record.sealed:
        return text
    hint: str = record.hint
    return (b"\xfe" if details_in(record.info).imported else b"") + hint.encode() + text
