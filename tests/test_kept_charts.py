"""The charts go on after a restart: what is kept, what is ignored, and a disk that doesn't take it."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGTERM
from typing import Any

import msgspec
import pytest
from durable_support import crash, durable_server, patched
from engine_support import Moment, make_engine, on_loop
from support import API, ServerProcess, eventually
from viewing import FEED, charts_shown

from keypool.core.errors import StorageUnavailable
from keypool.core.events import HOLDER
from keypool.engine.durable import charts_file
from keypool.engine.pools import EmbeddedPools
from keypool.web import kept_charts
from keypool.web.feed import ViewerLimit
from keypool.web.history import MINUTES, NAMES, SECONDS, History
from keypool.web.kept_charts import ChartsKeeper, encoded, restore
from keypool.web.pool_view import PoolView

NOON = 1_800_000_000
MARK = b"12345678"


def history_of(seconds: int) -> History:
    """A history of so many seconds and minutes, in each of which something else happened."""
    history = History()
    samples = [tuple(range(second, second + len(NAMES))) for second in range(MINUTES)]
    history.restore((NOON, samples[:seconds]), (NOON, samples))
    return history


def packed(history: History, **other: Any) -> bytes:
    """Its charts as they are kept, with some members replaced."""
    seconds, minutes = history.kept()
    members = {"version": 1, "mark": MARK, "names": NAMES, "seconds": seconds, "minutes": minutes}
    return zlib.compress(msgspec.msgpack.encode(tuple((members | other).values())))


# ---------------------------------------------------------------------------------------------- what is kept


def test_all_samples_are_kept() -> None:
    """Whole series, and their ends."""
    history, other = history_of(SECONDS), History()
    restore(other, zlib.compress(encoded(history, MARK)), MARK)
    assert other.kept() == history.kept()


def test_an_empty_history_is_kept_too() -> None:
    """As that of a server that is stopped at once."""
    history = History()
    restore(history, zlib.compress(encoded(History(), MARK)), MARK)
    assert history.kept() == History().kept()


def test_charts_of_another_pool_are_left() -> None:
    """One of the same name that was deleted, or is in another data file."""
    history = History()
    restore(history, packed(history_of(10)), b"87654321")
    assert history.kept() == History().kept()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"not compressed",
        packed(history_of(10))[:-1],
        packed(history_of(10))[:100],
        packed(history_of(10), version=2),
        packed(history_of(10), names=NAMES[:-1]),
        packed(history_of(10), minutes=(NOON + 1, [])),
        packed(history_of(10), minutes=(NOON, [(1, 2, 3)])),
        packed(history_of(10), seconds=(NOON, [["a"] * len(NAMES)])),
        packed(history_of(10), seconds=None),
        zlib.compress(bytes(100 << 20)),
        zlib.compress(msgspec.msgpack.encode([2])),
    ],
    ids=list("0123456789ab"),
)
def test_charts_that_are_damaged_or_of_another_version_are_refused(damaged: bytes) -> None:
    """The history stays empty, and a hundred megabytes of zeros take no memory."""
    history = History()
    with pytest.raises(ValueError, match=r"\w"):
        restore(history, damaged, MARK)
    assert history.kept() == History().kept()


# ------------------------------------------------------------------------------------------------- the file


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Readable by its owner only, whatever was there."""
    path = tmp_path / "keypool.db-charts"
    assert charts_file.read(path) == {}
    (tmp_path / "keypool.db-charts.part").write_text("of a server that was killed")
    before = os.umask(0)
    try:
        charts_file.write(path, {"default": b"1"})
        charts_file.write(path, {"default": b"2", "ü": b""})
    finally:
        os.umask(before)
    assert charts_file.read(path) == {"default": b"2", "ü": b""}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside it."""
    path = tmp_path / "keypool.db-charts"
    charts_file.write(path, {"default": b"1"})

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        charts_file.write(path, {"default": b"2"})
    assert charts_file.read(path) == {"default": b"1"}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def a_folder(path: Path) -> None:
    """In place of the file."""
    path.mkdir()


def a_large_file(path: Path) -> None:
    """Without taking the space."""
    with path.open("wb") as file:
        file.truncate(charts_file.MOST + 1)


@pytest.mark.parametrize(
    "make",
    [
        a_folder,
        a_large_file,
        os.mkfifo,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"SQLite format 3\0"),
        lambda path: path.write_bytes(msgspec.msgpack.encode({"default": 1})),
    ],
    ids=["folder", "large", "pipe", "empty", "foreign", "wrong"],
)
def test_what_is_no_charts_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Without waiting for the other end of a pipe."""
    path = tmp_path / "keypool.db-charts"
    make(path)
    with pytest.raises((OSError, ValueError)):
        charts_file.read(path)


# ----------------------------------------------------------------------------------------------- the keeper


class Disk:
    """Pools in memory with charts that the test keeps, and fails."""

    def __init__(self) -> None:
        self.pools = EmbeddedPools(make_engine(Moment()))
        self.kept: dict[str, bytes] = {}
        self.error: str | None = None
        self.hangs = asyncio.Event()
        self.hangs.set()

    def keeps_charts(self, name: str) -> bool:
        """See Pools."""
        return True

    async def kept_charts(self) -> dict[str, bytes]:
        """See Pools."""
        self._fail()
        return self.kept

    async def keep_charts(self, charts: Mapping[str, bytes], *, last: bool = False) -> None:
        """See Pools."""
        await self.hangs.wait()
        self._fail()
        self.kept = dict(charts)

    def _fail(self) -> None:
        if self.error is not None:
            raise StorageUnavailable(self.error)

    def view(self, name: str = "default") -> PoolView:
        """A new view of a pool."""
        return PoolView(self.pools.get(name), ViewerLimit(1))


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute takes no time."""
    monkeypatch.setattr(kept_charts, "KEEP_SECONDS", 0.0)


async def a_minute(keeper: ChartsKeeper, view: PoolView) -> None:
    """What happens in it."""
    keeper.keep_soon([view])
    assert keeper._keeping is not None
    await keeper._keeping


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the dashboard logged."""
    return [record.getMessage() for record in caplog.records if record.name == "keypool.dashboard"]


@on_loop
async def test_a_keeper_reads_what_another_kept() -> None:
    """For a pool of the same name and mark, once."""
    disk = Disk()
    await disk.pools.put("openai", {}, HOLDER)
    views = [disk.view(), disk.view("openai")]
    for view in views:
        view.history.restore(*history_of(5).kept())
    await ChartsKeeper(disk).keep_last(views, 10)  # type: ignore[arg-type]
    keeper = ChartsKeeper(disk)  # type: ignore[arg-type]
    assert sorted(await keeper.read()) == ["default", "openai"]
    for name in ("default", "openai"):
        view = disk.view(name)
        keeper.restore(view)
        assert view.history.kept() == history_of(5).kept()
    again = disk.view()
    keeper.restore(again)
    assert again.history.kept() == History().kept()


@on_loop
async def test_a_pool_that_is_made_again_begins_anew() -> None:
    """Though it has the name of the deleted one."""
    disk = Disk()
    await disk.pools.put("openai", {}, HOLDER)
    view = disk.view("openai")
    view.history.restore(*history_of(5).kept())
    await ChartsKeeper(disk).keep_last([view], 10)  # type: ignore[arg-type]
    await disk.pools.delete("openai", drain=False, now=False, origin=HOLDER)
    await disk.pools.put("openai", {}, HOLDER)
    keeper = ChartsKeeper(disk)  # type: ignore[arg-type]
    await keeper.read()
    view = disk.view("openai")
    keeper.restore(view)
    assert view.history.kept() == History().kept()


@on_loop
@pytest.mark.usefixtures("minutes")
async def test_trouble_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """Not once a minute."""
    caplog.set_level(logging.INFO)
    disk = Disk()
    keeper, view = ChartsKeeper(disk), disk.view()  # type: ignore[arg-type]
    disk.error = "No space left on device"
    for _ in range(3):
        await a_minute(keeper, view)
    [line] = lines(caplog)
    assert "No space left on device" in line
    disk.error = None
    for _ in range(2):
        await a_minute(keeper, view)
    assert lines(caplog)[1:] == ["the charts are kept again"]
    assert list(disk.kept) == ["default"]


@on_loop
@pytest.mark.usefixtures("minutes")
async def test_a_disk_that_hangs_holds_up_neither_the_loop_nor_a_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged once, and no second write begins."""
    disk = Disk()
    keeper, view = ChartsKeeper(disk), disk.view()  # type: ignore[arg-type]
    disk.hangs.clear()
    for _ in range(4):
        keeper.keep_soon([view])
        await asyncio.sleep(0.01)
    began = time.monotonic()
    await keeper.keep_last([view], 0.1)
    assert time.monotonic() - began < 5
    assert len(lines(caplog)) == 1


@on_loop
async def test_charts_that_cant_be_read_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many pools they are of."""
    disk = Disk()
    await disk.pools.put("openai", {}, HOLDER)
    disk.kept = {"default": b"x", "openai": b"x"}
    keeper = ChartsKeeper(disk)  # type: ignore[arg-type]
    for name in await keeper.read():
        keeper.restore(disk.view(name))
    assert len(lines(caplog)) == 1
    disk.error = "Input/output error"
    assert await ChartsKeeper(disk).read() == []  # type: ignore[arg-type]
    assert "Input/output error" in lines(caplog)[1]


# ----------------------------------------------------------------------------------------- the whole server

OPENAI = f"{API}/pools/openai"
QUICK = """
    from keypool.web import kept_charts
    kept_charts.KEEP_SECONDS = 0.5
"""
HANGING = """
    import time
    from keypool.engine.durable import charts_file
    charts_file.write = lambda path, charts: time.sleep(1000)
"""


def generated(server: ServerProcess, path: str = FEED) -> int:
    """How many keys the charts say were generated."""
    return sum(charts_shown(server, path)["generated"])


def charts_of(path: Path) -> Path:
    """The file beside a data file."""
    return path.with_name("keypool.db-charts")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A data file that isn't there yet."""
    return tmp_path / "keypool.db"


def test_the_charts_go_on_after_a_stop(path: Path) -> None:
    """Those of `default`, and of a pool at which somebody has looked; nothing counts twice, and no key is kept."""
    with durable_server(path) as server:
        client = server.client()
        client.put(OPENAI).expect(201)
        charts_shown(server, f"{OPENAI}/feed")
        keys = [client.make()["key"] for _ in range(3)]
        client.post(f"{OPENAI}/batch", json={"op": "generate", "count": 5}).expect(201)
        eventually(lambda: generated(server) == 3, "the sample of a second")
        eventually(lambda: generated(server, f"{OPENAI}/feed") == 5, "the same of the other pool")
        before = charts_shown(server)
    content = charts_of(path).read_bytes()
    content += zlib.decompress(charts_file.read(charts_of(path))["default"])
    assert not any(key.encode() in content for key in keys)
    assert stat.S_IMODE(charts_of(path).stat().st_mode) == 0o600
    for _ in range(2):
        with durable_server(path) as server:
            found = charts_shown(server)
            assert found["generated"][: len(before["generated"])] == before["generated"]
            assert sum(found["generated"]) == 3
            assert found["end"] >= before["end"]
            assert found["counted"]["generated"] == 3
            eventually(lambda: generated(server, f"{OPENAI}/feed") == 5, "charts of the other pool")
            eventually(lambda: charts_shown(server)["available"][-1] == 3, "a sample of now")


@pytest.mark.thorough
def test_the_charts_go_on_after_a_kill(path: Path, tmp_path: Path) -> None:
    """As they were when they were last kept: within a minute, which is half a second here."""
    env = patched(tmp_path / "patch", QUICK)
    with durable_server(path, env=env) as server:
        server.client().make_many(4)
        eventually(lambda: generated(server) == 4, "the sample of a second")
        stamp = time.time()
        eventually(lambda: charts_of(path).exists() and charts_of(path).stat().st_mtime > stamp + 1, "charts")
        crash(server)
    with durable_server(path, env=env) as server:
        assert generated(server) == 4


@pytest.mark.thorough
def test_a_deleted_pool_takes_its_charts_along(path: Path) -> None:
    """One that is made anew under its name begins with nothing, before and after a restart."""
    with durable_server(path) as server:
        client = server.client()
        client.put(OPENAI).expect(201)
        charts_shown(server, f"{OPENAI}/feed")
        made = client.post(f"{OPENAI}/keys").expect(201)
        eventually(lambda: generated(server, f"{OPENAI}/feed") == 1, "the sample of a second")
        client.delete(f"{OPENAI}/keys/{made['key']}").expect(204)
        client.delete(OPENAI).expect(204)
        client.put(OPENAI).expect(201)
        assert generated(server, f"{OPENAI}/feed") == 0
    with durable_server(path) as server:
        assert generated(server, f"{OPENAI}/feed") == 0


@pytest.mark.thorough
@pytest.mark.parametrize("damage", ["cut", "foreign", "folder"])
def test_a_start_ignores_charts_that_it_cant_use(path: Path, damage: str) -> None:
    """With one line in the log; those of another data file without one."""
    with durable_server(path) as server:
        server.client().make()
        eventually(lambda: generated(server) == 1, "the sample of a second")
    charts = charts_of(path)
    if damage == "cut":
        charts.write_bytes(charts.read_bytes()[:-5])
    elif damage == "foreign":
        path.unlink()
    else:
        charts.unlink()
        charts.mkdir()
    with durable_server(path) as server:
        assert generated(server) == 0
        assert server.log.count("charts begin anew") == (damage != "foreign")


def test_a_disk_that_doesnt_take_the_charts(path: Path, tmp_path: Path) -> None:
    """The log has one line, calls are served, and the server stops as always."""
    charts_of(path).mkdir()
    with durable_server(path, env=patched(tmp_path / "patch", QUICK)) as server:
        eventually(lambda: "the charts aren't kept" in server.log, "a line")
        server.client().make()
        server.signal(SIGTERM)  # at which they are to be kept again
        assert server.wait() == 0
        assert server.log.count("the charts aren't kept") == 1


@pytest.mark.thorough
def test_a_disk_that_hangs_over_the_charts(path: Path, tmp_path: Path) -> None:
    """The server serves, and stops within seconds."""
    with durable_server(path, env=patched(tmp_path / "patch", QUICK + HANGING)) as server:
        eventually(lambda: "the disk has not taken them" in server.log, "a line")
        server.client().make()
        began = time.monotonic()
        server.signal(SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - began < 8
        assert server.log.count("the charts aren't kept") == 1
