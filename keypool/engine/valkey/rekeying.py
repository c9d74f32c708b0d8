"""Sealing what is stored in clear, or under another secrets key than the first, while the pools are served.

A slice is two scripts: one lists keys in order of id that are to be sealed (lua/unsealed.lua), the other stores them
sealed, each unless it has changed meanwhile (lua/reseal.lua), and how far the partition is (META's `rekeyed`). So a
rekey goes on where it was after a stop.

That there is something to do is in `{POOL}:pool`, as `rekey`: "the key's name in hexadecimal, keys looked at, keys in
all". One server does it, the one that has set `{POOL}:rekeyer`, a key that lapses unless it goes on; the others look
every few seconds whether it is still at work, and one takes its place if it isn't. When all pools are done, `digests`
is sealed under the first secrets key, too, and `clear` is removed (vault.py).

Keys in clear are also sealed one by one as they are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import structs

from keypool.core.answers import Rekeying
from keypool.core.errors import SecretsKeyRequired, StorageUnavailable
from keypool.core.keys import hint
from keypool.engine.sealing import WrongSecretsKey
from keypool.engine.valkey.link import UNREACHABLE, Reply, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.partitions import Partitions
from keypool.engine.valkey.vault import Vault, details_in, info_of

_SLICE = (
    100  # keys that are looked at in a slice: sealing them takes a millisecond, as does each of its scripts
)
_LOOK_SECONDS = 5.0  # between two looks whether there is something to do
_TURN_MS = 15_000  # after which another server takes the place of one that doesn't go on
_log = logging.getLogger("keypool.valkey")
_CLEAR_NOW = 2  # of the words behind the five of a lease in clear: it is not sealed


class Rekeyable(Protocol):
    """A pool to rekey."""

    @property
    def total(self) -> int:
        """How many keys it has, at most."""
        ...

    async def rekey(self, on_slice: Callable[[int], Awaitable[object]]) -> None:
        """See `rekey` below."""
        ...


class Rekeyer:
    """See the module. `pool_key` is the name of `{POOL}:pool`, `pools` returns all pools of this server."""

    def __init__(
        self,
        nodes: Nodes,
        pool_key: str,
        server: str,
        vault: Vault | None,
        pools: Callable[[], Sequence[Rekeyable]],
    ) -> None:
        self._nodes = nodes
        self._pool_key = pool_key
        self._turn_key = pool_key.removesuffix("pool") + "rekeyer"
        self._server = server
        self._vault = vault
        self._pools = pools
        self._state, self._done, self._total = "idle", 0, 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look from now on whether there is something to do."""
        if self._vault is not None:
            self._task = asyncio.get_running_loop().create_task(self._tend(self._vault))

    async def begin(self) -> Rekeying:
        """Begin, if nothing is under way. O(1). Raises SecretsKeyRequired, StorageUnavailable."""
        if self._vault is None:
            raise SecretsKeyRequired
        name = self._vault.sealer.current.hex()
        try:
            if not await self._execute("HSETNX", self._pool_key, "rekey", f"{name} 0 0"):
                stored = await self._execute("HGET", self._pool_key, "rekey")
                if stored is not None and not stored.startswith(
                    name.encode()
                ):  # one under another key was not done
                    await self._execute("HSET", self._pool_key, "rekey", f"{name} 0 0")
        except UNREACHABLE as error:
            raise StorageUnavailable(f"Valkey: {str(error) or 'no answer'}") from None
        self._state, self._done, self._total = "running", 0, sum(pool.total for pool in self._pools())
        self._wake.set()
        return self.progress()

    def progress(self) -> Rekeying:
        """How far it is, as of a few seconds ago if another server is at it. O(1)."""
        return Rekeying(self._state, self._done, self._total, self._vault is not None)

    async def stop(self) -> None:
        """Stop here; another server goes on, or this one after its next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _execute(self, command: str, key: str, *words: Word) -> Reply:
        return await self._nodes.execute(key, command, key, *words)

    async def _tend(self, vault: Vault) -> None:
        """See every few seconds whether there is something to do."""
        name = vault.sealer.current.hex()
        while True:
            try:
                await self._look(vault, name)
            except (*UNREACHABLE, StorageUnavailable) as error:
                _log.debug("the rekey waits: %s", error)
            except WrongSecretsKey as error:
                self._state = "failed"
                _log.warning(
                    "a key can't be encrypted anew: %s: start with the old secrets key as well", error
                )
            except Exception:
                self._state = "failed"
                _log.exception("the rekey failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()

    async def _look(self, vault: Vault, name: str) -> None:
        stored, clear = await self._execute("HMGET", self._pool_key, "rekey", "clear")
        if clear is None:
            vault.all_sealed()
        if stored is None:
            if self._state == "running":
                self._state, self._done = "idle", self._total
            return
        wanted, done, total = stored.decode().split()
        if wanted != name or self._state == "failed":
            return  # it is for servers with that key, or nothing has changed since it failed
        if not await self._has_turn():
            self._state, self._done, self._total = "running", int(done), int(total)
            return
        try:
            await self._rekey_all(vault, name)
        finally:
            if await self._execute("GET", self._turn_key) == self._server.encode():
                await self._execute("DEL", self._turn_key)

    async def _has_turn(self) -> bool:
        """Whether this server is the one to do it, for some seconds from now on."""
        if await self._execute("SET", self._turn_key, self._server, "NX", "PX", _TURN_MS) is not None:
            return True
        if await self._execute("GET", self._turn_key) != self._server.encode():
            return False
        await self._execute("PEXPIRE", self._turn_key, _TURN_MS)
        return True

    async def _rekey_all(self, vault: Vault, name: str) -> None:
        pools = self._pools()
        self._state, self._done, self._total = "running", 0, sum(pool.total for pool in pools)

        async def on_slice(examined: int) -> None:
            self._done += examined
            self._total = max(self._total, self._done)
            await self._execute("HSET", self._pool_key, "rekey", f"{name} {self._done} {self._total}")
            if not await self._has_turn():
                raise StorageUnavailable("another server has taken over the rekey")

        for pool in pools:
            await pool.rekey(on_slice)
        if len(self._pools()) > len(pools):  # a pool was opened just now
            self._wake.set()
            return
        await self._execute("HSET", self._pool_key, "digests", vault.sealed_digests_key())
        await self._execute("HDEL", self._pool_key, "rekey", "clear")
        vault.all_sealed()
        self._state, self._total = "idle", self._done
        _log.info("all keys are encrypted under the first secrets key: %d keys were looked at", self._done)


async def rekey(partitions: Partitions, on_slice: Callable[[int], Awaitable[object]]) -> None:
    """Seal all keys of a pool under the first secrets key. O(n log n), in slices.

    Goes on where one under the same key was interrupted; one that is complete begins anew. `on_slice` is awaited with
    the number of keys that a slice looked at. Raises StorageUnavailable, and WrongSecretsKey if a key can't be opened.
    """
    vault = partitions.vault
    assert vault is not None
    current = vault.sealer.current
    for partition in range(partitions.count):
        after: Word = ""
        while after != -1:
            last, examined, *found = await partitions.call(partition, "unsealed", (current, after, _SLICE))
            words: list[Word] = []
            for id, text, sealed, info in found:
                words += _resealed(vault, id, text, sealed, info)
            # The last slice lets the next rekey begin at the first key.
            words.insert(0, f"{current.hex()} {max(last, 0)}")
            await partitions.call(partition, "reseal", words)
            await on_slice(examined)
            after = last


def seal_leased(partitions: Partitions, vault: Vault, partition: int, leases: Sequence[Reply]) -> None:
    """Seal those of the leases in a reply of acquire.lua that are in clear, without waiting. About 5 µs for each."""
    words: list[Word] = [""]
    for text, id, _, _, _, *more in leases:
        if len(more) <= _CLEAR_NOW or not more[_CLEAR_NOW]:
            words += _resealed(vault, id, text, b"", more[1] if len(more) > 1 else b"")
    if len(words) > 1:
        partitions.call(partition, "reseal", words)


def _resealed(vault: Vault, id: int, text: bytes, sealed: bytes, info: bytes) -> list[Word]:
    """The words of reseal.lua for a key in clear, or sealed under another key."""
    details = details_in(info)
    if sealed:
        clear, data = vault.open(sealed, id)
    else:
        clear, data = text.decode("utf-8", "surrogatepass"), details.data
    kept = info_of(structs.replace(details, data=None))
    return [id, sealed, vault.member(clear), vault.seal(clear, data, id), hint(clear), kept]
