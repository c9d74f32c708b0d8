"""/metrics: who may have it, that it tells the truth, that it tells no secret, and that nobody asks for more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from support import ACQUIRE, ADMIN_TOKEN, API, CLIENT_TOKEN, VIEWER_TOKEN, ServerProcess, eventually

from keypool.metrics import METRICS

DEPLOY = Path(__file__).parents[1] / "deploy"
SUFFIX = re.compile(r"_(bucket|sum|count)$")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: ServerProcess, token: str | None = None) -> requests.Response:
    """One GET of /metrics."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.get(f"http://{server.host}/metrics", headers=headers, timeout=30)


def samples(server: ServerProcess) -> Samples:
    """Every sample by name and labels."""
    response = scrape(server)
    assert response.status_code == 200, response.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """The value of one sample; fails if it isn't there."""
    return found[name, frozenset(labels.items())]


# -------------------------------------------------------------------------------------------------------- who


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        (None, 401, "unauthorized"),
        ("nobody-knows-this-one", 401, "unauthorized"),
        (CLIENT_TOKEN, 403, "forbidden"),
        (VIEWER_TOKEN, 200, None),
        (ADMIN_TOKEN, 200, None),
    ],
    ids=["none", "unknown", "client", "viewer", "admin"],
)
def test_metrics_are_for_viewers(
    guarded_server: ServerProcess, token: str | None, status: int, code: str | None
) -> None:
    """By bearer token, as a problem for everybody else."""
    response = scrape(guarded_server, token)
    assert response.status_code == status, response.text
    if code:
        assert response.json()["code"] == code
        assert ("WWW-Authenticate" in response.headers) is (status == 401)


# ------------------------------------------------------------------------------------------------- what it says


def test_every_metric_is_there_and_no_other(server: ServerProcess) -> None:
    """Those of the docs, from the first scrape on, each state also at zero; journal's and Valkey's only with these."""
    found = samples(server)
    names = {SUFFIX.sub("", name) if SUFFIX.sub("", name) in BY_NAME else name for name, _ in found}
    missing = {
        name
        for name in set(BY_NAME) - names - OF_DATA_FILE
        if not name.startswith(("keypool_commit_", "keypool_pipeline_"))
    }
    assert {name for name in missing if not name.startswith("process_")} == set()
    assert names - set(BY_NAME) == set()
    assert value(found, "keypool_keys", state="available") == 0
    assert value(found, "keypool_keys", state="blocked") == 0


BY_NAME = {each.name: each for each in METRICS}
OF_DATA_FILE = {
    "keypool_commit_age_seconds",
    "keypool_storage_failing_seconds",
    "keypool_writer_restarts_total",
    "keypool_data_file_bytes",
    "keypool_disk_free_bytes",
}


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


def test_releases_and_commits_are_measured(short_server: ServerProcess) -> None:
    """How late a release came; how long a commit took, where there is a data file."""
    client = short_server.client()
    client.make()
    count = value(samples(short_server), "keypool_release_lateness_seconds_count")
    client.acquire()
    eventually(
        lambda: value(samples(short_server), "keypool_release_lateness_seconds_count") == count + 1,
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


def test_no_label_holds_a_key_an_owner_or_a_path(server: ServerProcess) -> None:
    """Whatever was asked, the labels are those that the docs name, and their values words of ours."""
    client = server.client()
    key = client.make()["key"]
    client.acquire(owner="owner-in-a-label")
    for path in (f"{API}/keys/{key}", f"{API}/keys/path-in-a-label", f"/{key}", f"{API}/{key}?x={key}"):
        client.get(path)
        client.request("BREW", path)
    text = scrape(server).text
    assert key not in text
    assert "in-a-label" not in text
    allowed = {"keypool_keys": {"state"}, "keypool_build_info": {"version", "engine"}}
    allowed |= {"keypool_calls_total": {"operation", "outcome"}, "keypool_call_seconds": {"operation", "le"}}
    for name, labels in samples(server):
        base = name if name in BY_NAME else SUFFIX.sub("", name)
        assert {label for label, _ in labels} <= allowed.get(base, {"le"}), f"{name} {sorted(labels)}"
        for label, word in labels:
            assert label in ("le", "version") or re.fullmatch(r"[a-z-]+", word), f"{name} {label}={word}"


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


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text[:40])
def test_dashboard_and_alerts_name_metrics_that_exist(where: str, expression: str) -> None:
    """And ask of each what its kind has: buckets of histograms, rates of counters, labels that are there."""
    names = re.findall(r"\b(?:keypool|process)_[a-z0-9_]+", expression)
    assert names or expression.startswith("up{"), where
    for name in names:
        base = name if name in BY_NAME else SUFFIX.sub("", name)
        assert base in BY_NAME, f"{where}: there is no metric {name}"
        if BY_NAME[base].kind == "histogram":
            assert SUFFIX.search(name), f"{where}: {name} is a histogram"
        rated = f"rate({name}" in expression
        assert rated is (BY_NAME[base].kind != "gauge"), f"{where}: rate of {name}"
    for label in re.findall(r"[{,]\s*(\w+)\s*[=!]", expression):
        assert label == "job" or any(
            label in BY_NAME[SUFFIX.sub("", n)].labels for n in names if n in BY_NAME
        )


def test_every_metric_of_ours_stands_in_the_dashboard() -> None:
    """What is worth counting is worth a look."""
    shown = " ".join(expression for where, expression in expressions() if where.startswith("panel"))
    names = [name for name in BY_NAME if name.startswith("keypool_") and name not in OF_DATA_FILE]
    assert [name for name in names if name not in shown] == []


def test_every_alert_stands_in_the_runbook() -> None:
    """Whoever is called at night finds what to do."""
    text = (DEPLOY.parent / "docs" / "operations.md").read_text(encoding="utf-8")
    alerts = [where.removeprefix("alert ") for where, _ in expressions() if where.startswith("alert")]
    assert [alert for alert in alerts if f"`{alert}`" not in text] == []
