"""What the tests of data files share: files made by hand, engines and servers over them."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import sqlite3
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import Any, Final

import msgspec
import pytest
from engine_support import Moment
from support import API, ROOT, Answer, Client, ServerProcess, eventually, run_server

from keypool.core.errors import StartError
from keypool.core.keys import Key, State
from keypool.core.outcomes import NO_HISTORY, History, Outcome
from keypool.core.rules import PoolRules
from keypool.engine.clock import make_clock
from keypool.engine.durable import datafile, opening, rows
from keypool.engine.durable.opening import open_durable
from keypool.engine.durable.rows import Row
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools


def hold_clocks(monkeypatch: pytest.MonkeyPatch) -> Moment:
    """Give all engines that are opened from now on this clock, which stands until it is set."""
    wall = Moment()

    def clock(not_before: float) -> Callable[[], float]:
        return make_clock(wall, wall, not_before)

    monkeypatch.setattr(opening, "make_clock", clock)
    return wall


def rows_in(path: Path) -> list[Row]:
    """All keys of a data file, read beside whoever else has it open."""
    return [row for some in datafile.read_rows(path, 1000) for row in some]


def numbers_in(path: Path) -> dict[str, int]:
    """The pool's numbers in a data file."""
    return datafile.inspect(path).numbers


def table_of(path: Path) -> list[tuple[Any, ...]]:
    """The table of keys as it stands, with all its columns and without what batches say."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute("SELECT * FROM keys ORDER BY id").fetchall()


def row(
    id: int,
    life: float = 300.0,
    *,
    block: float | None = None,
    lease: int = 0,
    owner: str | None = None,
    flags: int = 0,
    more: bytes | None = None,
) -> Row:
    """A key as the file keeps it, with this many seconds to live and to be blocked, or to cool, from now on."""
    now = round(time.time() * 1000)
    release_at = None if block is None else now + round(block * 1000)
    acquired_at = None if block is None or flags & rows.COOLING else now
    expires_at = now + round(life * 1000)
    return id, f"{id:020d}", now, expires_at, release_at, lease, owner, acquired_at, flags, more


def old_file(
    path: Path, version: int, keys: Sequence[tuple[Any, ...]], batches: Sequence[object] = ()
) -> None:
    """A data file as a server of this older version left it: keys as rows of its columns, batches as lists."""
    numbers = {"last_id": len(keys), "last_lease": 9, "generated": len(keys), "moment": 1}
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.create_function("new_secret", 0, lambda: os.urandom(32))
        for step in datafile.MIGRATIONS[:version]:
            database.executescript(step)
        database.executescript(
            f"PRAGMA application_id = {datafile.APPLICATION_ID}; PRAGMA user_version = {version}"
        )
        for key in keys:
            database.execute(f"INSERT INTO keys VALUES ({', '.join('?' * len(key))})", key)  # noqa: S608
        database.executemany("INSERT INTO pool VALUES (?, ?)", numbers.items())
        for number, batch in enumerate(batches, 1):
            database.execute("INSERT INTO batches VALUES (?, ?)", (number, msgspec.msgpack.encode(batch)))


def fill(path: Path, keys: Sequence[Row], **numbers: int) -> None:
    """A data file with these keys, as a server that ended in peace would leave it."""
    last = {
        "last_id": max((row[0] for row in keys), default=0),
        "last_lease": max((row[5] for row in keys), default=0),
    }
    counts = {"generated": len(keys), "acquired": last["last_lease"], "moment": round(time.time() * 1000)}
    with contextlib.closing(datafile.connect(path)) as database:
        database.execute("BEGIN")
        database.executemany(datafile.UPSERT, keys)
        database.executemany(datafile.SET_POOL, (last | counts | numbers).items())
        database.execute("COMMIT")


def keys_of_all_kinds() -> list[Key]:
    """A key in each state, with and without what keys of that state may have."""
    draw = random.Random(5)
    keys: list[Key] = []

    def add(**fields: Any) -> None:
        id, at = len(keys) + 1, 1_700_000_000 + draw.randrange(10**9) / 1000
        served = 10 * id if "lease" in fields else 0
        keys.append(Key(id, f"{id:020d}", at, at + 300, served=served, **fields))

    histories = (
        NO_HISTORY,
        History(0, 0.0, Outcome.OK),
        History(3, 1_700_000_000.123457, Outcome.ERROR, "💥", "why"),
    )
    for history in histories:
        for reported in (False, True):
            add(history=history, reported=reported)
            add(history=history, reported=reported, state=State.QUARANTINED, lease=7)
            add(
                history=history,
                reported=reported,
                state=State.COOLING,
                release_deadline=1_800_000_000.125,
                lease=7,
                paced_until=1_800_000_000.0625,
            )
        for attempt in (None, bytes(range(16))):
            for pending in (False, True):
                add(
                    history=history, attempt=attempt, quarantine_pending=pending, state=State.BLOCKED, lease=8,
                    release_deadline=1_800_000_000.25, acquired_at=1_799_999_940.25, owner="me",
                )  # fmt: skip
    return keys


def durable(key: Key) -> dict[str, object]:
    """All durable fields of a key."""
    fields = (
        "id", "text", "created_at", "expires_deadline", "release_deadline", "lease", "owner", "state", "acquired_at",
        "attempt", "reported", "quarantine_pending", "history", "paced_until", "extended",
        "served",
    )  # fmt: skip
    return {name: getattr(key, name) for name in fields}


@contextlib.asynccontextmanager
async def opened(path: Path, restart_grace: float = 0.0, **rules: Any) -> AsyncIterator[EmbeddedEngine]:
    """The durable engine of `default` over a file, with the real writer; closed in peace."""
    async with opened_pools(path, restart_grace=restart_grace, **rules) as pools:
        yield pools.default


@contextlib.asynccontextmanager
async def opened_pools(path: Path, *keys: bytes, **rules: Any) -> AsyncIterator[EmbeddedPools]:
    """All pools of a file, with these secrets keys and the real writer; closed in peace."""
    pools = await open_durable(path, PoolRules(**rules), secrets_keys=keys)
    try:
        yield pools
    finally:
        await pools.close()


def durable_server(path: Path, *flags: str, env: dict[str, str] | None = None) -> ServerProcess:
    """A server on a data file, as its user starts it."""
    return ServerProcess([f"--data={path}", "--port=0", *flags], cwd=path.parent, env=env)


def refused_start(path: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    """The one line of a server that can't start, with status 1."""
    status, output = run_server([f"--data={path}", "--port=0", *flags], env)
    assert status == 1, f"exit status {status}: {output}"
    assert len(output.strip().splitlines()) == 1, f"not one line: {output}"
    assert str(path) in output, f"doesn't name the file: {output}"
    return output


def crash(server: ServerProcess) -> None:
    """kill -9."""
    server.signal(SIGKILL)
    server.wait()


def patched(folder: Path, code: str) -> dict[str, str]:
    """The environment of a server, and of its writer, that run this code before anything of their own."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def texts_of(client: Client) -> set[int]:
    """The ids of all keys."""
    found: set[int] = set()
    after = ""
    while True:
        page = client.get(f"{API}/keys?limit=500{after}").expect(200)
        found |= {row["id"] for row in page["keys"]}
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


ROWS: Final = 3000


def make_whole_file(folder: Path) -> Path:
    """A data file of some pages, as a clean stop leaves it."""
    path = folder / "keypool.db"
    fill(path, [row(id, 3600) for id in range(1, ROWS + 1)])
    return path


def refusal(path: Path, **rules: Any) -> str:
    """The one line for which a file isn't opened, in this process."""

    async def opening() -> None:
        async with opened(path, **rules):
            raise AssertionError("it was opened")

    with pytest.raises(StartError) as refused:
        asyncio.run(opening())
    line = str(refused.value)
    assert len(line.splitlines()) == 1, f"not one line: {line}"
    assert str(path) in line, f"doesn't name the file: {line}"
    return line


class Load:
    """Callers that generate keys, one after the other, until the block ends or the server does."""

    def __init__(self, server: ServerProcess, callers: int = 6) -> None:
        self.told: set[int] = set()
        self.refused = 0
        self._failures: list[BaseException] = []
        self._server = server
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(callers)]

    def _run(self) -> None:
        try:
            with Client(self._server) as client:
                while not self._over.is_set():
                    self._note(client.post(API + "/keys"))
        except (OSError, http.client.HTTPException) as error:
            if self._server.running and not self._over.is_set():
                self._failures.append(error)
        except AssertionError as error:
            self._failures.append(error)

    def _note(self, answer: Answer) -> None:
        if answer.status == 201:
            self.told.add(answer.json["id"])
        else:
            assert answer.json["code"] in ("storage-unavailable", "draining"), str(answer)
            self.refused += 1
            self._over.wait(0.01)

    def wait_for(self, count: int) -> None:
        """Until so many more keys were made."""
        target = len(self.told) + count
        eventually(lambda: self._failures or len(self.told) >= target, f"{count} keys more")

    def wait_for_refusals(self, count: int) -> None:
        """Until so many more calls were refused."""
        target = self.refused + count
        eventually(lambda: self._failures or self.refused >= target, f"{count} refusals more")

    def stop(self) -> None:
        """The callers end; what comes to them from now on is the server's end."""
        self._over.set()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a call was never answered"
        assert not self._failures, self._failures
