"""Encryption at rest in the data file: what is on the disk, who can read it, and how it gets under another key."""

from __future__ import annotations

import asyncio
import base64
import builtins
import contextlib
import logging
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from durable_support import durable_server, fill, opened, opened_pools, refused_start, row, rows_in, table_of
from engine_support import Call, HeldTimers, Moment, make_engine, on_loop, open_held, turns
from held_writer import FULL, hold_writers, run
from support import API, ROOT, clean_environment, eventually, hint

from keypool.core.answers import KeyPatch, NewKey
from keypool.core.errors import SecretsKeyRequired, StartError
from keypool.core.events import By, Origin
from keypool.core.keys import NEVER, Details, Key, State
from keypool.engine.durable import copying, datafile
from keypool.engine.durable.file_lock import companions
from keypool.engine.durable.journal import FileJournal
from keypool.engine.durable.opening import open_durable
from keypool.engine.durable.rows import key_of, row_of
from keypool.engine.embedded import EmbeddedEngine
from keypool.engine.pools import EmbeddedPools
from keypool.engine.sealing import Sealer, WrongSecretsKey

ADMIN = Origin(By.OPERATOR, "ops")
LASTING = {"keepalive_seconds": None}
OLD, NEW, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))
DATA = b'{"user":"the data of a key"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a data file may be made."""
    return tmp_path / "keypool.db"


def on_disk(path: Path) -> bytes:
    """All bytes of a file and of those beside it."""
    return b"".join(each.read_bytes() for each in (path, *companions(path)) if each.exists())


def found_in(path: Path, secrets: Iterable[str | bytes]) -> list[str | bytes]:
    """Those of the secrets that are on the disk in clear."""
    content = on_disk(path)
    return [each for each in secrets if (each.encode() if isinstance(each, str) else each) in content]


def texts_of(engine: EmbeddedEngine) -> list[str]:
    """The texts of all keys, in order of id."""
    return [key.text for key in engine.pool.after(0, 100_000)]


async def openai(pools: EmbeddedPools) -> EmbeddedEngine:
    """A pool of keys from elsewhere that never expire."""
    if "openai" not in pools.names():
        await pools.put("openai", LASTING, ADMIN)
    return pools.get("openai")


async def rekeyed(pools: EmbeddedPools) -> None:
    """Rekey, and wait for the end."""
    await pools.rekey()
    await until(lambda: pools.rekeying().state != "running", "the rekey ends")
    assert pools.rekeying().state == "idle"


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition holds."""
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"after 20 s never came true: {what}")


def clear_rows(path: Path) -> int:
    """How many rows are in clear."""
    return sum(1 for row in rows_in(path) if row[1])


def refused(path: Path, *keys: bytes) -> str:
    """The one line for which a file isn't opened with these keys, which leaves it as it was."""
    before = on_disk(path)

    async def opening() -> None:
        async with opened_pools(path, *keys):
            raise AssertionError("it was opened")

    with pytest.raises(StartError) as caught:
        asyncio.run(opening())
    assert on_disk(path) == before, "a refused file was changed"
    line = str(caught.value)
    assert len(line.splitlines()) == 1, f"not one line: {line}"
    assert str(path) in line, f"doesn't name the file: {line}"
    return line


# -------------------------------------------------------------------------------------------------- sealed texts


def test_a_sealed_text_is_opened_in_its_place_only() -> None:
    """Neither in another pool, nor for another key, nor with a bit changed, nor with another secrets key."""
    sealer = Sealer([NEW, OLD])
    sealed = sealer.seal(b"text", 3, 5)
    assert sealer.open(sealed, 3, 5) == b"text"
    assert sealer.open(Sealer([OLD]).seal(b"text", 3, 5), 3, 5) == b"text"
    for pool, id in ((0, 5), (3, 6), (35, 0), (5, 3)):
        with pytest.raises(WrongSecretsKey):
            sealer.open(sealed, pool, id)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(WrongSecretsKey):
            sealer.open(bytes(changed), 3, 5)
    with pytest.raises(WrongSecretsKey):
        Sealer([OTHER]).open(sealed, 3, 5)
    assert sealer.seal(b"text", 3, 5) != sealed, "a nonce was used twice"


def test_a_sealed_row_has_all_of_its_key_and_shows_no_secret() -> None:
    """Text, data and the text before a replacement are sealed; names, labels and owners can be read."""
    details = Details(True, "acct-1", {"region": "eu"}, DATA, "the text before")
    key = Key(
        5, "the secret", 1.0, NEVER, details=details, client="ci", owner="me", state=State.BLOCKED, lease=3
    )
    key.release_deadline, key.acquired_at, key.served = 99.0, 39.0, 2
    sealer = Sealer([OLD])
    stored = row_of(key, 9, sealer)
    for secret in (b"the secret", b"the data", b"the text before"):
        assert secret not in msgspec.msgpack.encode(stored)
    for shown in (b"acct-1", b"region", b"me", b"ci"):
        assert shown in msgspec.msgpack.encode(stored)
    again = key_of(stored, sealer)
    assert (again.text, again.details, again.client) == (key.text, details, "ci")
    assert row_of(again, 9) == row_of(key, 9)
    unread = key_of(stored)
    assert (unread.text, unread.details.data, unread.details.former, unread.state) == (
        "",
        None,
        None,
        State.BLOCKED,
    )


# ---------------------------------------------------------------------------------------------------- on the disk


@on_loop
async def test_nothing_secret_is_on_the_disk(path: Path) -> None:
    """Keys of all kinds, in the tables, the batches and the log, while the server runs and after it."""
    async with opened_pools(path, OLD) as pools:
        engine = await openai(pools)
        secrets: list[str | bytes] = [key.key for key in await pools.default.generate(50)]
        for number in range(50):
            secret = f"sk-live-{number:03d}-secret"
            secrets.append(secret)
            await engine.import_key(
                NewKey(secret, f"acct-{number}", {"a": "b"}, DATA), expire=False, origin=ADMIN
            )
        lease = await engine.acquire("me", 0)
        await engine.replace(lease.id, "another secret", ADMIN)
        await engine.update(lease.id, KeyPatch(data=b'{"other":"data"}'), ADMIN)
        secrets += ["another secret", DATA, b'{"other":"data"}', OLD, base64.b64encode(OLD)]
        await engine.delete("sk-live-007-secret" if lease.id != 8 else "sk-live-008-secret", ADMIN)
        assert len(on_disk(path)) > 10_000
        assert found_in(path, secrets) == []
        assert found_in(path, ["acct-3", "region"][:1]) == ["acct-3"]
        texts = texts_of(engine), texts_of(pools.default)
        rows = [await engine.get(lease.id), await pools.default.get(7)]
    assert found_in(path, secrets) == []
    async with opened_pools(path, OLD) as pools:
        engine = pools.get("openai")
        assert (texts_of(engine), texts_of(pools.default)) == texts
        assert [row.hint for row in (await engine.get(lease.id), await pools.default.get(7))] == [
            row.hint for row in rows
        ]
        assert (await engine.get(lease.key)).id == lease.id, "the holder's text was lost"
        for each in (engine, pools.default):
            each.pool.check()
        assert pools.rekeying().state == "idle"
        assert (pools.rekeying().done, pools.rekeying().total) == (99, 99)


@on_loop
async def test_batches_that_were_not_flushed_are_sealed_and_read(path: Path, tmp_path: Path) -> None:
    """As a crash leaves them: the file is copied while the server runs."""
    copy = tmp_path / "copy" / "keypool.db"
    copy.parent.mkdir()
    async with opened_pools(path, OLD) as pools:
        made = await pools.default.generate(5)
        for each in (path, *companions(path)):
            shutil.copy(each, copy.with_name(each.name))
    assert [row[1] for row in table_of(copy)] == []
    assert found_in(copy, [key.key for key in made]) == []
    async with opened_pools(copy, OLD) as pools:
        assert texts_of(pools.default) == [key.key for key in made]


def test_the_writer_gets_sealed_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes over the socket shows no text, in parts and in repeated batches too."""

    async def test() -> None:
        monkeypatch.setattr("keypool.engine.durable.journal._SEALED_PART_ROWS", 3)
        logging.getLogger("keypool.journal").setLevel(logging.CRITICAL)
        writers = hold_writers(monkeypatch)
        engine = make_engine(Moment(), HeldTimers())
        journal = FileJournal(Path("none"), open_held(Path("/dev/null")), Sealer([OLD]))
        starting = asyncio.ensure_future(journal.open())
        await turns()
        writers[-1].answer()
        await starting
        await journal.start(None)
        engine.journal = journal.join(0, engine)
        call = Call(engine.generate(8))
        await turns()
        writers[-1].answer(FULL)
        await until(lambda: sum(len(batch.rows) for batch in writers[-1].batches) > 8, "it is repeated")
        texts = texts_of(engine)
        sent = [row for batch in writers[-1].batches for row in batch.rows]
        assert len(sent) > 8
        assert all(row[1] == "" for row in sent)
        assert not [text for text in texts if text.encode() in msgspec.msgpack.encode(sent)]
        assert {key_of(row, Sealer([OLD])).text for row in sent} == set(texts)
        assert call.over

    try:
        run(test)
    finally:
        logging.getLogger("keypool.journal").setLevel(logging.NOTSET)


def test_the_writer_process_has_no_secrets_in_its_environment(path: Path) -> None:
    """Neither tokens nor secrets keys, nor the names of files that have them."""
    tokens = path.with_name("tokens")
    tokens.write_text("another-admin-token-in-a-file")
    tokens.chmod(0o600)
    env = {
        "KEYPOOL_SECRETS_KEY": base64.b64encode(OLD).decode(),
        "KEYPOOL_CLIENT_TOKEN": "a-client-token-of-a-test",
        "KEYPOOL_ADMIN_TOKEN_FILE": str(tokens),
        "KEYPOOL_LOG_LEVEL": "info",
    }
    with durable_server(path, env=env) as server:
        [writer] = [
            pid
            for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            if b"engine.durable.writer" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        environ, command = (Path(f"/proc/{writer}/{name}").read_bytes() for name in ("environ", "cmdline"))
    assert b"PATH=" in environ
    for secret in ("KEYPOOL", *env.values()):
        if secret != "info":
            assert secret.encode() not in environ
            assert secret.encode() not in command


@on_loop
async def test_the_log_names_no_secret(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which secrets key it is may be told, by the beginning of its digest."""
    caplog.set_level(logging.DEBUG)
    async with opened_pools(path) as pools:
        made = await pools.default.generate(5)
    async with opened_pools(path, OLD) as pools:
        await rekeyed(pools)
    assert "all keys are encrypted" in caplog.text
    for secret in (*[key.key for key in made], OLD.hex(), base64.b64encode(OLD).decode()):
        assert secret not in caplog.text


# --------------------------------------------------------------------------------------------- keys that don't fit


def test_a_file_that_was_used_with_a_key_is_refused_without_it(path: Path) -> None:
    """Also before any row is sealed, and whatever other key there is; the right one among others will do."""

    async def use(*keys: bytes, count: int) -> None:
        async with opened_pools(path, *keys) as pools:
            await pools.default.generate(count)

    for count in (0, 3):
        asyncio.run(use(OLD, count=count))
        assert "is encrypted: set KEYPOOL_SECRETS_KEY" in refused(path)
        assert f"is encrypted under the secrets key {Sealer([OLD]).current.hex()}" in refused(path, NEW)
        asyncio.run(use(OLD, NEW, count=0))


def test_a_first_key_binds_the_file_at_once(path: Path) -> None:
    """Started with another first key, both are needed until a rekey ends, though no row may be sealed under it."""

    async def use(*keys: bytes) -> None:
        async with opened_pools(path, *keys):
            pass

    asyncio.run(use(OLD))
    asyncio.run(use(NEW, OLD))
    for keys in ((NEW,), (OLD,), (OTHER, NEW), ()):
        refused(path, *keys)
    asyncio.run(use(OLD, NEW))


def test_a_server_says_in_one_line_that_its_key_does_not_fit(path: Path) -> None:
    """Exit status 1, no traceback."""
    with durable_server(path, env={"KEYPOOL_SECRETS_KEY": base64.b64encode(OLD).decode()}) as server:
        server.client().make_many(3)
        server.finish()
    before = path.read_bytes()
    assert "is encrypted" in refused_start(path)
    assert "is encrypted" in refused_start(path, env={"KEYPOOL_SECRETS_KEY": base64.b64encode(NEW).decode()})
    assert path.read_bytes() == before
    with durable_server(path, env={"KEYPOOL_SECRETS_KEY": base64.b64encode(OLD).decode()}) as server:
        assert server.client().stats()["total"] == 3
        server.finish()


DAMAGES = {
    "rows were exchanged": "UPDATE keys SET more = (SELECT more FROM keys WHERE id = 3 - keys.id) WHERE id IN (1, 2)",
    "a row was moved": "UPDATE keys SET id = 3 WHERE id = 2",
    # Its last byte: behind it stands what a pace has used, here nothing.
    "a sealed text was changed": "UPDATE keys SET more = CAST(substr(more, 1, length(more) - 2) || x'07C0' AS BLOB)",
    "nothing is sealed of a row": "UPDATE keys SET more = NULL WHERE id = 1",
    "the check value was changed": "UPDATE secrets SET value = zeroblob(40) WHERE name GLOB 'key.*'",
    "the check value is missing": "DELETE FROM secrets WHERE name GLOB 'key.*'",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_file_whose_seals_do_not_hold_is_refused(path: Path, what: str) -> None:
    """Never a ciphertext for a key: one line, and the file is left as it was."""

    async def make() -> None:
        async with opened_pools(path, OLD) as pools:
            await pools.default.generate(2)

    asyncio.run(make())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE pool SET value = 5 WHERE name = 'last_id'")
        database.execute(DAMAGES[what])
    if what == "the check value is missing":
        refused(path)
        refused(path, NEW)
    else:
        refused(path, OLD)
        refused(path, NEW, OLD)


def test_a_secrets_key_needs_cryptography(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line says what to install."""
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    fill(path, [row(1)])
    monkeypatch.setattr(builtins, "__import__", missing)

    async def opening() -> None:
        async with opened_pools(path, OLD):
            raise AssertionError("it was opened")

    with pytest.raises(StartError, match=r"cryptography: pip install 'keypool-service\[secrets\]'"):
        asyncio.run(opening())


# ------------------------------------------------------------------------------------------- from clear to sealed


@on_loop
async def test_a_file_in_clear_is_sealed_key_by_key_as_they_change(path: Path) -> None:
    """Those that don't change stay in clear until a rekey, and are read all the same."""
    async with opened(path) as engine:
        made = await engine.generate(10)
    async with opened_pools(path, OLD) as pools:
        for key in made[:3]:
            await pools.default.keepalive(key.key)
        await pools.default.generate(1)
        progress = pools.rekeying()
        assert (progress.state, progress.encrypted, progress.total) == ("idle", True, 11)
    assert clear_rows(path) == 7
    assert found_in(path, [key.key for key in made[:3]]) == []
    async with opened_pools(path, OLD) as pools:
        assert texts_of(pools.default)[:10] == [key.key for key in made]
        assert (pools.rekeying().done, pools.rekeying().total) == (4, 11)


@on_loop
async def test_a_rekey_leaves_nothing_in_clear(path: Path) -> None:
    """Neither in rows nor in free space: of keys that were deleted in clear as well. The log is empty."""
    async with opened_pools(path) as pools:
        engine = await openai(pools)
        secrets: list[str | bytes] = [key.key for key in await pools.default.generate(3000)]
        for number in range(300):
            secrets.append(f"sk-live-{number:04d}-secret")
            await engine.import_key(NewKey(str(secrets[-1]), data=DATA), expire=False, origin=ADMIN)
        await pools.default.delete_many([str(each) for each in secrets[100:2900]], ADMIN)
    secrets.append(DATA)
    async with opened_pools(path) as pools:
        await pools.default.keepalive_many([str(each) for each in secrets[:100]])
    assert len(found_in(path, secrets)) > 300, "there was nothing to forget"
    async with opened_pools(path, OLD) as pools:
        await rekeyed(pools)
        assert found_in(path, secrets) == []
        assert companions(path)[0].stat().st_size < 10_000, "the log wasn't truncated"
        texts = texts_of(pools.get("openai"))
        await pools.default.generate(1)
    assert found_in(path, secrets) == []
    assert clear_rows(path) == 0
    async with opened_pools(path, OLD) as pools:
        assert texts_of(pools.get("openai")) == texts
        assert pools.default.pool.total == 201
        for name in pools.names():
            pools.get(name).pool.check()
    assert copying.verify(path).keys == 501


@on_loop
async def test_what_is_deleted_or_replaced_does_not_stay_in_free_space(path: Path) -> None:
    """In a file that is used with a key, not even what was sealed stays."""
    async with opened_pools(path, OLD) as pools:
        await pools.default.generate(500)
    sealed = [row[9] for row in rows_in(path)]
    assert all(more is not None and more in on_disk(path) for more in sealed)
    async with opened_pools(path, OLD) as pools:
        await pools.default.delete_many(list(range(1, 501)), ADMIN)
    assert not [more for more in sealed if more is not None and more in on_disk(path)]


# ------------------------------------------------------------------------------------------------ under another key


@on_loop
async def test_after_a_rekey_the_old_key_is_not_needed(path: Path) -> None:
    """Before its end it is; afterwards the new one alone will do, and the old one alone won't."""
    async with opened_pools(path, OLD) as pools:
        await pools.default.generate(1000)
        engine = await openai(pools)
        await engine.import_key(NewKey("a secret", data=DATA), expire=False, origin=ADMIN)
        texts = texts_of(pools.default)
    async with opened_pools(path, NEW, OLD) as pools:
        assert (pools.rekeying().done, pools.rekeying().total) == (0, 1001)
        await pools.default.keepalive(1)
    await asyncio.to_thread(refused, path, NEW)
    async with opened_pools(path, NEW, OLD) as pools:
        assert (pools.rekeying().done, pools.rekeying().total) == (1, 1001)
        await rekeyed(pools)
        assert (pools.rekeying().done, pools.rekeying().total) == (1001, 1001)
    await asyncio.to_thread(refused, path, OLD)
    async with opened_pools(path, NEW) as pools:
        assert texts_of(pools.default) == texts
        assert texts_of(pools.get("openai")) == ["a secret"]


@on_loop
async def test_calls_go_on_during_a_rekey(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they change is kept, keys that are purged meanwhile stay purged, and it ends."""
    monkeypatch.setattr("keypool.engine.durable.rekey._KEYS_AT_ONCE", 50)
    async with opened_pools(path, OLD) as pools:
        await pools.default.generate(3000)
    async with opened_pools(path, NEW, OLD) as pools:
        engine = pools.default
        await pools.rekey()
        await pools.rekey()  # asking again changes nothing
        deleted, calls = 0, 0
        while pools.rekeying().state == "running":
            lease = await engine.acquire("me", 0)
            await engine.delete(lease.id, ADMIN)
            await engine.generate(1)
            deleted, calls = deleted + 1, calls + 1
            await asyncio.sleep(0)
        assert calls > 3
        texts = texts_of(engine)
        assert len(texts) == 3000
    async with opened_pools(path, NEW) as pools:
        assert texts_of(pools.default) == texts
        assert pools.default.pool.counters.deleted == deleted
        pools.default.pool.check()


@on_loop
async def test_without_a_secrets_key_there_is_nothing_to_rekey(path: Path) -> None:
    """The call is refused, and the progress says that nothing is encrypted."""
    async with opened_pools(path) as pools:
        with pytest.raises(SecretsKeyRequired):
            await pools.rekey()
        assert not pools.rekeying().encrypted


@on_loop
async def test_a_rekey_waits_for_a_reader_of_the_file(path: Path) -> None:
    """A backup keeps the log from being truncated: calls go on, and the rekey ends after it."""
    async with opened_pools(path) as pools:
        secrets = [key.key for key in await pools.default.generate(10)]
    async with opened_pools(path, OLD) as pools:
        await pools.default.keepalive(1)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM keys").fetchone()
            await pools.rekey()
            for _ in range(20):
                await asyncio.wait_for(pools.default.keepalive(1), 30)
                await asyncio.sleep(0.02)
            assert pools.rekeying().state == "running"
            assert pools.default.storage_up()
        await rekeyed(pools)
        assert found_in(path, secrets) == []


REKEY = """
import asyncio, os, signal, sys
from pathlib import Path
from keypool.engine.durable import rekey
from keypool.engine.durable.opening import open_durable

async def main():
    rekey._KEYS_AT_ONCE = 10
    pools = await open_durable(Path(sys.argv[1]), secrets_keys=[bytes([2]) * 32, bytes([1]) * 32])
    if sys.argv[2] == "begin":
        await pools.rekey()
    before = pools.rekeying()
    while pools.rekeying().done < before.done + 250:
        assert pools.rekeying().state == "running", pools.rekeying()
        await asyncio.sleep(0)
    print(before.done, pools.rekeying().done, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_while_rekeying(path: Path, how: str) -> tuple[int, int]:
    """How many keys were done at the start and at the end of a server that was killed in the middle of a rekey."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REKEY), str(path), how], check=False, cwd=ROOT, timeout=60,
        capture_output=True, text=True, env=clean_environment({"PYTHONPATH": str(ROOT)}),
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    first, last = map(int, ran.stdout.split())
    return first, last


@pytest.mark.parametrize("beginning", ["in clear", "under the old key"])
def test_a_rekey_that_was_killed_goes_on_after_the_restart(path: Path, beginning: str) -> None:
    """By itself, from where it was; the old key is needed until its end, and no key is lost."""

    async def make() -> list[str]:
        async with opened_pools(path, *([] if beginning == "in clear" else [OLD])) as pools:
            await pools.default.generate(500)
            await (await openai(pools)).generate(500)
            return texts_of(pools.default) + texts_of(pools.get("openai"))

    async def finish() -> list[str]:
        async with opened_pools(path, NEW, OLD) as pools:
            assert pools.rekeying().state == "running"
            assert pools.rekeying().done >= 400
            await until(lambda: pools.rekeying().state == "idle", "the rekey ends")
            return texts_of(pools.default) + texts_of(pools.get("openai"))

    async def texts() -> list[str]:
        async with opened_pools(path, NEW) as pools:
            assert pools.rekeying().state == "idle"
            for name in pools.names():
                pools.get(name).pool.check()
            return texts_of(pools.default) + texts_of(pools.get("openai"))

    made = asyncio.run(make())
    first = killed_while_rekeying(path, "begin")
    second = killed_while_rekeying(path, "go on")
    assert first[0] == 0
    assert second[0] >= first[1] - 40, "what was done was not kept"
    if beginning != "in clear":
        with pytest.raises(StartError):
            asyncio.run(open_durable(path, secrets_keys=[NEW]))
    assert asyncio.run(finish()) == made
    assert asyncio.run(texts()) == made
    assert found_in(path, made) == []


def moved(path: Path, to: Path) -> None:
    """Move a file."""
    path.rename(to)


@on_loop
async def test_an_outage_interrupts_a_rekey_which_goes_on_after_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because the file was moved away for a while."""
    monkeypatch.setattr("keypool.engine.durable.rekey._RETRY_SECONDS", 0.05)
    # Slow, as the writer looks at the file's name only twice a second.
    monkeypatch.setattr("keypool.engine.durable.rekey._KEYS_AT_ONCE", 1)
    logging.getLogger("keypool.journal").setLevel(logging.CRITICAL)
    try:
        async with opened_pools(path, OLD) as pools:
            texts = [key.key for key in await pools.default.generate(3000)]
        async with opened_pools(path, NEW, OLD) as pools:
            await pools.rekey()
            moved(path, tmp_path / "elsewhere")  # in this thread: the rekey can't end meanwhile
            await until(lambda: not pools.default.storage_up(), "storage is down")
            assert pools.rekeying().state == "running"
            moved(tmp_path / "elsewhere", path)
            await until(lambda: pools.rekeying().state == "idle", "the rekey ends")
            assert pools.rekeying().done == 3000
        async with opened_pools(path, NEW) as pools:
            assert texts_of(pools.default) == texts
    finally:
        logging.getLogger("keypool.journal").setLevel(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------------ copies


@on_loop
async def test_a_backup_stays_sealed_and_needs_no_key(path: Path) -> None:
    """It is made, counted and verified without one, and opened with it."""
    copy = path.with_name("copy")
    async with opened_pools(path, OLD) as pools:
        made = [key.key for key in await pools.default.generate(20)]
        await pools.default.acquire("me", 0)
        checked = copying.back_up(path, copy)
        assert (checked.keys, checked.states["blocked"], checked.states["available"]) == (20, 1, 19)
    assert copying.verify(copy).keys == datafile.count(copy) == 20
    assert found_in(copy, made) == []
    await asyncio.to_thread(refused, copy)
    async with opened_pools(copy, OLD) as pools:
        assert texts_of(pools.default) == made


def test_a_server_rekeys_and_serves(path: Path) -> None:
    """Started with another first key, over HTTP."""
    key = {name: base64.b64encode(each).decode() for name, each in {"old": OLD, "new": NEW}.items()}
    with durable_server(path, env={"KEYPOOL_SECRETS_KEY": key["old"]}) as server:
        made = server.client().make_many(100)
        server.finish()
    with durable_server(path, env={"KEYPOOL_SECRETS_KEY": f"{key['new']},{key['old']}"}) as server:
        client = server.client()
        assert client.get(f"{API}/keys/{made[0]['key']}").expect(200)["hint"] == hint(made[0]["key"])
        server.finish()
    eventually(lambda: not companions(path)[0].exists(), "the log is gone")
