"""/metrics: who may read it, its figures, that it holds no secret, and that alerts and panels fit it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from app_client import Browser, guarded
from prometheus_client.parser import text_string_to_metric_families
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    SHORT_BLOCK,
    VIEWER_TOKEN,
    ServerProcess,
    eventually,
)

from keypool.ops.metrics import METRICS

DEPLOY = Path(__file__).parents[1] / "deploy"
SUFFIX = re.compile(r"_(bucket|sum|count)$")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Every sample by name and labels, without the label of the pool `default`."""
    return {
        (sample.name, frozenset(sample.labels.items() - {("pool", "default")})): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def samples(server: ServerProcess) -> Samples:
    """Those of a server process."""
    with server.client() as client:
        answer = client.get("/metrics")
    assert answer.status == 200, str(answer)
    return parsed(answer.body.decode())


async def scraped(pages: Browser) -> Samples:
    """Those of the application in this process."""
    page = await pages.request("/metrics", headers={"Authorization": f"Bearer {VIEWER_TOKEN}"})
    assert page.status == 200, page.text
    return parsed(page.text)


def value(found: Samples, name: str, **labels: str) -> float:
    """The value of one sample; fails if it isn't there."""
    return found[name, frozenset(labels.items())]


# -------------------------------------------------------------------------------------------------------- who


@guarded
async def test_metrics_are_for_viewers(pages: Browser) -> None:
    """A viewer token gets them; other callers get a problem."""
    for token, status, code in (
        (None, 401, "unauthorized"),
        ("nobody-knows-this-one", 401, "unauthorized"),
        (CLIENT_TOKEN, 403, "forbidden"),
        (VIEWER_TOKEN, 200, None),
        (ADMIN_TOKEN, 200, None),
    ):
        page = await pages.request("/metrics", headers={"Authorization": f"Bearer {token}"} if token else {})
        assert page.status == status, page.text
        if code:
            page.expect(status, code)
            assert ("WWW-Authenticate" in page.headers) is (status == 401)


# ---------------------------------------------------------------------------------------------- what it reports


async def test_every_metric_is_there_and_no_other(pages: Browser) -> None:
    """All documented metrics are in the first scrape, each state even at zero; those of an engine only with it."""
    found = await scraped(pages)
    names = {SUFFIX.sub("", name) if SUFFIX.sub("", name) in BY_NAME else name for name, _ in found}
    missing = {
        name
        for name in set(BY_NAME) - names - OF_DATA_FILE
        if not name.startswith(("keypool_commit_", "keypool_pipeline_"))
    }
    assert {name for name in missing if not name.startswith("process_")} == set()
    assert names - set(BY_NAME) == set()
    for state in ("available", "blocked", "cooling", "quarantined"):
        assert value(found, "keypool_keys", state=state) == 0
    for outcome in ("ok", "rate_limited", "error", "invalid"):
        assert value(found, "keypool_outcomes_total", outcome=outcome) == 0


BY_NAME = {each.name: each for each in METRICS}
OF_DATA_FILE = {
    "keypool_commit_age_seconds",
    "keypool_storage_failing_seconds",
    "keypool_writer_restarts_total",
    "keypool_data_file_bytes",
    "keypool_disk_free_bytes",
}
"""Metrics that a pool in memory hasn't."""


def test_it_counts_what_happens(server: ServerProcess) -> None:
    """Calls by operation and outcome, keys by state, waits, stalls; each moves by what was done."""
    before = samples(server)
    client = server.client()
    client.make_many(2)
    lease = client.acquire()
    client.post(ACQUIRE).expect(200)
    client.post(ACQUIRE, json={"wait": 0.05}).expect_problem(404, "no-key-available")
    client.post(f"{API}/keys/{lease['key']}/unblock").expect(200)
    client.get(f"{API}/keys/id:99999999").expect_problem(404, "unknown-key")
    client.get(API + "/nowhere").expect_problem(404, "not-found")
    after = samples(server)

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - before.get((name, frozenset(labels.items())), 0)

    assert value(after, "keypool_keys", state="available") == 1
    assert value(after, "keypool_keys", state="blocked") == 1
    assert moved("keypool_generated_total") == 2
    assert moved("keypool_acquired_total") == 2
    assert moved("keypool_unblocked_total") == 1
    assert moved("keypool_calls_total", operation="acquire", outcome="ok") == 2
    assert moved("keypool_calls_total", operation="acquire", outcome="no-key-available") == 1
    assert moved("keypool_calls_total", operation="get", outcome="unknown-key") == 1
    assert moved("keypool_calls_total", operation="none", outcome="not-found") == 1
    assert moved("keypool_call_seconds_count", operation="acquire") == 3
    assert moved("keypool_acquire_wait_seconds_count") == 1
    assert moved("keypool_acquire_wait_seconds_sum") >= 0.045
    assert value(after, "keypool_connections") >= 1
    eventually(lambda: value(samples(server), "keypool_loop_stall_seconds_count") > 0, "stalls are probed")


async def test_reports_are_counted_by_outcome(pages: Browser) -> None:
    """Those that changed something, and those that the guard kept from a quarantine; states and cooldowns beside."""
    await pages.make(3)
    before = await scraped(pages)
    for outcomes in (["ok", "ok"], ["rate_limited"], ["invalid"], ["invalid"]):
        lease = await pages.acquire()
        for outcome in outcomes:  # the second is too late
            path = f"/keys/{lease['handle']}/unblock"
            (await pages.call("POST", path, {"outcome": outcome})).expect(200)
    (await pages.call("POST", f"/keys/id:{lease['id']}/restore")).expect(200)
    lease = await pages.acquire()
    keys = [{"key": lease["handle"], "outcome": "error"}, {"key": "nope", "lease": 1, "outcome": "error"}]
    (await pages.call("POST", "/batch", {"op": "unblock", "keys": keys})).expect(200)
    after = await scraped(pages)

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    counted = {
        o: moved("keypool_outcomes_total", outcome=o) for o in ("ok", "rate_limited", "error", "invalid")
    }
    assert counted == {"ok": 1, "rate_limited": 1, "error": 1, "invalid": 2}
    assert moved("keypool_guarded_total") == 1
    assert [moved(f"keypool_{name}_total") for name in ("cooled", "quarantines", "restored")] == [2, 1, 1]
    states = [
        value(after, "keypool_keys", state=s) for s in ("available", "blocked", "cooling", "quarantined")
    ]
    assert states == [1, 0, 1, 1]


async def test_each_pool_has_series_of_its_own(pages: Browser) -> None:
    """Under the label `pool`, which goes with the pool; histograms are over all pools."""
    (await pages.call("PUT", "/pools/openai", {"max_keys": 7})).expect(201)
    (await pages.call("POST", "/pools/openai/batch", {"op": "generate", "count": 3})).expect(201)
    (await pages.call("POST", "/pools/openai/keys/acquire")).expect(200)
    found = await scraped(pages)
    assert value(found, "keypool_keys", pool="openai", state="available") == 2
    assert value(found, "keypool_keys", state="available") == 0
    assert value(found, "keypool_generated_total", pool="openai") == 3
    assert value(found, "keypool_pool_max_keys", pool="openai") == 7
    assert value(found, "keypool_history_leases", pool="openai") == 0
    (await pages.call("POST", "/pools/openai/keys/acquire", {"wait": 0.01})).expect(200)
    (await pages.call("POST", "/pools/openai/keys/acquire", {"wait": 0.01})).expect(200)
    (await pages.call("POST", "/pools/openai/keys/acquire", {"wait": 0.01})).expect(404)
    assert value(await scraped(pages), "keypool_acquire_wait_seconds_count") == 1
    (await pages.call("DELETE", "/pools/openai?drain=true&now=true")).expect(202)
    for _ in range(1000):
        if (await pages.call("GET", "/pools/openai")).status == 404:
            break
    assert not [labels for _, labels in await scraped(pages) if ("pool", "openai") in labels]


@guarded
async def test_refusals_count_under_their_operation(pages: Browser) -> None:
    """A wrong token or a missing role counts under the operation that was requested."""
    before = await scraped(pages)
    (await pages.call("POST", "/keys/acquire", token=None)).expect(401, "unauthorized")
    (await pages.call("POST", "/keys", token=CLIENT_TOKEN)).expect(403, "forbidden")
    foreign = {"Sec_Fetch_Site": "cross-site"}
    (await pages.call("POST", "/keys/acquire", token=CLIENT_TOKEN, **foreign)).expect(403, "cross-site")
    after = await scraped(pages)
    for operation, outcome in (
        ("acquire", "unauthorized"), ("generate", "forbidden"), ("acquire", "cross-site"),
    ):  # fmt: skip
        name, labels = "keypool_calls_total", {"operation": operation, "outcome": outcome}
        was = before.get((name, frozenset(labels.items())), 0)
        assert value(after, name, **labels) - was == 1, labels


def test_what_alerts_count_is_there_at_zero_from_the_start(tmp_path: Path) -> None:
    """A series that begins with its first burst has no increase, so the alert would miss that burst."""
    with ServerProcess(["--port=0", "--data=:memory:"], cwd=tmp_path) as server:
        found = samples(server)
    for outcome in ("ok", "internal", "storage-unavailable", "unauthorized", "forbidden"):
        for operation in ("acquire", "batch", "list", "none"):
            assert value(found, "keypool_calls_total", operation=operation, outcome=outcome) == 0
    assert value(found, "keypool_calls_total", operation="acquire", outcome="too-many-waiters") == 0
    assert value(found, "keypool_oldest_wait_seconds") == 0
    limits = {name: value(found, "keypool_limit", limit=name) for name in ("max_keys", "max_waiters")}
    assert limits == {"max_keys": 1_000_000, "max_waiters": 10_000}
    assert value(found, "keypool_limit", limit="max_viewers") == 200
    assert value(found, "keypool_limit", limit="connections") >= 1


def test_the_service_time_excludes_waiting(server: ServerProcess) -> None:
    """The wait of an acquire is not service time; meanwhile the oldest wait is shown."""
    client = server.client()
    before = samples(server)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(lambda: server.client().post(ACQUIRE, json={"wait": 30}))
        eventually(lambda: value(samples(server), "keypool_oldest_wait_seconds") > 0.5, "somebody waits")
        client.make()
        waiting.result().expect(200)
    after = samples(server)

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert moved("keypool_call_seconds_count", operation="acquire") == 1
    assert moved("keypool_acquire_wait_seconds_sum") > 0.5
    assert moved("keypool_call_seconds_sum", operation="acquire") < moved("keypool_acquire_wait_seconds_sum")
    assert value(after, "keypool_oldest_wait_seconds") == 0


def test_releases_and_commits_are_measured(server: ServerProcess) -> None:
    """How late a release came; how long a commit took, where there is a data file."""
    client = server.client()
    pool = client.make_pool("short", block_seconds=SHORT_BLOCK)
    client.post(pool + "/keys").expect(201)
    count = value(samples(server), "keypool_release_lateness_seconds_count")
    client.post(pool + "/keys/acquire").expect(200)
    eventually(
        lambda: value(samples(server), "keypool_release_lateness_seconds_count") == count + 1,
        "a release",
    )


def test_commits_are_measured_with_a_data_file(tmp_path: Path) -> None:
    """Seconds and rows of each."""
    with ServerProcess(["--port=0"], cwd=tmp_path) as server:
        found = samples(server)
        assert value(found, "keypool_commit_age_seconds") == 0
        assert value(found, "keypool_storage_failing_seconds") == 0
        assert value(found, "keypool_writer_restarts_total") == 0
        assert value(found, "keypool_data_file_bytes", file="data") >= 0
        assert value(found, "keypool_data_file_bytes", file="log") >= 0
        assert value(found, "keypool_disk_free_bytes") > 0
        assert value(found, "keypool_commit_seconds_sum") < 60, "measured from the start of the machine"
        server.client().make_many(10)
        found = samples(server)
        assert value(found, "keypool_commit_seconds_count") >= 1
        assert value(found, "keypool_commit_rows_sum") >= 10
        assert value(found, "keypool_storage_up") == 1


async def test_no_label_holds_a_key_an_owner_or_a_path(pages: Browser) -> None:
    """Whatever was requested, labels are the documented ones, and their values are from fixed sets."""
    key = (await pages.make())[0]["key"]
    await pages.acquire(owner="owner-in-a-label")
    for path in (f"{API}/keys/{key}", f"{API}/keys/path-in-a-label", f"/{key}", f"{API}/{key}?x={key}"):
        await pages.request(path)
        await pages.request(path, "PROPFIND")
    text = (await pages.request("/metrics")).text
    assert key not in text
    assert "in-a-label" not in text
    allowed = {"keypool_keys": {"state"}, "keypool_build_info": {"version", "engine"}}
    allowed |= {"keypool_limit": {"limit"}}
    allowed |= {"keypool_calls_total": {"operation", "outcome"}, "keypool_call_seconds": {"operation", "le"}}
    allowed |= {"keypool_auth_failures_total": {"kind"}, "keypool_outcomes_total": {"outcome"}}
    # The one pool there is, `default`, is left out by `parsed`.
    for name, labels in parsed(text):
        base = name if name in BY_NAME else SUFFIX.sub("", name)
        assert {label for label, _ in labels} <= allowed.get(base, {"le"}), f"{name} {sorted(labels)}"
        for label, word in labels:
            assert label in ("le", "version") or re.fullmatch(r"[a-z_-]+", word), f"{name} {label}={word}"


# --------------------------------------------------------------------------------------------- who asks for it


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression of the dashboard and the alert rules, with where it stands."""
    dashboard = json.loads((DEPLOY / "grafana" / "keypool.json").read_text())
    found = [
        (f"panel {panel['title']}", target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)\n\s+expr: (.+)\n", rules)
    assert len(alerts) == rules.count("- alert:")
    return found + [(f"alert {name}", expression) for name, expression in alerts]


@pytest.mark.parametrize("what", ["panel", "alert"])
def test_dashboard_and_alerts_name_metrics_that_exist(what: str) -> None:
    """Each is used as its kind allows: buckets of histograms, rates of counters, existing labels."""
    for where, expression in expressions():
        if where.startswith(what):
            check_expression(where, expression)


def check_expression(where: str, expression: str) -> None:
    """Fails unless the expression fits the metrics that it names."""
    names = re.findall(r"\b(?:keypool|process)_[a-z0-9_]+", expression)
    assert names or 'up{job="keypool"}' in expression, where
    described = {}
    for name in names:
        base = name if name in BY_NAME else SUFFIX.sub("", name)
        assert base in BY_NAME, f"{where}: there is no metric {name}"
        described[name] = BY_NAME[base]
        if BY_NAME[base].kind == "histogram":
            assert SUFFIX.search(name), f"{where}: {name} is a histogram"
        rated = re.search(rf"(rate|increase)\({name}\b", expression) is not None
        assert rated is (BY_NAME[base].kind != "gauge"), f"{where}: rate of {name}"
    for label in re.findall(r"[{,]\s*(\w+)\s*[=!]", expression):
        assert label == "job" or any(label in each.labels for each in described.values()), f"{where}: {label}"


def test_alerts_and_panels_find_their_metrics_in_a_real_scrape(tmp_path: Path) -> None:
    """Every series name in an expression exists from the start, except those of the Valkey engine."""
    asked = {
        name
        for _, expression in expressions()
        for name in re.findall(r"\b(?:keypool|process)_[a-z0-9_]+", expression)
        if not name.startswith(("keypool_pipeline_", "keypool_clock_"))
    }
    with ServerProcess(["--port=0"], cwd=tmp_path) as server:
        found = {name for name, _ in samples(server)}
    assert asked - found == set()


def test_every_metric_of_ours_stands_in_the_dashboard() -> None:
    """Every metric has a panel."""
    shown = " ".join(expression for where, expression in expressions() if where.startswith("panel"))
    names = [name for name in BY_NAME if name.startswith("keypool_")]
    assert [name for name in names if name not in shown] == []


def test_every_alert_links_to_its_place_in_the_runbook() -> None:
    """The URL names the page and the anchor of the alert's own row."""
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    links = re.findall(r"runbook_url: https://\S+/(docs/\S+\.md)#(\w+)\n", rules)
    assert [anchor for _, anchor in links] == [alert.lower() for alert in alerts]
    for alert, (page, anchor) in zip(alerts, links, strict=True):
        text = (DEPLOY.parent / page).read_text(encoding="utf-8")
        assert f'| <a id="{anchor}"></a>`{alert}` |' in text, f"{page} has no row for {alert}"
