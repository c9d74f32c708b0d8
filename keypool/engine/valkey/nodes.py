"""The Valkeys behind an engine: who has which partition, how to reach them, and what to do when they say no.

    call -> node of the partition -> link -> reply
                 |                             |-- NOSCRIPT, MOVED, ASK, TRYAGAIN: nothing ran, so once more
                 |                             |-- UNATTENDED: the partition is given time first (attend), then as above
                 |                             |-- READONLY, LOADING, CLUSTERDOWN, OOM …: 503, and mend
                 |                             |-- GONE: the pool isn't there any more: 503 from now on
                 |-- no link: held for a second while it is mended, then 503
                                               `-- lost, or silence: 503, the outcome is not known; and mend

A command is repeated only where the answer says that nothing ran, or if it never left. Mending looks up who
has what (in a cluster), connects, sees that it is the pool that was opened, and has those who refused to write
prove that they do; it goes on until that has come to an end without an error, with back-off and jitter, whether
or not somebody calls meanwhile. Troubles are kept by address: the partitions of other nodes go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from keypool.core.errors import StorageUnavailable
from keypool.engine.valkey.link import Link, Lost, Measured, Reply, ReplyError, connect
from keypool.engine.valkey.scripts import KEYS, SLOTS, Script, keys_of, scripts, slot_of
from keypool.engine.valkey.url import Address, ValkeyUrl

HELD_SECONDS = 1.0
"""How long calls wait for a connection that is being mended, or for a partition that is being given time."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # between attempts to mend
_REPEATS = 20  # of one command at most, for whatever reasons
_TRYAGAIN_PAUSE = 0.05
_log = logging.getLogger("keypool.valkey")

_CODE = re.compile(r"(?:ERR .*?-)?([A-Z]+)\b")
_NOTHING_RAN = frozenset({"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "UNATTENDED"})
_AWAY = frozenset({
    "READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "UNBLOCKED", "OOM", "MISCONF", "NOREPLICAS",
})  # fmt: skip

Word = str | bytes | int | float


class OutcomeUnknown(StorageUnavailable):
    """The call was sent, and its answer never came: it may have been done."""


class Answer(asyncio.Future[Reply]):
    """A script's answer."""

    sent_at = 0.0
    """On the loop's clock. The script ran after it, so what it said of lengths of time is no older than that."""


class Job:
    """One script call on its way."""

    __slots__ = ("command", "future", "held_until", "nodes", "partition", "repeats", "script", "unheard")

    def __init__(
        self,
        nodes: Nodes,
        partition: int,
        script: Script,
        command: bytes,
        unheard: Callable[[Reply], None] | None,
    ) -> None:
        self.nodes = nodes
        self.partition = partition
        self.script = script
        self.command = command
        self.unheard = unheard
        self.future = Answer(loop=nodes.loop)
        self.repeats = 0
        self.held_until = 0.0

    def replied(self, reply: Reply) -> None:
        """What came of it."""
        if type(reply) is list:
            if not self.future.done():
                self.future.set_result(reply)
            elif self.unheard is not None:
                self.unheard(reply)
        else:
            self.nodes.refused(self, reply)

    def fail(self, error: Exception) -> None:
        """It came to nothing."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # whether or not somebody still waits for it


@dataclass(slots=True)
class _Trouble:
    """Why the partitions at an address can't be served, and since when by the loop's clock."""

    reason: str
    since: float


class Nodes:
    """See the module. `open` first, then `set_partitions`, then there may be calls."""

    def __init__(self, url: ValkeyUrl, measured: Measured) -> None:
        self.loop = asyncio.get_running_loop()
        self.gone: str | None = None
        """Why no call will ever be served any more: the pool that was opened isn't there."""
        self._url = url
        self._measured = measured
        self.on_back: Callable[[], None] = lambda: None
        """Called whenever some partitions can be served again after they couldn't."""
        self.on_trouble: Callable[[Sequence[int]], None] = lambda partitions: None
        """Called with partitions that can't be served from now on."""
        self.verify: Callable[[], Awaitable[None]] | None = None
        """Asked before a new connection serves: has `lose` called if another pool is there."""
        self.attend: Callable[[int], Awaitable[None]] | None = None
        """Gives the keys of a partition time after an outage, and has it served again."""
        self._links: dict[Address, Link] = {}
        self._serving: dict[Address, Link] = {}  # those of `_links` that were found fit to serve
        self._troubles: dict[Address, _Trouble] = {}
        self._error: str | None = "not connected yet"  # what is wrong with no one address
        self._attending: set[int] = set()
        self._of_slot: list[Address] = [url.nodes[0]] * SLOTS
        self._of_partition: list[Address] = []
        self._slot_of_partition: list[int] = []
        self._heads: dict[str, list[bytes]] = {}
        self._held: dict[Job, asyncio.TimerHandle] = {}
        self._suspects: set[int] = set()
        self._mending: asyncio.Task[None] | None = None
        self._again = False
        self._closed = False
        self._background: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect. Raises OSError, ReplyError or Lost."""
        await self._mend_once()
        self._error = None

    async def set_partitions(self, partitions: int) -> None:
        """Tell how many there are, and connect to those who have them. Raises OSError, ReplyError or Lost."""
        keys = [keys_of(self._url.pool, partition, partitions) for partition in range(partitions)]
        self._slot_of_partition = [slot_of(names[0]) for names in keys]
        for script in scripts().values():
            call = ["EVALSHA", script.sha, str(len(KEYS))]
            self._heads[script.name] = [_packed([*call, *names]) for names in keys]
        self._assign()
        await self._mend_once()

    def call(
        self,
        partition: int,
        name: str,
        arguments: Sequence[Word],
        unheard: Callable[[Reply], None] | None = None,
    ) -> Answer:
        """The answer of a script. Raises StorageUnavailable.

        If the future is cancelled before the answer comes, the answer is told to `unheard`.
        """
        command = b"*%d\r\n%b%b" % (
            3 + len(KEYS) + len(arguments),
            self._heads[name][partition],
            _packed(arguments),
        )
        job = Job(self, partition, scripts()[name], command, unheard)
        self._submit(job)
        return job.future

    async def ask(self, key: str, *words: Word) -> Reply:
        """The reply to a command about a key with a tag. Raises OSError, ReplyError or Lost. For the start."""
        link = await self._link_to(self._of_slot[slot_of(key)])
        return await link.ask(*[str(word) for word in words])

    async def everywhere(self, *words: Word) -> list[Reply]:
        """The replies of all nodes that have slots. Raises OSError, ReplyError or Lost. For the start."""
        links = [await self._link_to(address) for address in dict.fromkeys(self._of_slot)]
        return [await link.ask(*[str(word) for word in words]) for link in links]

    def any_node(self) -> Address:
        """Some node that may well be up."""
        up = [address for address, link in self._links.items() if link.up]
        return random.choice(up or list(self._url.nodes))  # noqa: S311 - no secret

    async def connection(self, address: Address, on_lost: Callable[[Link, str], None]) -> Link:
        """A connection beside those for calls. Raises OSError, ReplyError or Lost."""
        return await connect(address, self._url.tls, self._hello(), self._measured, on_lost)

    @property
    def failing(self) -> str | None:
        """Why some calls can't be served, by address; None while all is well. O(nodes that are in trouble)."""
        if self.gone is not None or not self._troubles:
            return self.gone or self._error
        shown = [
            reason if reason.startswith(where) else f"{where}: {reason}"
            for (host, port), trouble in self._troubles.items()
            for where, reason in [(f"{host}:{port}", trouble.reason)]
        ]
        return "; ".join(shown)

    @property
    def in_trouble(self) -> bool:
        """Whether some partition can't be served. O(1)."""
        return bool(self._troubles or self._attending) or self.gone is not None

    @property
    def unreachable(self) -> list[int]:
        """The partitions for which no call can be served. O(partitions)."""
        if self.gone is not None:
            return list(range(len(self._of_partition)))
        return [
            partition
            for partition, address in enumerate(self._of_partition)
            if address in self._troubles or partition in self._attending
        ]

    def lose(self, reason: str) -> None:
        """The pool isn't there any more: refuse all calls, until the server is started again."""
        if self.gone is None:
            _log.error("%s: no call is served until this server is started again", reason)
            self.gone = reason
            self._refuse_held()
            self.on_trouble(range(len(self._of_partition)))

    @property
    def in_flight(self) -> int:
        """How many replies are due."""
        return sum(link.in_flight for link in self._links.values())

    async def close(self) -> None:
        """Close all connections."""
        self._closed = True
        tasks = [task for task in (self._mending, *self._background) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._refuse_held()
        for link in list(self._links.values()):
            link.close()
        await asyncio.sleep(0)  # in which the loop closes them

    # -- one call

    def _submit(self, job: Job) -> None:
        link = self._serving.get(self._of_partition[job.partition])
        if self.gone is not None:
            job.fail(_unavailable(self.gone))
        elif link is not None and link.up:
            job.future.sent_at = self.loop.time()
            link.send(job.command, job.replied)
        else:
            self._hold(job)

    def _hold(self, job: Job) -> None:
        """It never left, or nothing ran: it may wait for a while."""
        address = self._of_partition[job.partition]
        if self._closed:
            job.fail(_unavailable("the server is closing its connections"))
            return
        if self._mending is None and job.partition not in self._attending:
            self._trouble(address, "not connected")
        trouble = self._troubles.get(address)
        now = self.loop.time()
        if not job.held_until:
            # Not for what has been out of reach for long: its callers are answered at once.
            job.held_until = (trouble.since if trouble else now) + HELD_SECONDS
        if now >= job.held_until:
            job.fail(_unavailable(self._why(job.partition)))
        else:
            self._held[job] = self.loop.call_at(job.held_until, self._give_up, job)

    def _give_up(self, job: Job) -> None:
        del self._held[job]
        job.fail(_unavailable(self._why(job.partition)))

    def _why(self, partition: int) -> str:
        if self.gone is not None:
            return self.gone
        if partition in self._attending:
            return "keys are being given time after an outage"
        trouble = self._troubles.get(self._of_partition[partition])
        return trouble.reason if trouble else self.failing or "not connected"

    def _release_held(self) -> None:
        """Send what was held for partitions that can be served by now."""
        for job, timer in list(self._held.items()):
            link = self._serving.get(self._of_partition[job.partition])
            if link is not None and link.up and job.partition not in self._attending:
                timer.cancel()
                del self._held[job]
                self._submit(job)

    def refused(self, job: Job, reply: Reply) -> None:
        """It wasn't answered: again, if nothing ran and it may help, else 503."""
        job.repeats += 1
        if isinstance(reply, Lost):
            job.fail(
                OutcomeUnknown(
                    f"{reply} before it answered; whether the call was done is not known; try again"
                )
            )
            return
        text = str(reply)
        found = _CODE.match(text)
        code = found[1] if found else ""
        if code in _NOTHING_RAN and job.repeats <= _REPEATS and not self._closed:
            self._repeat(job, code, text)
        elif code in _AWAY or code in _NOTHING_RAN:
            self._suspects.add(job.partition)
            self._trouble(self._of_partition[job.partition], text)
            job.fail(_unavailable(f"Valkey refuses: {text}"))
        elif code == "GONE":
            self.lose(text.removeprefix("GONE "))
            job.fail(_unavailable(text.removeprefix("GONE ")))
        else:
            job.fail(RuntimeError(f"the script {job.script.name} failed: {text}"))

    def _repeat(self, job: Job, code: str, text: str) -> None:
        if code == "TRYAGAIN":  # the slot is on its way from one node to another
            self.loop.call_later(_TRYAGAIN_PAUSE, self._submit, job)
        elif code == "UNATTENDED":
            self._attend_to(job.partition)
            self._hold(job)
        elif code == "NOSCRIPT":
            self._background_task(self._load_and_submit(job))
        elif code == "ASK":
            self._background_task(self._ask_there(job, _address_in(text)))
        else:
            self._of_partition[job.partition] = _address_in(text)
            self._look_again()
            self._submit(job)

    async def _load_and_submit(self, job: Job) -> None:
        link = self._links.get(self._of_partition[job.partition])
        try:
            if link is not None:
                await link.ask("SCRIPT", "LOAD", job.script.text)
        except (ReplyError, Lost) as error:
            job.fail(_unavailable(f"Valkey takes no script: {error}"))
        else:
            self._submit(job)

    def _attend_to(self, partition: int) -> None:
        if partition not in self._attending:
            self._attending.add(partition)
            self._background_task(self._give_time(partition))

    async def _give_time(self, partition: int) -> None:
        try:
            if self.attend is not None:
                await self.attend(partition)
        except StorageUnavailable as error:
            _log.debug("partition %d could not be given time: %s", partition, error.detail)
        except RuntimeError:
            _log.exception("partition %d could not be given time", partition)
        finally:
            self._attending.discard(partition)
        self._release_held()

    async def _ask_there(self, job: Job, address: Address) -> None:
        try:
            link = await self._link_to(address)
        except (OSError, ReplyError, Lost) as error:
            job.fail(_unavailable(f"a node of the cluster can't be reached: {error}"))
            return
        job.future.sent_at = self.loop.time()
        link.send(_command("ASKING"), lambda reply: None)
        link.send(job.command, job.replied)

    def _background_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- mending

    def _trouble(self, address: Address, reason: str) -> None:
        """Something is wrong there: mend it."""
        if not self._closed:
            self._note(address, reason)
            self._look_again()

    def _note(self, address: Address, reason: str) -> None:
        trouble = self._troubles.get(address)
        if trouble is not None:
            trouble.reason = reason
            return
        self._troubles[address] = _Trouble(reason, self.loop.time())
        partitions = [number for number, each in enumerate(self._of_partition) if each == address]
        if partitions:
            _log.warning("Valkey at %s:%d: %s", *address, reason)
            self.on_trouble(partitions)

    def _look_again(self) -> None:
        self._again = True
        if self._mending is None and not self._closed:
            self._mending = self.loop.create_task(self._mend())

    async def _mend(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._again and self.gone is None:
                self._again = False
                try:
                    await self._mend_once()
                    self._error = None
                except Exception as error:
                    if not isinstance(error, (OSError, ReplyError, Lost)):
                        _log.exception("mending failed")
                    self._error, self._again = str(error), True
                self._release_held()
                if self._again:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                    pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._mending = None

    async def _mend_once(self) -> None:
        """Connect to all that have partitions. Raises what one that failed raised, when all have been tried."""
        if self._url.cluster:
            self._read_slots(await self._topology())
        elif len(self._url.nodes) > 1:
            self._of_slot = [await self._primary()] * SLOTS
            self._assign()
        wanted = set(self._of_partition) or {self._of_slot[0]}
        results = await asyncio.gather(*map(self._fit, wanted), return_exceptions=True)
        if self.verify is not None:
            # A node that can't be asked has no say; its own partitions aren't served meanwhile.
            with contextlib.suppress(OSError, ReplyError, Lost):
                await self.verify()
        self._take(dict(zip(wanted, results, strict=True)))
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _take(self, found: dict[Address, Link | BaseException]) -> None:
        """Have those serve that are fit for it; let go of those that have no partitions any more."""
        back = False
        for address, result in found.items():
            if isinstance(result, BaseException):
                self._note(address, str(result))
                continue
            if not result.up:  # lost while others were being connected to: its trouble is noted, and stays
                continue
            self._serving[address] = result
            if self._troubles.pop(address, None) is not None and self._of_partition:
                back = True
                _log.info("Valkey at %s:%d serves again", *address)
        for address in set(self._troubles) - set(found):
            back = True
            del self._troubles[address]
        for address in set(self._links) - set(found):
            if not self._links[address].in_flight:
                self._serving.pop(address, None)
                self._links.pop(address).close()
        if back:
            self._release_held()
            self.on_back()

    async def _fit(self, address: Address) -> Link:
        """A connection to a node that may serve its partitions. Raises OSError, ReplyError or Lost."""
        link = await self._link_to(address)
        await _prove_primary(link)
        if self._serving.get(address) is not link:
            await _refuse_eviction(link)
        for partition in [each for each in self._suspects if self._of_partition[each] == address]:
            # A write that changes nothing, of the sort that is refused first.
            meta = keys_of(self._url.pool, partition, len(self._of_partition))[0]
            await link.ask("HINCRBY", meta, "id", 0)
            self._suspects.discard(partition)
        return link

    async def _primary(self) -> Address:
        """Which of the addresses is the primary. Raises OSError unless one, and only one, says so: with two of
        them, servers could go to different ones, and each would serve the same keys.
        """
        found = []
        links = await asyncio.gather(*map(self._link_to, self._url.nodes), return_exceptions=True)
        for address, link in zip(self._url.nodes, links, strict=True):
            if isinstance(link, Link):
                try:
                    await _prove_primary(link)
                    found.append(address)
                except (OSError, ReplyError, Lost) as error:
                    _log.debug("%s:%s isn't the primary: %s", *address, error)
        if len(found) != 1:
            names = ", ".join(f"{host}:{port}" for host, port in found or self._url.nodes)
            raise OSError(
                f"{names} are all primaries" if found else f"none of {names} is a primary that answers"
            )
        return found[0]

    async def _topology(self) -> Reply:
        """What some node says about who has which slots. Raises what the last one that was asked raises."""
        up = [address for address, link in self._links.items() if link.up]
        known = list(dict.fromkeys([*up, *self._links, *self._of_slot[:: SLOTS // 64], *self._url.nodes]))
        last: Exception = OSError("no node of the cluster is known")
        for address in known:
            try:
                link = await self._link_to(address)
                return [address, await link.ask("CLUSTER", "SLOTS")]
            except (OSError, ReplyError, Lost) as error:
                last = error
        raise last

    def _read_slots(self, told: Reply) -> None:
        asked, ranges = told
        covered = 0
        for first, last, primary, *_ in ranges:
            host = primary[0].decode() if primary[0] else asked[0]
            self._of_slot[first : last + 1] = [(host, primary[1])] * (last + 1 - first)
            covered += last + 1 - first
        if covered < SLOTS:
            raise OSError(f"the cluster serves {covered} of {SLOTS} slots")
        self._assign()

    def _assign(self) -> None:
        self._of_partition = [self._of_slot[slot] for slot in self._slot_of_partition]

    async def _link_to(self, address: Address) -> Link:
        link = self._links.get(address)
        if link is not None and link.up:
            return link
        try:
            link = await self.connection(address, self._link_lost)
        except OSError as error:
            raise OSError(f"{address[0]}:{address[1]}: {error.strerror or error}") from None
        try:
            await asyncio.gather(*(link.ask("SCRIPT", "LOAD", script.text) for script in scripts().values()))
        except BaseException:
            link.close()
            raise
        other = self._links.get(address)
        if other is not None and other.up:
            link.close()
            return other
        self._links[address] = link
        return link

    def _hello(self) -> list[tuple[str | int, ...]]:
        said: list[tuple[str | int, ...]] = []
        if self._url.password is not None:
            user = (self._url.user,) if self._url.user else ()
            said.append(("AUTH", *user, self._url.password))
        if self._url.db:
            said.append(("SELECT", self._url.db))
        said.append(("CLIENT", "SETNAME", "keypool"))
        return said

    def _link_lost(self, link: Link, why: str) -> None:
        address = next((address for address, each in self._links.items() if each is link), None)
        if address is not None:
            self._trouble(address, why)

    def _refuse_held(self) -> None:
        held, self._held = self._held, {}
        for job, timer in held.items():
            timer.cancel()
            job.fail(_unavailable(self._why(job.partition)))


async def _prove_primary(link: Link) -> None:
    """Raises OSError unless it is one, ReplyError while it loads."""
    await link.ask("PING")
    try:
        role = await link.ask("ROLE")
    except ReplyError as error:
        if not str(error).startswith("NOPERM"):
            raise
    else:
        if role[0] != b"master":
            raise OSError("READONLY: it is a replica")


async def _refuse_eviction(link: Link) -> None:
    """Raises OSError if Valkey would throw away what it was given when memory is short. Not every one tells."""
    try:
        told = (await link.ask("INFO", "memory")).decode()
    except ReplyError as error:
        _log.warning("whether Valkey's maxmemory-policy is noeviction, as it must be, isn't known: %s", error)
        return
    found = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    policy = found.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return
    if found.get("maxmemory") != "0":
        raise OSError(f"maxmemory-policy is {policy}, which throws keys away: set it to noeviction")
    _log.warning("Valkey's maxmemory-policy is %s: before you set a maxmemory, set it to noeviction", policy)


def _unavailable(why: str) -> StorageUnavailable:
    return StorageUnavailable(f"{why}; try again")


def _address_in(text: str) -> Address:
    """The address in `MOVED 3999 127.0.0.1:6381`."""
    host, _, port = text.split()[2].rpartition(":")
    return host, int(port)


def _packed(words: Sequence[Word]) -> bytes:
    parts = []
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def _command(*words: Word) -> bytes:
    return b"*%d\r\n%b" % (len(words), _packed(words))
