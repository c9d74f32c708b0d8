"""The paths of the first version of this service, whose clients work unchanged.

They are operations like the others, each with the effect of the current call in its name. Errors have a `message` in
addition to the members of a problem.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from keypool.api.calls import ADMIN, CLIENT, VIEWER, Call
from keypool.api.operations import Operation, delete_audited, generate_audited, unblock
from keypool.core.answers import Answer
from keypool.core.cursor import ListQuery
from keypool.core.errors import BadRequest, ManySeats, NoKeyAvailable, PoolFull, UnknownKey
from keypool.engine import Engine

_UNKNOWN = "Kindly send key to be updated, given key does not exist"


class ApiKey(Answer):
    """A key in the first version's form."""

    api_key: str


class Message(Answer):
    """The result in words."""

    message: str


class KeyQuery(msgspec.Struct, forbid_unknown_fields=True):
    """The query by which the first version names a key."""

    api_key: Annotated[str, Meta(description="the key")] = ""


class UnknownApiKey(BadRequest):
    """An unknown key, with the first version's answer."""

    def __init__(self) -> None:
        super().__init__("no such key: api_key must be a live key")
        self.message = _UNKNOWN


async def _generate(engine: Engine, call: Call) -> ApiKey:
    return ApiKey((await generate_audited(engine, call)).key)


async def _acquire(engine: Engine, call: Call) -> ApiKey:
    return ApiKey((await engine.acquire(None, 0)).key)


async def _acquire_head(engine: Engine, call: Call) -> Any:
    """HEAD shows whether a key is available without blocking it, as its answer has no body to name the key."""
    released = await engine.page(ListQuery(order="release", limit=1))
    cooled = await engine.page(ListQuery(order="ready", limit=1))
    stats = await engine.stats()
    if not stats.available:
        due = [key.release_in for key in released.keys] + [key.available_in for key in cooled.keys]
        raise NoKeyAvailable(
            min((seconds for seconds in due if seconds is not None), default=None),
            blocked=stats.blocked,
            cooling=stats.cooling,
            quarantined=stats.quarantined,
        )
    return Message("a key is available")


async def _unblock(engine: Engine, call: Call) -> Message:
    try:
        await unblock(engine, call, call.query.api_key)
    except UnknownKey:
        raise UnknownApiKey from None
    return Message("the key is available again")


async def _delete(engine: Engine, call: Call) -> Message:
    try:
        await delete_audited(engine, call, call.query.api_key)
    except UnknownKey:
        raise UnknownApiKey from None
    return Message("the key was purged")


async def _scheduler(engine: Engine, call: Call) -> Message:
    return Message("there is nothing to start: the timers always run")


_PATH = "/random_api_key"

# fmt: off
LEGACY: tuple[Operation, ...] = (
    Operation("legacy-generate", "POST", _PATH, ADMIN, "generate, as in the first version.",
        _generate, ApiKey, status=201, errors=(PoolFull,), legacy=True),
    Operation("legacy-acquire", "GET", _PATH, CLIENT, "acquire, as in the first version: a GET that blocks a key.",
        _acquire, ApiKey, errors=(NoKeyAvailable,), legacy=True, head=_acquire_head, acquires=True),
    Operation("legacy-unblock", "PUT", _PATH, CLIENT, "unblock, as in the first version.",
        _unblock, Message, query=KeyQuery, errors=(BadRequest, ManySeats), legacy=True),
    Operation("legacy-delete", "DELETE", _PATH, ADMIN, "delete, as in the first version.",
        _delete, Message, query=KeyQuery, errors=(BadRequest,), legacy=True),
    Operation("legacy-start-scheduler", "GET", "/start_scheduler", VIEWER, "Nothing to start: the timers always run.",
        _scheduler, Message, legacy=True, changes=False),
)
# fmt: on
