"""Verdicts: when each holds, and that page, documentation and alerts say the same. Latencies of the last minutes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from app_client import Browser, serves

from keypool.core.answers import Stats
from keypool.core.rules import PoolRules
from keypool.ops.advice import ADVICE, Advice
from keypool.ops.histogram import Histogram, quantile
from keypool.web.health import Facts, expiry_window, tiles_warned, verdicts
from keypool.web.latency import LATELY, Latency

ROOT = Path(__file__).parent.parent
RECENT = {"refused": 0, "released": 0, "unblocked": 0, "expired": 0}


def facts(
    *, recent: dict[str, int] | None = None, stats: dict[str, int] | None = None, **others: Any
) -> Facts:
    """Of a pool of 100 available keys in which nothing happened, but for these."""
    numbers = (
        dict.fromkeys(Stats.__struct_fields__[:-3], 0) | {"total": 100, "available": 100} | (stats or {})
    )
    calm = Facts(
        stats=Stats(**numbers, uptime=1.0, engine="test", version="0"),
        recent=RECENT | (recent or {}),
        recent_seconds=LATELY,
    )
    return replace(calm, **others)


def not_ready(code: str) -> Facts:
    """Of a server that answers calls with this error."""
    return facts(not_ready={"code": code, "title": "No", "detail": "the reason"})


HOLDS = {
    "loading": (not_ready("loading"), "The reason."),
    "draining": (not_ready("draining"), "The reason."),
    "storage-unavailable": (not_ready("storage-unavailable"), "The reason."),
    "degraded": (facts(degraded="node 2 is down"), "Node 2 is down."),
    "pool-draining": (facts(pool_draining=True), "100 keys are left."),
    "exhausted": (facts(stats={"available": 0, "blocked": 100}), "100 blocked, 0 cooling, 0 quarantined."),
    "expiring": (facts(expiring=11), "11 of 100 keys expire within 60 s."),
    "expired": (facts(recent={"expired": 25}), "25 expired in the last 5 min; 100 are left."),
    "many-out": (
        facts(stats={"available": 49, "cooling": 40, "quarantined": 11}),
        "40 cooling and 11 quarantined of 100 keys.",
    ),
    "released": (
        facts(recent={"released": 10, "unblocked": 9}),
        "10 ran out in the last 5 min, 9 were given back.",
    ),
    "slow-disk": (facts(commit_p99=0.61), "One commit in a hundred takes 0.6 s or more."),
    "stalls": (facts(stall_p99=0.0612), "One turn in a hundred is 61 ms late or more."),
    "clear-text": (facts(in_clear=True, stats={"imported": 7}), "7 keys were imported."),
}
"""For each warning a state in which it holds, and no other, with its cause in words."""

CALM = {
    "an empty pool": facts(stats={"total": 0, "available": 0}),
    "a tenth about to expire": facts(expiring=10),
    "less than a fifth expired": facts(recent={"expired": 24}),
    "half of the pool out": facts(stats={"available": 50, "cooling": 50}),
    "a few releases by deadline": facts(recent={"released": 9}),
    "more given back than released": facts(recent={"released": 50, "unblocked": 50}),
    "a quick disk": facts(commit_p99=0.5),
    "a free processor": facts(stall_p99=0.05),
    "generated keys in clear": facts(in_clear=True),
}


@pytest.mark.parametrize("advice", ADVICE, ids=lambda advice: advice.code)
def test_each_warning_holds_with_its_cause(advice: Advice) -> None:
    """It is the only one; it leads to the pool's own rows, or to the server's page."""
    state, cause = HOLDS[advice.code]
    [found] = verdicts(state, "/pools/openai")
    assert found["code"] == advice.code
    assert found["text"].startswith(f"{cause} "), found["text"]
    assert found["href"] == "/system" or found["href"].startswith("/pools/openai/")
    assert "`" not in found["text"] + found["remedy"]


@pytest.mark.parametrize("state", CALM.values(), ids=CALM)
def test_no_warning_holds(state: Facts) -> None:
    """At each threshold."""
    assert verdicts(state, "") == []


def test_the_most_urgent_comes_first() -> None:
    """What stops calls before what may stop them."""
    state = facts(stats={"available": 0, "quarantined": 100}, expiring=100, stall_p99=1.0)
    assert [each["code"] for each in verdicts(state, "")] == ["exhausted", "expiring", "many-out", "stalls"]
    assert tiles_warned(verdicts(state, ""), state) == ["available", "cooling", "expiring", "quarantined"]


def test_keys_that_are_out_are_listed_by_what_most_of_them_are() -> None:
    """Cooling or quarantined."""
    for state in ("cooling", "quarantined"):
        [found] = verdicts(facts(stats={"available": 40, state: 60}), "")
        assert found["href"] == f"/keys?tab={state}"


def test_waiting_and_refused_acquires_colour_their_tiles() -> None:
    """Without a verdict."""
    state = facts(stats={"waiting": 1}, recent={"refused": 1})
    assert verdicts(state, "") == []
    assert tiles_warned([], state) == ["refused", "waiting"]


def test_the_keys_of_a_pool_of_short_lives_are_not_always_about_to_expire() -> None:
    """A minute, or a quarter of a key's life."""
    assert expiry_window(PoolRules(keepalive_seconds=300)) == 60
    assert expiry_window(PoolRules(keepalive_seconds=20)) == 5
    assert expiry_window(PoolRules(keepalive_seconds=None)) == 60


@pytest.mark.parametrize("advice", ADVICE, ids=lambda advice: advice.code)
def test_the_documentation_and_the_alerts_share_the_words(advice: Advice) -> None:
    """A row of "What to do when" in docs/operations.md has them, under the alert's name."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("### What to do when\n")[2].partition("\n## ")[0]
    assert f"| {' | '.join(advice.table_row)} |" in table
    alert = advice.alert
    assert not alert or f"- alert: {alert}\n" in (ROOT / "deploy/prometheus/alerts.yml").read_text()


@serves("--keepalive-seconds=240")
async def test_the_first_paint_has_the_verdicts(pages: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cause, remedy and link, in the table's words; the title and the icon say it as well."""
    monkeypatch.setattr("keypool.web.health.LATE", math.inf)  # however busy the machine is
    calm = (await pages.fetch("/")).text
    assert "All is well" in calm
    await pages.make(3)
    for _ in range(3):
        await pages.acquire()
    text = (await pages.fetch("/")).text
    assert "One thing needs attention" in text
    assert "<title>(!) 0 free · Overview · keypool</title>" in text
    assert re.search(r'rel="icon" href="[^"]*/icon-alarm\.svg"', text)
    assert re.search(r'id="exhausted"[^>]*>\s*<h2[^>]*>No key is available<', text)


# ----------------------------------------------------------------------------------------------- latencies


def test_a_quantile_is_that_of_prometheus() -> None:
    """Linear within a bucket; the largest bound for what is beyond it; none of nothing."""
    bounds = (1.0, 2.0, 4.0)
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None
    assert quantile(bounds, [10, 0, 0, 0], 0.5) == 0.5
    assert quantile(bounds, [5, 5, 10, 0], 0.5) == 2.0
    assert quantile(bounds, [5, 5, 10, 0], 0.75) == 3.0
    assert quantile(bounds, [1, 0, 0, 9], 0.5) == 4.0


def test_a_latency_is_of_the_last_minutes() -> None:
    """Several histograms count together; what is older than LATELY is forgotten."""
    one, other = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    latency = Latency(lambda: [one, other])
    one.add(1.5)  # before the first sample
    latency.sample()
    assert latency.both() == (None, None)
    one.add(0.5)
    other.add(0.5)
    latency.sample()
    assert latency.both() == (0.5, 0.99)
    assert (latency.p99_of(2), latency.p99_of(3)) == (0.99, None)
    for _ in range(LATELY):
        latency.sample()
    assert latency.both() == (None, None)


def test_no_histogram_no_latency() -> None:
    """As of commits, of a pool in memory."""
    latency = Latency(list)
    latency.sample()
    assert latency.both() == (None, None)
