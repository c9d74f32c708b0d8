"""A server on a data file that is killed while seats are acquired, given back, cooled, and get more or fewer.

Each worker has a pool of its own, whose keys nothing but its calls changes, one after the other. So after a kill the
keys are as it saw them last, but for what the call did that was cut off: to one secret, to all of its seats or none.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL
from typing import Any

from support import API, Client, ServerProcess, eventually

WORKERS, KILLS = 4, 2
SECRETS = ("one", "two", "paced")
KEEPING: dict[str, Any] = {
    "keepalive_seconds": None, "block_seconds": 3600, "cooldown_seconds": 3600, "error_threshold": 2,
}  # fmt: skip
FACTS = ("state", "lease", "owner", "failures", "outcome", "seat", "seats", "name")
SLACK = 0.2  # seconds: of two readings of a deadline, across a restart

Rows = dict[int, dict[str, Any]]


class Load:
    """The server of the moment, and what all workers have in common."""

    def __init__(self, folder: Path) -> None:
        self.flags, self.folder = ["--port=0", f"--data={folder / 'keypool.db'}"], folder
        self.server = ServerProcess(self.flags, cwd=folder)
        self.stopping = threading.Event()
        self.answers = 0
        self.done: Counter[str] = Counter()

    def kill(self, count: int) -> None:
        """Kill the server after so many more answers, and start another one."""
        target = self.answers + count
        eventually(lambda: self.answers >= target or self.stopping.is_set(), f"{target} answers", 60)
        self.server.signal(SIGKILL)
        self.server.wait()
        self.server.close()
        self.server = ServerProcess(self.flags, cwd=self.folder)


class Worker:
    """See the module."""

    def __init__(self, load: Load, number: int) -> None:
        self._load, self._base = load, f"{API}/pools/w{number}"
        self._draw = random.Random(number)
        self._server = load.server
        self._client = Client(self._server)
        self._client.make_pool(f"w{number}", **KEEPING)
        for name in SECRETS:
            pace = {"pace": {"count": 4, "seconds": 3600}} if name == "paced" else {}
            body = {"secret": f"sk-live-{name}", "name": name, "seats": 3} | pace
            assert self._client.post(f"{self._base}/keys", json=body).status == 201
        self._rows = self._look()

    def run(self) -> None:
        """Make one call after the other."""
        try:
            while not self._load.stopping.is_set():
                self._step()
        except BaseException:
            self._load.stopping.set()
            raise
        finally:
            self._client.close()

    def _step(self) -> None:
        [what] = self._draw.choices(("acquire", "free", "report", "seats", "restore"), (6, 4, 3, 3, 1))
        held = [id for id, row in self._rows.items() if row["state"] == "blocked"]
        id = self._draw.choice(held if what in ("free", "report") and held else [*self._rows])
        name, path, body = self._rows[id]["name"], f"{self._base}/keys/id:{id}", dict[str, Any]()
        if what == "acquire":
            name, path, body = None, f"{self._base}/keys/acquire", {"owner": f"worker {self._load.answers}"}
        elif what in ("free", "report"):
            path, body = f"{path}/unblock", {"lease": self._rows[id]["lease"] or 10**6}
        elif what == "restore":
            path += "/restore"
        if what == "report":
            body["outcome"] = self._draw.choice(("ok", "error", "rate_limited"))
        answer = None
        try:
            call = self._client.patch if what == "seats" else self._client.post
            answer = call(path, json={"seats": self._draw.randint(1, 5)} if what == "seats" else body)
            assert answer.status in (200, 404, 409), str(answer)
            rows = self._look()
        except (OSError, http.client.HTTPException):
            rows = self._look_again()
            self._compare(rows, name, what)
        if answer is not None and answer.status == 200:
            self._load.answers += 1
            self._load.done[what] += 1
            told = {fact: value for fact, value in answer.json.items() if fact in (*FACTS, "id")}
            row = rows.get(told["id"])
            if what == "acquire":
                told["state"] = "blocked"
            if row is None:  # it had to go when its lease ended
                assert what in ("free", "report"), f"{what} told {told}, which is gone"
            else:
                assert told.items() <= row.items(), f"{what} told {told}, not {row}"
        self._rows = rows

    def _look(self) -> Rows:
        asked = time.monotonic()
        answer = self._client.get(f"{self._base}/keys?limit=500")
        rows: Rows = {row["id"]: row for row in answer.json["keys"]}
        for row in rows.values():
            row["asked"], row["told"] = asked, answer.answered_at
        return rows

    def _look_again(self) -> Rows:
        """When the next server answers."""
        self._client.close()
        eventually(lambda: self._load.server is not self._server, "another server", 60)
        self._server = self._load.server
        self._client = Client(self._server)
        return self._look()

    def _compare(self, after: Rows, name: str | None, what: str) -> None:
        """Fail if the keys are not as they were, but for what the call did to the secret of this name, or to any."""
        before = self._rows
        changed = {id for id in {*before, *after} if facts(before.get(id)) != facts(after.get(id))}
        names = {(before.get(id) or after[id])["name"] for id in changed}
        assert len(names) <= 1, f"{what} changed {names}"
        assert name is None or names <= {name}, f"{what} of {name} changed {names}"
        latest = {id: row["lease"] for id, row in before.items()}
        taken = [id for id, row in after.items() if row["lease"] != latest.get(id)]
        assert len(taken) <= (what == "acquire"), f"{what} took {taken}"
        for id in {*before, *after} - changed:
            for due in ("release_in", "available_in"):
                then, now = before[id][due], after[id][due]
                assert (then is None) == (now is None)
                if then is not None:
                    assert before[id]["asked"] + then - SLACK <= after[id]["told"] + now, f"{due} is sooner"
                    assert before[id]["told"] + then + SLACK >= after[id]["asked"] + now, f"{due} is later"
        secrets = defaultdict[str, list[dict[str, Any]]](list)
        for row in after.values():
            secrets[row["name"]].append(row)
        assert {*secrets} == {*SECRETS}
        for seats in secrets.values():
            assert [(row["seat"], row["seats"]) for row in seats] == [
                (number, len(seats)) for number in range(1, len(seats) + 1)
            ]
            assert len({(row["failures"], row["outcome"]) for row in seats}) == 1, seats
            assert len({row["state"] for row in seats if row["state"] != "blocked"}) <= 1, seats


def facts(row: dict[str, Any] | None) -> list[Any] | None:
    """What a row tells that no time changes."""
    return None if row is None else [row[fact] for fact in FACTS]


def test_a_server_that_is_killed_among_seats_forgets_nothing_that_it_told(tmp_path: Path) -> None:
    """No lease, cooldown or number of seats; and what a call does to the seats of a secret is done to all or none."""
    load = Load(tmp_path)
    try:
        workers = [Worker(load, number) for number in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as threads:
            running = [threads.submit(worker.run) for worker in workers]
            try:
                for _ in range(KILLS):
                    load.kill(100)
            finally:
                load.stopping.set()
            for worker in running:
                worker.result(60)
        load.server.finish()
    finally:
        load.server.close()
    assert {*load.done} == {"acquire", "free", "report", "seats", "restore"}
