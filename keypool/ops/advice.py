"""What the dashboard warns of: what each warning says, what it means, and what to do.

The overview, the titles of its tabs and the table "What to do when" in docs/operations.md (written by
keypool/api/reference.py) are made from `ADVICE`. When a warning holds is in keypool/web/health.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """One warning. Texts are of Markdown, but for their backticks plain."""

    code: str
    title: str
    means: str
    do: str
    path: str
    """The page with the rows that it is about, below the pool's own pages; `/system` is the server's."""
    link: str
    short: str = ""
    """What the title of a tab says; without one the warning can wait, and the title doesn't mention it."""
    alert: str = ""
    """The alert of deploy/prometheus/alerts.yml for the same."""
    tiles: tuple[str, ...] = ()
    """The tiles of the overview that are coloured."""

    @property
    def table_row(self) -> tuple[str, ...]:
        """The cells of its row in docs/operations.md."""
        alert = f'<a id="{self.alert.lower()}"></a>`{self.alert}`' if self.alert else "none"
        return alert, self.title, self.means, self.do


ADVICE = (
    Advice(
        "loading",
        "The server is loading",
        "it has just started and reads its keys; calls get 503 `loading`",
        "wait: a million keys take seconds",
        "/system",
        "See the server's state",
        short="loading",
    ),
    Advice(
        "draining",
        "The server is stopping",
        "it got SIGTERM: it finishes the calls in progress and accepts no new ones",
        "wait for its successor, or start the server again",
        "/system",
        "See the server's state",
        short="stopping",
    ),
    Advice(
        "storage-unavailable",
        "Nothing can be stored",
        "the disk, or Valkey, doesn't take changes; calls get 503 `storage-unavailable`",
        "free space or repair the disk; nothing acknowledged is lost, and the server recovers by itself. "
        "With Valkey: check that it runs and can be reached",
        "/system",
        "See the server's state",
        short="storage down",
        alert="KeypoolStorageDown",
    ),
    Advice(
        "degraded",
        "Part of the pool can't be reached",
        "a node of Valkey doesn't answer, and its keys can't be used; others are served",
        "check that node and the network to it; the servers reconnect by themselves",
        "/system",
        "See the server's state",
        short="part is down",
    ),
    Advice(
        "pool-draining",
        "This pool is being deleted",
        "it serves and takes no key any more; keys that are held are purged when their leases end",
        "wait for the leases to end, or delete it with `now=true`",
        "/keys?tab=blocked",
        "See who holds keys",
    ),
    Advice(
        "exhausted",
        "No key is available",
        "all keys are blocked, cooling or quarantined; acquires wait or get 404 `no-key-available`",
        "blocked ones: generate more keys, let callers `wait`, and look for owners that hold many; cooling or "
        "quarantined ones: their outcomes and reasons are in the lists",
        "/keys?tab=blocked",
        "See who holds keys",
        short="0 free",
        alert="KeypoolExhausted",
        tiles=("available",),
    ),
    Advice(
        "expiring",
        "Many keys are about to expire",
        "more than a tenth of the keys will be purged unless a keepalive comes: a client that sends keepalives "
        "stopped, or can't reach the server",
        "check that client (401 and 403 in `keypool_calls_total`?): each keepalive saves its key",
        "/keys?tab=expiring",
        "See which keys expire first",
        short="keys expiring",
        tiles=("expiring",),
    ),
    Advice(
        "expired",
        "Many keys expired",
        "a fifth of the keys or more expired: a client that sends keepalives stopped, or can't reach the server",
        "check that client (401 and 403 in `keypool_calls_total`?); generate new keys",
        "/events?kind=expired",
        "See what expired",
        short="keys expired",
        alert="KeypoolKeysDieUnkept",
        tiles=("expired",),
    ),
    Advice(
        "many-out",
        "Over half of the pool is out",
        "more than half of the keys are cooling or quarantined: the service behind them limits or refuses them",
        "the outcomes and reasons in the lists (`order=ready`, `state=quarantined`) and `keypool_outcomes_total` say "
        "which. Rate limits: fewer workers, or more keys. Errors: the service is probably down, and keys come back "
        "by themselves",
        "/keys?tab=cooling",
        "See why keys are out",
        short="half is out",
        alert="KeypoolManyKeysOut",
        tiles=("cooling", "quarantined"),
    ),
    Advice(
        "released",
        "Many leases end by their deadline",
        "more leases ran out than were given back: holders crash or don't unblock",
        "find the owners; work may take longer than `--block-seconds`",
        "/owners",
        "See whose leases ran out",
        short="leases run out",
        alert="KeypoolReleasesByDeadline",
        tiles=("released",),
    ),
    Advice(
        "slow-disk",
        "The disk is slow",
        "commits wait for the disk: one in a hundred takes over half a second",
        "move the data file to a faster disk, or find what else uses this one",
        "/system",
        "See how long commits take",
        short="slow disk",
        alert="KeypoolSlowDisk",
    ),
    Advice(
        "stalls",
        "The server is overloaded",
        "the event loop runs late, and every call with it",
        "the processor is saturated (`process_cpu_seconds_total`): spread the load, move other processes away",
        "/system",
        "See how late it runs",
        alert="KeypoolStalls",
    ),
    Advice(
        "clear-text",
        "Secrets are stored in clear",
        "whoever can read the data file, or a backup of it, has the keys that were imported",
        "set `KEYPOOL_SECRETS_KEY`, restart, and run `keypool rekey`",
        "/system",
        "See how keys are stored",
    ),
)
"""Every warning, the most urgent first."""
