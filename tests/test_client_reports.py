"""What holders report: read from responses of HTTP libraries, and sent with the key when it is given back."""

from __future__ import annotations

import email.message
import json
import logging
import urllib.error
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import requests
from client_support import KINDS, Driver, Proxy, clean, url_of
from support import ServerProcess

from keypool.client import KeyPool, LeaseLost, Outcome, StaleLease, Unblock
from keypool.client.reports import Report, judge, rate_limit, retry_after_of, tidy, worse
from keypool.client.settings import now
from keypool.client.testing import FakeServer

DATE = "Tue, 01 Jan 2030 00:00:00 GMT"
IN_30_S = "Tue, 01 Jan 2030 00:00:30 GMT"


# ------------------------------------------------------------------------------------------- from responses


def _httpx2(status: int, headers: dict[str, str]) -> Any:
    return httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://service/"))


def _requests(status: int, headers: dict[str, str]) -> Any:
    made = requests.Response()
    made.status_code = status
    made.headers.update(headers)
    return made


def _aiohttp(status: int, headers: dict[str, str]) -> Any:
    """Its responses have `status`, and headers in which case doesn't matter."""
    return SimpleNamespace(status=status, headers=httpx2.Headers(headers))


LIBRARIES = (_httpx2, _requests, _aiohttp)
MEANINGS: list[tuple[int, dict[str, str], str | None, float | None]] = [
    (429, {}, "rate_limited", None),
    (429, {"Retry-After": "30"}, "rate_limited", 30),
    (429, {"retry-after": " 1.5 "}, "rate_limited", 1.5),
    (429, {"Retry-After": "0"}, "rate_limited", 0),
    (429, {"Retry-After": IN_30_S, "Date": DATE}, "rate_limited", 30),
    (429, {"Retry-After": "soon"}, "rate_limited", None),
    (402, {}, "rate_limited", None),
    (402, {"Retry-After": "3600"}, "rate_limited", 3600),
    (503, {"Retry-After": "7"}, "rate_limited", 7),
    (503, {}, "error", None),
    (503, {"Retry-After": "-1"}, "error", None),
    (500, {}, "error", None),
    (500, {"Retry-After": "7"}, "error", None),
    (502, {}, "error", None),
    (504, {}, "error", None),
    (401, {}, "invalid", None),
    (403, {}, None, None),
    (200, {"Retry-After": "7"}, None, None),
    (302, {}, None, None),
    (400, {}, None, None),
    (404, {}, None, None),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("status", "headers", "outcome", "retry_after"), MEANINGS)
def test_a_response_says_how_the_key_is(
    library: Any,
    status: int,
    headers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    outcome: str | None,
    retry_after: float | None,
) -> None:
    monkeypatch.setattr("keypool.client.reports.now", lambda: 1000.0)
    found = judge(library(status, headers))
    assert (found and found.outcome) == outcome
    if found is not None:
        assert found.reason == f"HTTP {status}"
        assert found.retry_after == retry_after


def test_raise_for_status_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keypool.client.reports.now", lambda: 1000.0)
    for library in (_httpx2, _requests):
        with pytest.raises((httpx2.HTTPStatusError, requests.HTTPError)) as raised:
            library(429, {"Retry-After": "30"}).raise_for_status()
        found = judge(raised.value)
        assert found is not None
        assert (found.outcome, found.retry_after) == ("rate_limited", 30)

    class ClientResponseError(Exception):  # aiohttp's has the status and the headers itself
        status = 401
        headers = None

    found = judge(ClientResponseError())
    assert found is not None
    assert found.outcome == "invalid"
    refused = urllib.error.HTTPError("http://service/?key=secret", 503, "x", email.message.Message(), None)
    found = judge(refused)
    assert found is not None
    assert (found.outcome, found.reason) == ("error", "HTTP 503")
    refused.close()


def test_time_outs_are_errors_and_other_failures_say_nothing() -> None:
    class ServerTimeoutError(TimeoutError):
        """As aiohttp's."""

    for error in (
        httpx2.ReadTimeout("http://service/?key=secret"),
        httpx2.ConnectTimeout("no"),
        requests.ReadTimeout("no"),
        requests.ConnectTimeout("no"),
        ServerTimeoutError(),
        TimeoutError(),
    ):
        found = judge(error)
        assert found == Report(Outcome.ERROR, reason=type(error).__name__), error
    for other in (
        httpx2.ConnectError("no"),
        httpx2.PoolTimeout("all connections of this client are in use"),
        requests.ConnectionError("no"),
        ZeroDivisionError(),
    ):
        assert judge(other) is None, other
    with pytest.raises(TypeError, match="NoneType"):
        judge(None)
    with pytest.raises(TypeError, match="int"):
        judge(429)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("2.", 2),
        ("9" * 400, 1e9),
        (IN_30_S, 30),
        ("Tuesday, 01-Jan-30 00:00:30 GMT", 30),
        ("Tue Jan  1 00:00:30 2030", 30),
        ("Tue, 01 Jan 2030 00:00:30 -0000", 30),
        ("Mon, 31 Dec 2029 23:59:00 GMT", 0),
        *[
            (junk, None)
            for junk in ("", " ", "-5", "+5", "1e3", "nan", "inf", "5 s", "٣", "Tue, 99 Jan 2030", "0x10")
        ],
    ],
)
def test_retry_after_in_every_form(given: str, seconds: float | None) -> None:
    """Dates count from the response's own date, however wrong the clocks are."""
    assert retry_after_of({"retry-after": given, "date": DATE}) == seconds


def test_a_date_without_the_responses_date_counts_from_now() -> None:
    assert retry_after_of({"Retry-After": DATE}) is not None
    assert retry_after_of({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after_of({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "yesterday"}) == 0


# -------------------------------------------------------------------------------------- several reports


def test_the_worse_of_two_reports_counts() -> None:
    ok, error, invalid = (Report(each) for each in (Outcome.OK, Outcome.ERROR, Outcome.INVALID))
    soon, later, sometime = rate_limit(1, None), rate_limit(60, None), rate_limit(None, None)
    ascending = [ok, error, sometime, soon, later, invalid]
    for number, bad in enumerate(ascending):
        assert worse(None, bad) is bad
        for better in ascending[:number]:
            assert worse(bad, better) is bad
            assert worse(better, bad) is bad
    first = Report(Outcome.ERROR, reason="first")
    assert worse(first, Report(Outcome.ERROR, reason="second")) is first


def test_a_reason_is_made_fit_to_be_shown() -> None:
    assert tidy("  quota\r\n of sk-live-1\x00 is spent ", "sk-live-1", "sk…1") == "quota of sk…1 is spent"
    assert tidy(" \n", "k", "…") is None
    assert tidy(None, "k", "…") is None
    long = tidy("x" * 1000, "key", "…")
    assert long is not None
    assert (len(long), long[-1]) == (200, "…")


@pytest.mark.parametrize("retry_after", [-1, float("nan"), float("inf"), 2e15])
def test_a_retry_after_that_makes_no_sense(retry_after: float) -> None:
    with KeyPool(transport=FakeServer(["key-1"])) as pool, pool.lease() as key:
        with pytest.raises(ValueError, match="retry_after"):
            key.rate_limited(retry_after)
        with pytest.raises(ValueError, match="retry_after"):
            pool.unblock(key, outcome="rate_limited", retry_after=retry_after)
        assert key.outcome is None


# ------------------------------------------------------------------------------------------ to the server


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Driver]:
    with Driver(request.param, url_of(server)) as made:
        yield made
    clean(server)


def test_a_lease_that_ends_well_is_ok(driver: Driver) -> None:
    made = driver.generate()
    with driver.lease() as key:
        pass
    assert (key.unblocked.state, key.unblocked.changed) == ("available", True)
    row = driver.get(made)
    assert (row.state, row.outcome, row.failures) == ("available", "ok", 0)


def test_a_lease_that_raises_says_nothing_by_itself(driver: Driver) -> None:
    made = driver.generate()
    with pytest.raises(ZeroDivisionError), driver.lease():
        raise ZeroDivisionError
    row = driver.get(made)
    assert (row.state, row.outcome) == ("available", None)


def test_what_was_reported_is_sent_even_if_the_block_raises(driver: Driver) -> None:
    """The usual program: `key.report(response)`, then `response.raise_for_status()`."""
    made = driver.generate()
    response = _httpx2(429, {"Retry-After": "300"})
    with pytest.raises(httpx2.HTTPStatusError), driver.lease() as key:  # noqa: PT012 - the last line
        assert key.report(response) is Outcome.RATE_LIMITED
        response.raise_for_status()
    row = driver.get(made)
    assert (row.state, row.outcome, row.reason, row.failures) == ("cooling", "rate_limited", "HTTP 429", 1)
    assert 290 < row.available_in <= 300
    assert row.release_in is None
    assert driver.stats().cooling == 1
    restored = driver.restore(made)
    assert (restored.state, restored.outcome, restored.failures) == ("available", None, 0)


def test_uses_are_charged_to_a_key_with_a_pace(driver: Driver) -> None:
    """By a report of a held key, whichever; without one; by an unblock, and by items of a batch."""
    pace = {"count": 1, "seconds": 100.0, "burst": 1}
    made = driver.generate()
    assert driver.update(made.id, pace=pace).pace == pace
    charged = []
    for give_back in (
        lambda key: key.ok(uses=2),
        lambda key: key.report(_httpx2(200, {}), uses=3),
        lambda key: [key.error(uses=5), key.ok(uses=4)],
        lambda key: None,
    ):
        with driver.lease() as key:
            give_back(key)
        charged.append(round(driver.get(made).available_in / 100))
        driver.replace(made.id, f"sk-another-{len(charged)}")  # which has its full budget
    assert charged == [2, 3, 4, 1]
    lease = driver.acquire()
    assert 590 < driver.unblock(lease, uses=6).available_in <= 600
    driver.replace(made.id, "sk-the-last-one")
    assert driver.unblock_many([Unblock(driver.acquire(), uses=7)]).done == 1
    assert 690 < driver.get(made).available_in <= 700
    assert driver.stats().paced >= 6
    assert driver.update(made.id, pace={}).pace is None


@pytest.mark.parametrize("uses", [0, -1, 1.5, True, 10**9 + 1])
def test_wrong_uses_are_refused_before_anything_is_sent(uses: Any) -> None:
    fake = FakeServer(["key-1"])
    with KeyPool(transport=fake) as pool, pool.lease() as key:
        for call in (lambda: key.ok(uses=uses), lambda: pool.unblock(key, uses=uses)):
            with pytest.raises(ValueError, match="uses is a whole number from 1 to 10"):
                call()
        assert not key.over


def test_every_outcome(driver: Driver) -> None:
    made = driver.generate_many(8)  # the guard lets half of them be quarantined
    rows = {}
    for outcome in Outcome:
        with driver.lease() as key:
            if outcome is Outcome.INVALID:
                key.invalid(f"401 for {key.secret}\n")
            else:
                getattr(key, outcome)()
            assert key.outcome is outcome
        rows[outcome] = driver.get(key.id)
        assert rows[outcome].outcome is outcome
        driver.quarantine(key.id, now=True)
    assert [rows[each].state for each in Outcome] == ["available", "cooling", "available", "quarantined"]
    assert 50 < rows[Outcome.RATE_LIMITED].available_in <= 60
    assert rows[Outcome.ERROR].failures == 1
    assert rows[Outcome.INVALID].reason == f"401 for {rows[Outcome.INVALID].hint}"
    assert driver.restore_many(made).done == 8
    assert {row.state for row in driver.rows()} == {"available"}


def test_the_time_between_a_report_and_the_end_counts(driver: Driver) -> None:
    """The key cools until the moment that the service named."""
    driver.generate()
    with driver.lease() as key:
        key.rate_limited(retry_after=100)
        key._report = Report(Outcome.RATE_LIMITED, now() + 40)  # a minute later
    assert 30 < key.unblocked.available_in <= 40


def test_a_key_may_be_released_before_its_block_ends(driver: Driver) -> None:
    made = driver.generate()
    with driver.lease() as key:
        key.error("timed out")
        answer = driver.wait(key.release())
        assert (answer.state, answer.changed) == ("available", True)
        assert driver.get(made).outcome == "error"
        with pytest.raises(LeaseLost, match="given back"):
            _ = key.secret
        assert not key.lost.is_set()
        theirs = driver.acquire()
    assert driver.get(made).lease == theirs.lease
    assert driver.wait(key.release()) is answer  # nothing more is sent


def test_a_lease_costs_two_requests(server: ServerProcess) -> None:
    for kind in KINDS:
        with Proxy(server) as proxy, Driver(kind, proxy.url) as driver:
            driver.generate()
            with driver.lease() as key:
                key.rate_limited(5)
                key.error()
            assert len(proxy.requests) == 3
    clean(server)


def test_reports_without_a_with(driver: Driver) -> None:
    made = driver.generate_many(3)
    leased = driver.wait(driver.pool.acquire_many(3))
    answer = driver.unblock(leased[0], outcome="rate_limited", retry_after=77, reason="busy")
    assert (answer.state, answer.changed, answer.guarded) == ("cooling", True, False)
    assert 70 < answer.available_in <= 77
    assert driver.unblock(leased[0], outcome="ok").changed is False  # each lease reports once
    done = driver.unblock_many(
        [
            Unblock(leased[1], outcome="invalid", reason="401"),
            Unblock(leased[2].secret, leased[2].lease, "error"),
            Unblock("nobody", 1, "ok"),
            Unblock(leased[0].secret, 10**9, "ok"),
        ]
    )
    assert (done.done, done.unknown, done.stale) == (2, ["nobody"], [leased[0].secret])
    states = {row.id: (row.state, row.reason) for row in driver.rows()}
    assert states[leased[1].id] == ("quarantined", "401")
    assert states[leased[2].id] == ("available", None)
    assert [row.id for row in driver.rows(order="ready")] == [leased[0].id]
    assert [row.id for row in driver.rows(state="quarantined")] == [leased[1].id]
    assert driver.delete_many(made).done == 3


def test_operators_quarantine_and_restore(driver: Driver) -> None:
    made = driver.generate_many(3)
    with driver.lease() as key:
        row = driver.quarantine(key, "is being replaced")
        assert row.state == "blocked"
        key.check()
    assert key.unblocked.state == "quarantined"
    assert driver.get(key.id).reason == "is being replaced"
    with pytest.raises(LeaseLost, match="had ended before"), driver.lease() as taken:
        assert driver.quarantine(taken.id, now=True).state == "quarantined"
    done = driver.quarantine_many([*made, "nobody"], "all of them", now=True)
    assert (done.done, done.unknown) == (3, ["nobody"])
    assert {row.reason for row in driver.rows()} == {"all of them"}
    assert driver.restore(key).state == "available"
    assert driver.restore_many(made).done == 3
    assert driver.stats().available == 3


# -------------------------------------------------------------------------------------- secrets, and older servers


def test_no_secret_is_in_any_url(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    """A lease is named by its handle, a generated key by its id."""
    caplog.set_level(logging.DEBUG)
    for kind in KINDS:
        with Proxy(server) as proxy, Driver(kind, proxy.url) as driver:
            made = driver.generate()
            with driver.lease(extend=True) as key:
                key.invalid(f"refused {key.secret}")
                driver.get(key)
                driver.keepalive(key)
                driver.quarantine(key)
                shown = [repr(key), str(key), key.handle]
            driver.restore(key)
            leased = driver.acquire()
            shown += [
                repr(leased),
                repr(driver.unblock(leased, outcome="error", reason=f"no {leased.secret}")),
            ]
            leased = driver.wait(driver.pool.acquire_many(1))[0]
            with pytest.raises(StaleLease) as stale:
                driver.unblock(made.secret, 10**9)
            shown += [str(stale.value), repr(stale.value), repr(Unblock(leased, reason="x"))]
            driver.restore(made)
            driver.reveal(made)
            driver.keepalive(made)
            lines = proxy.requests
            text = [line for line in lines if made.secret in line]
            assert len(lines) > 12
            assert text == [f"POST /api/v1/keys/{made.secret}/unblock HTTP/1.1"]  # the text alone was given
            assert made.secret not in "".join(shown)
            assert made.secret not in caplog.text.replace(text[0].split()[1], "")
            driver.delete(made)


def test_an_older_server_gets_no_reports(caplog: pytest.LogCaptureFixture) -> None:
    """It gives no handles, and refuses members that it doesn't know."""
    bodies: list[Any] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append((request.url.path, json.loads(request.content)))
        lease = {"id": 1, "key": "k", "lease": 7, "release_in": 60, "expires_in": 300}
        if request.url.path.endswith("acquire"):
            return httpx2.Response(200, json=lease)
        return httpx2.Response(200, json={"id": 1, "state": "available", "changed": True})

    with KeyPool("http://mock", transport=httpx2.MockTransport(answer)) as pool:
        for report in (None, "ok", "error"):
            with pool.lease(owner="me") as key:
                if report is not None:
                    getattr(key, report)()
        with pytest.raises(Exception, match="too old"), pool.lease(owner="me") as key:
            key.extend()
    assert {json.dumps(body) for path, body in bodies if path.endswith("unblock")} == {'{"lease": 7}'}
    assert caplog.text.count("doesn't take reports") == 1
