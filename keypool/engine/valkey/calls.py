"""Script calls on partitions: sent to the node that has the partition, held, resent or refused.

    a call that is       meets                                   and is
    sent                 its reply                               done
    sent                 NOSCRIPT, MOVED, ASK, TRYAGAIN          sent again, as each of these requires
    sent                 UNATTENDED: no server has polled the    held until its keys were given time (`attend`)
                         partition for a while
    sent                 READONLY, LOADING, CLUSTERDOWN, OOM …   503; the node has failed until it accepts a write
    sent                 GONE: the pool isn't there              503, and so is every later call (`gone`)
    sent                 DRAINING: the pool is being emptied     409
    sent                 a lost connection, or 3 s of silence    503: whether it was executed is not known
    sent                 any other error                         a bug: RuntimeError
    new                  a node that isn't serving               held
    held                 the node serves again                   sent
    held                 a second after the node failed          503

A call is resent only if the reply shows that nothing was executed; a held call was never sent, or not executed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import hiredis

from keypool.core.errors import PoolDraining, StorageUnavailable
from keypool.engine.valkey.link import UNREACHABLE, ConnectionLost, Link, Reply, ReplyError, Word
from keypool.engine.valkey.nodes import Nodes
from keypool.engine.valkey.scripts import KEYS, keys_of, scripts, slot_of
from keypool.engine.valkey.url import Address

HELD_SECONDS = 1.0
"""How long calls wait for a node to recover, or for a partition's keys to be given time."""

_MAX_REPEATS = 20  # of one call, for whatever reasons
_TRYAGAIN_PAUSE = 0.05
_UNCHANGED = -1  # the number of available keys in a reply that doesn't say it
_NEGLIGIBLE = 0.005  # seconds; a duration in a reply may be too long by this
_log = logging.getLogger("keypool.valkey")

_CODE = re.compile(r"(?:ERR .*?-)?([A-Z]+)\b")
_NOT_EXECUTED = frozenset({"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "UNATTENDED"})
_NODE_FAILED = frozenset({
    "READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "UNBLOCKED", "OOM", "MISCONF", "NOREPLICAS",
})  # fmt: skip


class OutcomeUnknown(StorageUnavailable):
    """The call was sent, and its reply never came: it may have been executed."""


class ScriptCall(asyncio.Future[Reply]):
    """One call: the future of its reply, from which the count of available keys is removed. Raises StorageUnavailable.

    If it is cancelled before the reply comes, `on_orphaned_reply` is called with the reply.
    """

    # Filled by ScriptClient.call: a Python __init__ would double the cost of a call.
    __slots__ = (
        "client", "command", "held_until", "on_orphaned_reply", "partition", "repeats", "script", "sent_at",
    )  # fmt: skip
    client: ScriptClient
    partition: int
    script: str
    command: bytes
    on_orphaned_reply: Callable[[Reply], None] | None
    sent_at: float
    repeats: int
    held_until: float

    def replied(self, reply: Reply) -> None:
        """Handle the reply, an error or a ConnectionLost."""
        if type(reply) is not list:
            self.client.refused(self, reply)
            return
        available = reply.pop(0)
        if available < _UNCHANGED:
            self.client.on_shares(reply.pop())
            available = -2 - available
        if available >= 0:
            self.client.available[self.partition] = available
            if available:
                self.client.on_available()
        if not self.done():
            self.set_result(reply)
        elif self.on_orphaned_reply is not None:
            self.on_orphaned_reply(reply)

    def fail(self, error: Exception) -> None:
        """Raise the error where the call is awaited, if it is."""
        if not self.done():
            self.set_exception(error)
            self.exception()  # or asyncio would log it where nobody awaits the call

    def age(self) -> float:
        """Seconds by which durations in the reply are out of date, at most; 0 if that is under 5 ms.

        Counted from when the call was sent, so that a holder never overestimates its lease.
        """
        age = self.client.loop.time() - self.sent_at
        return age if age > _NEGLIGIBLE else 0.0


class ScriptClient:
    """The calls of one pool: see the module. After it is made, `nodes.connect` connects to its nodes."""

    def __init__(self, nodes: Nodes, pool: str, partitions: int) -> None:
        self.nodes = nodes
        self.loop = nodes.loop
        self.available = [0] * partitions
        """How many keys each partition had available when it last replied; 0 while it is unreachable."""
        self.gone = nodes.gone
        """Why no call will be served any more."""
        self.on_gone: Callable[[str], None] = nodes.lose_pool
        """Called with the reason when a partition replies that it was emptied. Sets `gone`, or lets it be set."""
        self.on_available: Callable[[], None] = lambda: None
        """Called when a partition replies that it has available keys."""
        self.on_shares: Callable[[Reply], None] = lambda words: None
        """Called with what a reply says about leases that stand in a share (lua/common.lua)."""
        self.on_recovery: Callable[[], None] = lambda: None
        self.on_loss: Callable[[StorageUnavailable], None] = lambda error: None
        """Called when a node or a partition may be serving again."""
        self.attend: Callable[[int], Awaitable[None]] | None = None
        """Awaited before a partition is served again after an outage: gives its keys time (grace.py)."""
        keys = [keys_of(pool, partition, partitions) for partition in range(partitions)]
        self._metas = [names[0] for names in keys]
        self.slots = [slot_of(meta) for meta in self._metas]
        self._slots = self.slots
        # Packed once: each command up to its arguments, except the count of its words.
        self._heads = {
            script.name: [_packed(["EVALSHA", script.sha, len(KEYS), *names]) for names in keys]
            for script in scripts().values()
        }
        self._held: dict[ScriptCall, asyncio.TimerHandle] = {}
        self._attended: set[int] = set()  # partitions for which `attend` is running
        self._suspects: set[int] = set()  # partitions whose nodes refused a write
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        nodes.add(self)

    def call(
        self,
        partition: int,
        script: str,
        arguments: Sequence[Word] = (),
        on_orphaned_reply: Callable[[Reply], None] | None = None,
    ) -> ScriptCall:
        """Call a script. O(arguments), plus the cost of the script."""
        count = 3 + len(KEYS) + len(arguments)
        command = b"*%d\r\n%b%b" % (count, self._heads[script][partition], _packed(arguments))
        call = ScriptCall(loop=self.loop)
        call.client, call.partition, call.script, call.command = self, partition, script, command
        call.on_orphaned_reply = on_orphaned_reply
        call.sent_at = call.held_until = 0.0
        call.repeats = 0
        self._submit(call)
        return call

    @property
    def degraded(self) -> bool:
        """Whether any partition can't be served. O(1)."""
        return bool(self.nodes.failures or self._attended) or self.gone is not None

    @property
    def unreachable(self) -> list[int]:
        """The partitions for which no call can be served. O(partitions)."""
        if self.gone is not None:
            return list(range(len(self._slots)))
        return [
            partition
            for partition in range(len(self._slots))
            if self.node_of(partition) in self.nodes.failures or partition in self._attended
        ]

    def node_of(self, partition: int) -> Address:
        """The node that has a partition, as far as is known."""
        return self.nodes.of_slot[self._slots[partition]]

    async def close(self) -> None:
        """Fail all held calls, and use the connections no more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._refuse_held()
        self.nodes.discard(self)

    # -- sending and holding

    def _submit(self, call: ScriptCall) -> None:
        nodes = self.nodes
        link = nodes.serving.get(nodes.of_slot[self._slots[call.partition]])
        if self.gone is not None:
            call.fail(_unavailable(self.gone))
        elif link is not None and link.up:
            call.sent_at = self.loop.time()
            link.send(call.command, call.replied)
        else:
            self._hold(call)

    def _hold(self, call: ScriptCall) -> None:
        """Keep a call that was not executed for up to HELD_SECONDS, until it can be sent."""
        if self._closed or self.nodes.closed:
            call.fail(_unavailable("the server is closing its connections"))
            return
        address = self.node_of(call.partition)
        if not self.nodes.recovering and call.partition not in self._attended:
            self.nodes.fail(address, "not connected")
        failure = self.nodes.failures.get(address)
        now = self.loop.time()
        if not call.held_until:
            # Counted from the node's failure: if it failed longer ago, the call is refused at once.
            call.held_until = (failure.since if failure else now) + HELD_SECONDS
        if now >= call.held_until:
            self._give_up(call)
        else:
            self._held[call] = self.loop.call_at(call.held_until, self._give_up, call)

    def _give_up(self, call: ScriptCall) -> None:
        self._held.pop(call, None)
        call.fail(_unavailable(self._reason(call.partition)))

    def _reason(self, partition: int) -> str:
        """Why the partition isn't served."""
        if self.gone is not None:
            return self.gone
        if partition in self._attended:
            return "keys are being given time after an outage"
        failure = self.nodes.failures.get(self.node_of(partition))
        return failure.reason if failure else self.nodes.failing or "not connected"

    def _send_held(self) -> None:
        for call, timer in list(self._held.items()):
            link = self.nodes.serving.get(self.node_of(call.partition))
            if link is not None and link.up and call.partition not in self._attended:
                timer.cancel()
                del self._held[call]
                self._submit(call)

    def _refuse_held(self) -> None:
        for call, timer in list(self._held.items()):
            timer.cancel()
            self._give_up(call)

    # -- refusals

    def refused(self, call: ScriptCall, error: ReplyError | ConnectionLost) -> None:
        """Resend the call if it was not executed and resending can help; otherwise fail it."""
        if isinstance(error, ConnectionLost):
            unknown = f"{error} before it answered; whether the call was executed is not known; try again"
            call.fail(OutcomeUnknown(unknown))
            return
        call.repeats += 1
        text = str(error)
        found = _CODE.match(text)
        code = found[1] if found else ""
        if code in _NOT_EXECUTED and call.repeats <= _MAX_REPEATS and not self._closed:
            self._repeat(call, code, text)
        elif code in _NODE_FAILED or code in _NOT_EXECUTED:
            self._suspects.add(call.partition)
            self.nodes.fail(self.node_of(call.partition), text)
            call.fail(_unavailable(f"Valkey refuses: {text}"))
        elif code == "GONE":
            reason = text.removeprefix("GONE ")
            self.on_gone(reason)
            call.fail(_unavailable(reason))
        elif code == "DRAINING":
            call.fail(PoolDraining())
        else:
            call.fail(RuntimeError(f"the script {call.script} failed: {text}"))

    def _repeat(self, call: ScriptCall, code: str, text: str) -> None:
        if code == "TRYAGAIN":  # the slot is moving from one node to another
            self.loop.call_later(_TRYAGAIN_PAUSE, self._submit, call)
        elif code == "UNATTENDED":
            if call.partition not in self._attended:
                self._attended.add(call.partition)
                self._start(self._attend(call.partition))
            self._hold(call)
        elif code == "NOSCRIPT":
            self._start(self._load_and_submit(call))
        elif code == "ASK":
            self._start(self._send_asking(call, _address_in(text)))
        else:
            self.nodes.of_slot[self._slots[call.partition]] = _address_in(text)
            self.nodes.recover()
            self._submit(call)

    async def _load_and_submit(self, call: ScriptCall) -> None:
        try:
            link = await self.nodes.link_to(self.node_of(call.partition))
            await link.execute("SCRIPT", "LOAD", scripts()[call.script].text)
        except UNREACHABLE as error:
            call.fail(_unavailable(f"Valkey doesn't load a script: {error}"))
        else:
            self._submit(call)

    async def _send_asking(self, call: ScriptCall, address: Address) -> None:
        try:
            link = await self.nodes.link_to(address)
        except UNREACHABLE as error:
            call.fail(_unavailable(f"a node of the cluster can't be reached: {error}"))
            return
        call.sent_at = self.loop.time()
        link.execute("ASKING")
        link.send(call.command, call.replied)

    async def _attend(self, partition: int) -> None:
        try:
            if self.attend is not None:
                await self.attend(partition)
        except StorageUnavailable as error:
            _log.debug("partition %d could not be given time: %s", partition, error.detail)
        except RuntimeError:
            _log.exception("partition %d could not be given time", partition)
        finally:
            self._attended.discard(partition)
        self._send_held()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- called by Nodes

    def node_failed(self, address: Address | None) -> None:
        """Assume that no key is available there, so that acquires go to the other partitions."""
        for partition in range(len(self._slots)):
            if address in (None, self.node_of(partition)):
                self.available[partition] = 0
        if address is None:
            self.lose(self.nodes.gone or "the pool is gone")

    def lose(self, reason: str) -> None:
        """Refuse all calls from now on: the pool is not there any more."""
        self.gone = self.gone or reason
        self._refuse_held()
        self.on_loss(_unavailable(self.gone))

    def recovered(self) -> None:
        """Send the calls that were held."""
        self._send_held()
        self.on_recovery()

    async def check_writable(self, address: Address, link: Link) -> None:
        """Make a write that changes nothing. HINCRBY, as commands that need memory are the first to be refused."""
        for partition in [each for each in self._suspects if self.node_of(each) == address]:
            await link.execute("HINCRBY", self._metas[partition], "id", 0)
            self._suspects.discard(partition)


async def all_of(calls: Sequence[ScriptCall]) -> list[Reply]:
    """The replies, once every call has ended. Raises the error of the first call that failed."""
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


NEVER_US = 2**52
"""Microseconds in a reply from which on they stand for ever (lua/common.lua)."""


def expires_in(microseconds: int, age: float) -> float | None:
    """The time to an expiry in a reply, as `seconds_left`; None if the key never expires."""
    return None if microseconds > NEVER_US else seconds_left(microseconds, age)


def seconds_left(microseconds: int, age: float) -> float:
    """A duration in a reply, as of now, in seconds rounded to ms; `age` is that of the call."""
    return round(max(0.0, microseconds / 1e6 - age), 3)


def _unavailable(reason: str) -> StorageUnavailable:
    return StorageUnavailable(f"{reason}; try again")


def _address_in(text: str) -> Address:
    """The address in `MOVED 3999 127.0.0.1:6381`."""
    host, _, port = text.split()[2].rpartition(":")
    return host, int(port)


def _packed(words: Sequence[Word]) -> bytes:
    """The words in wire format, without the leading count."""
    return (
        cast("bytes", hiredis.pack_command(cast("Any", tuple(words)))).partition(b"\n")[2] if words else b""
    )
