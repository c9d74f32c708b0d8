"""A server killed under load, again and again, forgets nothing that it told; and proof that this would show.

`crash.py` has the load, the kills and the judge. The second half of this file plants losses, one kind after the
other, in histories, in data files and in the server itself: a judge that finds nothing proves nothing.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from crash import COUNTERS, Crasher, Ledger, Seen, Span, Stale, Story, Unblock, examine, judge
from support import API, ROOT, Client, eventually

from keypool.engine.durable import datafile
from keypool.engine.durable.compaction import BatchLog

ROUNDS: list[dict[str, Any]] = [{}, {"writer_kills": 2}, {"both": True}, {}, {"both": True}, {"answers": 500}]


FLUSHING_SOON = """
    # Batches are flushed from the first on, as they are after a day's work.
    from keypool.engine.durable import compaction
    compaction.FLUSH_THRESHOLD_ROWS, compaction.MIN_FLUSH_ROWS = 100, 10
"""


def planted(folder: Path, code: str) -> dict[str, str]:
    """An environment in which each Python process runs this code first."""
    place = folder / "planted"
    place.mkdir()
    (place / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3))])
def test_nothing_told_is_lost_by_kills_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Of the server under load and at its start, of its writer, of both: 21 in all, and then a clean stop.

    Every other time while the writer is flushing what was committed.
    """
    env = planted(tmp_path, FLUSHING_SOON) if seed % 2 else None
    crasher = Crasher(tmp_path / "keypool.db", seed, env=env)
    for number, kinds in enumerate(ROUNDS):
        if number == 3:
            crasher.kill_at_start()
        faults = crasher.round(**kinds)
        assert not faults, f"after {crasher.tally}:\n" + "\n".join(faults)
    assert not (faults := crasher.look()), "\n".join(faults)
    assert not (faults := crasher.look()), "after a clean stop:\n" + "\n".join(faults)
    assert crasher.tally.kills == len(ROUNDS) + 1


OLD_KEY, NEW_KEY = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [7, 8])
def test_three_encrypted_pools_in_one_file_lose_nothing_by_kills(tmp_path: Path, seed: int) -> None:
    """Each has times of its own, all are under load at once, and no key is in clear in the file or its log.

    From the third round on under a new secrets key, and rekeyed in the last.
    """
    env = planted(tmp_path, FLUSHING_SOON) if seed % 2 else {}
    crasher = Crasher(
        tmp_path / "keypool.db",
        seed,
        env=env | {"KEYPOOL_SECRETS_KEY": OLD_KEY},
        pools={"openai": (0.7, 5.0), "anthropic": (1.5, 8.0)},
    )
    for number, kinds in enumerate(ROUNDS):
        if number == 2:
            crasher.set_env(KEYPOOL_SECRETS_KEY=f"{NEW_KEY},{OLD_KEY}")
        if number == 3:
            crasher.kill_at_start()
        faults = crasher.round(**kinds)
        assert not faults, f"after {crasher.tally}:\n" + "\n".join(faults)
        _expect_no_key_in_clear(crasher)
    assert not (faults := crasher.look()), "\n".join(faults)
    with crasher.start() as server, Client(server) as client:
        client.post(API + "/rekey").expect(202)
        eventually(lambda: client.get(API + "/rekey").expect(200)["state"] == "idle", "the end of the rekey")
    crasher.set_env(KEYPOOL_SECRETS_KEY=NEW_KEY)
    assert not (faults := crasher.look()), "after the rekey:\n" + "\n".join(faults)
    _expect_no_key_in_clear(crasher)


def _expect_no_key_in_clear(crasher: Crasher) -> None:
    content = b"".join(
        each.read_bytes() for each in crasher.path.parent.glob("keypool.db*") if each.is_file()
    )
    texts = [text for ledger in crasher.ledgers for text in ledger.stories]
    assert texts
    assert not [text[:4] for text in texts if text.encode() in content], "keys are in the file in clear"


# ------------------------------------------------------------------------- what the judge finds in histories

BLOCK, LIFE = 10.0, 100.0
KEY, OTHER = "A" * 20, "B" * 20


def at(asked: float, ended: float | None = None) -> Span:
    """A call asked at this moment, and over a little later."""
    return Span(asked, asked + 0.001 if ended is None else ended)


def made(ledger: Ledger, span: Span, text: str = KEY, id: int = 1) -> Story:
    """A key was generated."""
    ledger.made(span, {"key": text, "id": id, "expires_in": LIFE})
    ledger.sure["generated"] += 1
    return ledger.stories[text]


def leased(ledger: Ledger, span: Span, lease: int, text: str = KEY) -> None:
    """A key was served."""
    ledger.leased(span, {"key": text, "lease": lease, "release_in": BLOCK}, "me")


def row(span: Span, expires_in: float | None = None, lease: int = 0, release_in: float | None = None) -> Seen:
    """A key was listed: free, or with what is left of its block."""
    owner = None if release_in is None else "me"
    return Seen(span, "row", expires_in, release_in is not None, lease, release_in, owner)


def freed(story: Story, span: Span, lease: int | None) -> None:
    """A key was given back."""
    story.unblocks.append(Unblock(span, lease))
    story.seen.append(Seen(span, "unblock", blocked=False, lease=lease))


def lost_key(ledger: Ledger) -> None:
    made(ledger, at(0))
    ledger.lost(KEY, at(99))


def lost_key_that_was_deleted_before(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.deletes.append(at(1))  # in vain, for it was seen later
    story.seen.append(row(at(2), 98))
    ledger.lost(KEY, at(3))


def key_that_came_back(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.deletes.append(at(1))
    ledger.lost(KEY, at(1))
    story.seen.append(row(at(2)))


def expired_key_that_came_back(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    ledger.lost(KEY, at(101))
    story.seen.append(row(at(102)))


def lost_keepalive(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.keepalives.append(at(50))
    story.seen += [Seen(at(50), "keepalive", LIFE), row(at(60), 40)]


def key_that_lived_too_long(ledger: Ledger) -> None:
    made(ledger, at(0)).seen.append(row(at(101)))


def key_that_will_live_too_long(ledger: Ledger) -> None:
    made(ledger, at(0)).seen.append(row(at(50), 60))


def lost_acquire(ledger: Ledger) -> None:
    made(ledger, at(0)).seen.append(row(at(5)))
    leased(ledger, at(1), 1)


def lost_owner(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.seen.append(row(at(5), lease=1, release_in=6))
    story.seen[-1].owner = "another"


def holder_refused(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.stale.append(Stale(at(2), 1))


def held_by_two(ledger: Ledger) -> None:
    made(ledger, at(0))
    leased(ledger, at(1), 1)
    leased(ledger, at(10), 2)


def held_by_two_though_another_lease_was_freed(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 2)
    story.unblocks.append(Unblock(at(2), 1))
    leased(ledger, at(3), 3)


def held_by_another_unheard(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.seen.append(row(at(5), lease=2, release_in=BLOCK))


def lost_unblock(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    freed(story, at(2), 1)
    story.seen.append(row(at(3), lease=1, release_in=8))


def lost_unblock_without_lease(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    freed(story, at(2), None)
    story.seen.append(row(at(3), lease=1, release_in=8))


def lost_release(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.seen += [row(at(12), lease=1), row(at(13), lease=1, release_in=0.01)]


def block_made_longer(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.seen.append(row(at(5), lease=1, release_in=7))


def block_beyond_its_end(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.seen.append(row(at(12), lease=1, release_in=0.0))


def lease_given_twice(ledger: Ledger) -> None:
    made(ledger, at(0))
    made(ledger, at(0), OTHER, 2)
    leased(ledger, at(1), 1)
    leased(ledger, at(1, 3), 1, OTHER)


def smaller_lease_given_later(ledger: Ledger) -> None:
    made(ledger, at(0))
    made(ledger, at(0, 3), OTHER, 2)
    leased(ledger, at(1), 2)
    leased(ledger, at(2), 1, OTHER)


def lease_of_a_key_went_back(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 5)
    freed(story, at(2), 5)
    story.seen.append(row(at(3), lease=4))


def stale_lease_untold(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.stale.append(Stale(at(12), 1))
    story.seen.append(row(at(13), lease=1))


def late_holder_let(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    leased(ledger, at(12), 2)
    freed(story, at(13), 1)


def id_given_twice(ledger: Ledger) -> None:
    made(ledger, at(0))
    made(ledger, at(1), OTHER, 1)


def smaller_id_given_later(ledger: Ledger) -> None:
    made(ledger, at(0), id=2)
    made(ledger, at(1), OTHER, 1)


def text_made_twice(ledger: Ledger) -> None:
    made(ledger, at(0))
    made(ledger, at(1))


def key_made_by_nobody(ledger: Ledger) -> None:
    leased(ledger, at(1), 1)


def stats_of(ledger: Ledger, **numbers: int) -> None:
    """The numbers told when all was quiet: these, and what fits them."""
    names = ("total", "available", "blocked", "released", "expired", "generated", "acquired")
    told = dict.fromkeys((*names, "unblocked", "deleted", "kept_alive"), 0)
    ledger.stats(told | {"generated": 2, "total": 2, "available": 2} | numbers, quiet=True)


def lost_count(ledger: Ledger) -> None:
    ledger.sure.update(generated=2, kept_alive=3)
    stats_of(ledger, kept_alive=2)


def count_of_what_nobody_asked(ledger: Ledger) -> None:
    ledger.sure.update(generated=2, kept_alive=3)
    ledger.maybe.update(kept_alive=2)
    stats_of(ledger, kept_alive=6)


def stats_that_do_not_add_up(ledger: Ledger) -> None:
    ledger.sure.update(generated=2)
    stats_of(ledger, total=1, available=1)


FAULTS: list[tuple[Callable[[Ledger], None], str]] = [
    (lost_key, "lost key"),
    (lost_key_that_was_deleted_before, "lost key"),
    (key_that_came_back, "came back"),
    (expired_key_that_came_back, "came back"),
    (lost_keepalive, "lost keepalive"),
    (key_that_lived_too_long, "lived too long"),
    (key_that_will_live_too_long, "lives too long"),
    (lost_acquire, "lost acquire"),
    (lost_owner, "lost owner"),
    (holder_refused, "holder refused"),
    (held_by_two, "held by two"),
    (held_by_two_though_another_lease_was_freed, "held by two"),
    (held_by_another_unheard, "held by two"),
    (lost_unblock, "lost unblock"),
    (lost_unblock_without_lease, "lost unblock"),
    (lost_release, "lost unblock"),
    (block_made_longer, "block moved"),
    (block_beyond_its_end, "block moved"),
    (lease_given_twice, "lease repeated"),
    (smaller_lease_given_later, "lease went back"),
    (lease_of_a_key_went_back, "lease went back"),
    (stale_lease_untold, "lease went back"),
    (late_holder_let, "lease went back"),
    (id_given_twice, "made twice"),
    (smaller_id_given_later, "id went back"),
    (text_made_twice, "made twice"),
    (key_made_by_nobody, "made by nobody"),
    (lost_count, "lost count"),
    (count_of_what_nobody_asked, "lost count"),
    (stats_that_do_not_add_up, "stats don't add up"),
]


@pytest.mark.parametrize(("plant", "kind"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_the_judge_finds_each_kind_of_fault(plant: Callable[[Ledger], None], kind: str) -> None:
    """In the shortest history that shows it."""
    ledger = Ledger(BLOCK, LIFE)
    plant(ledger)
    assert [fault for fault in judge(ledger) if fault.startswith(kind)], judge(ledger)


def key_that_was_cut_while_deleted(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.deletes.append(at(5, 8))
    story.seen.append(row(at(6), 94))
    ledger.lost(KEY, at(9))


def key_that_expired(ledger: Ledger) -> None:
    made(ledger, at(0)).seen.append(row(at(99.9), 0.1))
    ledger.lost(KEY, at(100))


def key_seen_while_another_was_told_that_it_is_gone(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.deletes.append(at(1, 3))
    ledger.lost(KEY, at(1, 3))
    story.seen.append(row(at(2), 98))


def keepalive_that_was_cut(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    story.keepalives.append(at(50, 70))
    story.seen += [row(at(80), 20), row(at(81), 70)]


def lease_after_lease(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    freed(story, at(2), 1)
    leased(ledger, at(3), 2)
    story.stale.append(Stale(at(4), 1))
    leased(ledger, at(13), 3)
    story.seen.append(row(at(14), lease=3, release_in=9))


def key_taken_while_it_is_given_back(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    freed(story, at(2, 6), None)
    leased(ledger, at(3, 4), 2)


def unblock_that_was_cut(ledger: Ledger) -> None:
    story = made(ledger, at(0))
    leased(ledger, at(1), 1)
    story.unblocks.append(Unblock(at(2, 5), None))
    story.seen += [row(at(6), lease=1, release_in=5), row(at(7), lease=1)]


def leases_given_at_the_same_time(ledger: Ledger) -> None:
    made(ledger, at(0))
    made(ledger, at(0.5), OTHER, 2)
    leased(ledger, at(1, 3), 2)
    leased(ledger, at(2, 4), 1, OTHER)


def key_whose_maker_was_cut(ledger: Ledger) -> None:
    ledger.maybe["generated"] += 1
    ledger.unknown_makes.append(at(0, 1))
    leased(ledger, at(2), 1)


def counts_of_what_was_cut(ledger: Ledger) -> None:
    ledger.sure.update(generated=2, kept_alive=3)
    ledger.maybe.update(kept_alive=2)
    stats_of(ledger, kept_alive=4)


INNOCENT: list[Callable[[Ledger], None]] = [
    key_that_was_cut_while_deleted,
    key_that_expired,
    key_seen_while_another_was_told_that_it_is_gone,
    keepalive_that_was_cut,
    lease_after_lease,
    key_taken_while_it_is_given_back,
    unblock_that_was_cut,
    leases_given_at_the_same_time,
    key_whose_maker_was_cut,
    counts_of_what_was_cut,
]


@pytest.mark.parametrize("history", INNOCENT, ids=[history.__name__ for history in INNOCENT])
def test_the_judge_accuses_nobody_of_what_may_be(history: Callable[[Ledger], None]) -> None:
    """Where the order is open, or the outcome."""
    ledger = Ledger(BLOCK, LIFE)
    history(ledger)
    assert judge(ledger) == []


# ------------------------------------------------------------------------------- losses planted in data files


@dataclass
class Scene:
    """A data file as a kill left it, and the ledger of all that was told: six keys, one of each kind."""

    path: Path
    ledger: bytes


KEPT, FREED, HELD, DELETED = 2, 3, 4, 6  # ids; the deleted key has the last id, and the last lease too


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A server that was asked a few things, and killed. No deadline passes while the tests look at its file."""
    crasher = patient(tmp_path_factory.mktemp("scene"))
    ledger = crasher.ledger
    server = crasher.start()
    try:
        with Client(server) as client:
            for _ in range(5):
                generate(client, ledger)
            held = {acquire(client, ledger) for _ in range(5)}
            keep_alive(client, ledger, KEPT)
            generate(client, ledger)
            assert acquire(client, ledger)[0] == DELETED
            delete(client, ledger, DELETED)
            for id, lease in held:
                if id != HELD:
                    unblock(client, ledger, id, lease)
        server.signal(SIGKILL)
        server.wait()
        ledger.died(time.monotonic())
    finally:
        server.close()
    return Scene(crasher.path, pickle.dumps(ledger))


def patient(folder: Path) -> Crasher:
    """One whose keys outlive any test."""
    return Crasher(folder / "keypool.db", 9, block_seconds=600, keepalive_seconds=1200)


def story_of(ledger: Ledger, id: int) -> Story:
    """By its id."""
    return next(story for story in ledger.stories.values() if story.id == id)


def generate(client: Client, ledger: Ledger) -> None:
    """Make a key; here and below, as the ledger wants to know it."""
    attempt = ledger.asks("generated")
    answer = client.make()
    attempt.span.ended = time.monotonic()
    attempt.settle(1)
    ledger.made(attempt.span, answer)


def acquire(client: Client, ledger: Ledger) -> tuple[int, int]:
    """Take a key: its id, its lease."""
    attempt = ledger.asks("acquired")
    answer = client.acquire(owner="me")
    attempt.span.ended = time.monotonic()
    attempt.settle(1)
    ledger.leased(attempt.span, answer, "me")
    return answer["id"], answer["lease"]


def keep_alive(client: Client, ledger: Ledger, id: int) -> None:
    """Put off an expiry."""
    attempt = ledger.asks("kept_alive")
    story = story_of(ledger, id)
    story.keepalives.append(attempt.span)
    told = client.post(f"{API}/keys/id:{id}/keepalive").expect(200)
    attempt.span.ended = time.monotonic()
    attempt.settle(1)
    ledger.saw(story.text, Seen(attempt.span, "keepalive", told["expires_in"]))


def unblock(client: Client, ledger: Ledger, id: int, lease: int) -> None:
    """Give a key back."""
    attempt = ledger.asks("unblocked")
    told = client.post(f"{API}/keys/id:{id}/unblock", json={"lease": lease}).expect(200)
    attempt.span.ended = time.monotonic()
    attempt.settle(int(told["changed"]))
    freed(story_of(ledger, id), attempt.span, lease)


def delete(client: Client, ledger: Ledger, id: int) -> None:
    """Purge a key."""
    attempt = ledger.asks("deleted")
    story = story_of(ledger, id)
    story.deletes.append(attempt.span)
    client.delete(f"{API}/keys/id:{id}").expect(204)
    attempt.span.ended = time.monotonic()
    attempt.settle(1)
    ledger.lost(story.text, attempt.span)


REVIVED = """
    INSERT INTO keys (id, text, created_at, expires_at, lease)
    SELECT {DELETED}, '{text}', created_at, expires_at, 6 FROM keys WHERE id = 1
"""
PLANTED = {
    "nothing": ("", ""),
    "a generated key": ("DELETE FROM keys WHERE id = 1", "lost key"),
    "a delete": (REVIVED, "came back"),
    "a keepalive": ("UPDATE keys SET expires_at = expires_at - 5000 WHERE id = {KEPT}", "lost keepalive"),
    "an acquire": ("UPDATE keys SET release_at = NULL, owner = NULL WHERE id = {HELD}", "lost acquire"),
    "an owner": ("UPDATE keys SET owner = 'another' WHERE id = {HELD}", "lost owner"),
    "an unblock": (
        "UPDATE keys SET release_at = expires_at, owner = 'me' WHERE id = {FREED}",
        "lost unblock",
    ),
    "a lease": ("UPDATE keys SET lease = 0 WHERE id = {FREED}", "lease went back"),
    "the end of a block": ("UPDATE keys SET release_at = release_at + 5000 WHERE id = {HELD}", "block moved"),
    "an expiry": ("UPDATE keys SET expires_at = expires_at + 5000 WHERE id = 1", "lives too long"),
    "the last lease": ("UPDATE pool SET value = 5 WHERE name = 'last_lease'", "lease repeated"),
    "the last id": ("UPDATE pool SET value = 5 WHERE name = 'last_id'", "made twice"),
} | dict.fromkeys(
    [f"a count of {name}" for name in COUNTERS],
    ("UPDATE pool SET value = value - 1 WHERE name = '{counter}'", "lost count"),
)


@pytest.mark.thorough
@pytest.mark.parametrize("lost", PLANTED)
def test_a_loss_planted_in_the_data_file_is_found(scene: Scene, tmp_path: Path, lost: str) -> None:
    """One row changed between the kill and the next start."""
    crasher = patient(tmp_path)
    crasher.ledger = pickle.loads(scene.ledger)
    for suffix in ("", "-wal"):
        shutil.copy(f"{scene.path}{suffix}", f"{crasher.path}{suffix}")
    change, kind = PLANTED[lost]
    text = story_of(crasher.ledger, DELETED).text
    with contextlib.closing(datafile.connect(crasher.path)) as database:
        BatchLog(database).flush_all()  # or they would put it right again
        counter = lost.removeprefix("a count of ")
        statement = change.format(
            KEPT=KEPT, FREED=FREED, HELD=HELD, DELETED=DELETED, text=text, counter=counter
        )
        assert database.execute(statement).rowcount == (1 if change else -1)
    with crasher.start() as server:
        examine(server, crasher.ledger)
        with Client(server) as client:
            generate(client, crasher.ledger)
            acquire(client, crasher.ledger)
        faults = judge(crasher.ledger)
    assert [fault for fault in faults if fault.startswith(kind)] if kind else not faults, faults


# ------------------------------------------------------------------------------------- faults planted in code

FORGETFUL_WRITER = """
    # Every third batch is confirmed, and not committed.
    class Forgetful(sqlite3.Connection):
        def execute(self, sql, *rest):
            if sql.startswith("INSERT INTO batches") and next(numbers) % 3 == 0:
                return self.cursor()
            return super().execute(sql, *rest)
"""
LATE_WRITER = """
    # A batch is confirmed, and committed a little later, when the next one has come.
    class Forgetful(sqlite3.Connection):
        late = None
        def execute(self, sql, *rest):
            late, self.late = self.late, None
            if late:
                time.sleep(0.05)
                super().execute(*late)
            if sql.startswith("INSERT INTO batches"):
                self.late = sql, *rest
                return self.cursor()
            return super().execute(sql, *rest)
"""
FORGETFUL_FLUSH = """
    # Every third slice of a flush isn't written.
    class Forgetful(sqlite3.Connection):
        def executemany(self, sql, rows):
            forgotten = "INTO keys" in sql and next(numbers) % 3 == 0
            return super().executemany(sql, [] if forgotten else rows)
"""
HASTY_TRIMMING = """
    # Batches are deleted that aren't flushed yet.
    class Forgetful(sqlite3.Connection):
        def execute(self, sql, *rest):
            if sql.startswith("DELETE FROM batches"):
                rest = ((rest[0][0] + 3,),)
            return super().execute(sql, *rest)
"""
FORGETFUL_OF_THE_DEAD = """
    # Deleted and expired keys stay in the file.
    class Forgetful(sqlite3.Connection):
        def executemany(self, sql, rows):
            return super().executemany(sql, [] if sql.startswith("DELETE") else rows)
"""
FORGETFUL_OF_THE_LIVING = """
    # A row that is there is not written again: what happens to a key after its first batch is lost.
    class Forgetful(sqlite3.Connection):
        def executemany(self, sql, rows):
            if "INTO keys" in sql:
                sql = "INSERT OR IGNORE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            return super().executemany(sql, rows)
"""
CONNECT = (
    FLUSHING_SOON
    + """
    import itertools, sqlite3, time
    numbers = itertools.count()
    {forgetful}
    connect = sqlite3.connect
    sqlite3.connect = lambda *rest, **named: connect(*rest, factory=Forgetful, **named)
"""
)
HASTY_SERVER = """
    # Answers don't wait for their commit, and a commit takes long enough to be noticed.
    import sqlite3, sys, time
    class Slow(sqlite3.Connection):
        def execute(self, sql, *rest):
            if sql.startswith("INSERT INTO batches"):
                time.sleep(0.1)
            return super().execute(sql, *rest)
    connect = sqlite3.connect
    sqlite3.connect = lambda *rest, **named: connect(*rest, factory=Slow, **named)
    if any(word.endswith("server.py") for word in sys.orig_argv):
        from keypool.engine.durable.pool_journal import PoolJournal
        for name in ("commit_of", "commit_of_text", "commit_of_all"):
            setattr(PoolJournal, name, lambda *rest: None)
"""
BROKEN = {
    "a writer that forgets every third batch": CONNECT.format(forgetful=FORGETFUL_WRITER.strip()),
    "a writer that confirms first": CONNECT.format(forgetful=LATE_WRITER.strip()),
    "a writer that forgets a slice": CONNECT.format(forgetful=FORGETFUL_FLUSH.strip()),
    "a writer that takes batches away too early": CONNECT.format(forgetful=HASTY_TRIMMING.strip()),
    "a writer that forgets the dead": CONNECT.format(forgetful=FORGETFUL_OF_THE_DEAD.strip()),
    "a writer that forgets the living": CONNECT.format(forgetful=FORGETFUL_OF_THE_LIVING.strip()),
    "a server that answers first": HASTY_SERVER,
}


@pytest.mark.thorough
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_code_is_found_by_the_crash_test(tmp_path: Path, broken: str) -> None:
    """Within a few kills, and so well within those of the test at the top."""
    crasher = Crasher(tmp_path / "keypool.db", 5, env=planted(tmp_path, BROKEN[broken]))
    assert any(noticed(crasher) for _ in range(20)), f"nobody noticed in {crasher.tally}"


def noticed(crasher: Crasher) -> bool:
    """Whether one more round showed that something is wrong: to the judge, or to a client at once."""
    try:
        return bool(crasher.round(both=True))
    except AssertionError:
        return True
