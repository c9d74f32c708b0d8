"""The Valkeys behind an engine: who has which partition, how to reach them, and what to do when they say no.

    call -> node of the partition -> link -> reply
                 |                             |-- NOSCRIPT, MOVED, ASK, TRYAGAIN: nothing ran, so once more
                 |                             |-- READONLY, LOADING, CLUSTERDOWN, OOM …: 503, and mend
                 |-- no link: held for a second while it is mended, then 503
                                               `-- lost, or silence: 503, the outcome is not known; and mend

A command is repeated only where the answer says that nothing ran, or if it never left. Mending looks up who
has what (in a cluster), connects, and has those who refused to write prove that they do; it goes on until
that has come to an end without an error, with back-off and jitter, whether or not somebody calls meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from keypool.engine.valkey_link import Link, Lost, Measured, Reply, ReplyError, connect
from keypool.engine.valkey_scripts import KEYS, SLOTS, Script, keys_of, scripts, slot_of
from keypool.engine.valkey_url import Address, ValkeyUrl
from keypool.errors import StorageUnavailable

HELD_SECONDS = 1.0
"""How long calls wait for a connection that is being mended."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # between attempts to mend
_REPEATS = 20  # of one command at most, for whatever reasons
_TRYAGAIN_PAUSE = 0.05
_log = logging.getLogger("keypool.valkey")

_CODE = re.compile(r"(?:ERR .*?-)?([A-Z]+)\b")
_AWAY = frozenset({"READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "UNBLOCKED"})
_FULL = frozenset({"OOM", "MISCONF", "NOREPLICAS"})

Word = str | bytes | int | float


class OutcomeUnknown(StorageUnavailable):
    """The call was sent, and its answer never came: it may have been done."""


class Answer(asyncio.Future[Reply]):
    """A script's answer."""

    sent_at = 0.0
    """On the loop's clock. The script ran after it, so what it said of lengths of time is no older than that."""


class Job:
    """One script call on its way."""

    __slots__ = ("command", "future", "nodes", "partition", "repeats", "script", "unheard")

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


class Nodes:
    """See the module. `open` first, then `set_partitions`, then there may be calls."""

    def __init__(self, url: ValkeyUrl, measured: Measured) -> None:
        self.loop = asyncio.get_running_loop()
        self.failing: str | None = "not connected yet"
        """Why some calls can't be served; None while all is well."""
        self._url = url
        self._measured = measured
        self.on_back: Callable[[], None] = lambda: None
        """Called whenever all is well again after it wasn't."""
        self._links: dict[Address, Link] = {}
        self._of_slot: list[Address] = [url.nodes[0]] * SLOTS
        self._of_partition: list[Address] = []
        self._slot_of_partition: list[int] = []
        self._heads: dict[str, list[bytes]] = {}
        self._held: list[Job] = []
        self._held_until: float | None = None
        self._suspects: set[int] = set()
        self._mending: asyncio.Task[None] | None = None
        self._again = False
        self._closed = False
        self._background: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect. Raises OSError, ReplyError or Lost."""
        await self._mend_once()
        self.failing = None

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
        link = self._links.get(self._of_partition[job.partition])
        if link is not None and link.up:
            job.future.sent_at = self.loop.time()
            link.send(job.command, job.replied)
        else:
            self._hold(job)

    def _hold(self, job: Job) -> None:
        """There is no connection: it never left, so it may wait for one."""
        if self._closed:
            job.fail(_unavailable("the server is closing its connections"))
            return
        if self._mending is None:
            self._trouble("not connected")
        if self._held_until is not None and self.loop.time() >= self._held_until:
            job.fail(_unavailable(self.failing or "not connected"))
            return
        self._held.append(job)

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
        if code in ("NOSCRIPT", "MOVED", "ASK", "TRYAGAIN") and job.repeats <= _REPEATS and not self._closed:
            self._repeat(job, code, text)
        elif code in _AWAY or code in ("MOVED", "ASK", "TRYAGAIN"):
            self._trouble(text)
            job.fail(_unavailable(f"Valkey refuses: {text}"))
        elif code in _FULL:
            self._suspects.add(job.partition)
            self._trouble(text)
            job.fail(_unavailable(f"Valkey refuses: {text}"))
        else:
            job.fail(RuntimeError(f"the script {job.script.name} failed: {text}"))

    def _repeat(self, job: Job, code: str, text: str) -> None:
        if code == "TRYAGAIN":  # the slot is on its way from one node to another
            self.loop.call_later(_TRYAGAIN_PAUSE, self._submit, job)
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

    def _trouble(self, reason: str) -> None:
        """Something is wrong: mend it."""
        if self._closed:
            return
        if self.failing is None:
            _log.warning("Valkey: %s", reason)
        self.failing = reason
        self._look_again()

    def _look_again(self) -> None:
        self._again = True
        if self._mending is None and not self._closed:
            self._held_until = self.loop.time() + HELD_SECONDS
            self.loop.call_later(HELD_SECONDS, self._refuse_held)
            self._mending = self.loop.create_task(self._mend())

    async def _mend(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._again:
                self._again = False
                try:
                    await self._mend_once()
                except Exception as error:
                    if not isinstance(error, (OSError, ReplyError, Lost)):
                        _log.exception("mending failed")
                    self._trouble(str(error))
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                    pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._mending = None
        was, self.failing, self._held_until = self.failing, None, None
        held, self._held = self._held, []
        for job in held:
            self._submit(job)
        if was is not None:
            _log.info("Valkey serves again")
            self.on_back()

    async def _mend_once(self) -> None:
        if self._url.cluster:
            self._read_slots(await self._topology())
        elif len(self._url.nodes) > 1:
            self._of_slot = [await self._primary()] * SLOTS
            self._assign()
        wanted = set(self._of_partition) or {self._of_slot[0]}
        results = await asyncio.gather(*map(self._link_to, wanted), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        for link in results:
            if isinstance(link, Link):
                await _prove_primary(link)
        for partition in list(self._suspects):
            # A write that changes nothing, of the sort that is refused first.
            meta = keys_of(self._url.pool, partition, len(self._of_partition))[0]
            await (await self._link_to(self._of_partition[partition])).ask("HINCRBY", meta, "id", 0)
            self._suspects.discard(partition)
        for address in set(self._links) - wanted:
            if not self._links[address].in_flight:
                self._links.pop(address).close()

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
            await asyncio.gather(*(link.ask("SCRIPT", "LOAD", script.text) for script in scripts().values()))
        except OSError as error:
            raise OSError(f"{address[0]}:{address[1]}: {error.strerror or error}") from None
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
        if self._links.get(self._address_of(link)) is link:
            self._trouble(why)

    def _address_of(self, link: Link) -> Address:
        return next((address for address, each in self._links.items() if each is link), ("", 0))

    def _refuse_held(self) -> None:
        held, self._held = self._held, []
        for job in held:
            job.fail(_unavailable(self.failing or "not connected"))


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
