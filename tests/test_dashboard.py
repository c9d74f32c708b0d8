"""The dashboard's pages as the server sends them, without a browser: their content, and who may read them."""

from __future__ import annotations

import gzip
import logging
import re
import time
from hashlib import sha256
from html import unescape
from urllib.parse import urlencode

import pytest
from app_client import Browser, guarded, serves
from conftest import Start
from jinja2 import Environment
from support import ADMIN_TOKEN, API, CLIENT_TOKEN, VIEWER_TOKEN, ServerProcess
from viewing import Closed, Viewer

PAGES = (
    "/", "/keys", "/keys?tab=blocked", "/keys?tab=available", "/keys?tab=cooling", "/keys?tab=quarantined",
    "/keys?tab=expiring", "/events", "/events?kind=cooled", "/system", "/calls", "/owners",
    "/waiters", "/tokens",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------- pages


async def test_every_page_is_complete_and_guarded(pages: Browser) -> None:
    """Each has a strict Content-Security-Policy, nothing inline, and Cache-Control: no-store."""
    await pages.make(3)
    await pages.acquire(owner="<b>worker</b>")
    for path in PAGES:
        page = await pages.fetch(path)
        assert page.status == 200, path
        assert page.headers["Content-Type"] == "text/html; charset=UTF-8"
        assert page.headers["Cache-Control"] == "no-store"
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["X-Frame-Options"] == "DENY"
        policy = page.headers["Content-Security-Policy"]
        for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert rule in policy
        assert "unsafe" not in policy
        assert re.search(r"<title>.+ · keypool</title>", page.text)
        inline = r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son\w+=|javascript:"
        assert not re.search(inline, page.text), path
        assert "<b>worker" not in page.text


async def test_no_page_shows_a_key(pages: Browser) -> None:
    """Pages show hints; a script gets a key by reveal alone."""
    keys = await pages.make(30)
    await pages.acquire()
    paths = (*PAGES, f"/keys/{keys[0]['id']}", "/figures?state")
    texts = [(await pages.fetch(path)).text for path in paths]
    for key in keys:
        assert not any(key["key"] in text or key["key"][:6] in text for text in texts)
    assert f"{keys[0]['key'][:4]}…{keys[0]['key'][-4:]}" in texts[1]


async def test_the_overview_is_right_before_any_script_runs(pages: Browser) -> None:
    """Its HTML has the numbers, the next releases and the latest events."""
    await pages.make(5)
    lease = await pages.acquire(owner="worker-7")
    text = (await pages.fetch("/")).text
    assert figures(text) == ["4", "1", "0", "0", "0"]
    assert "worker-7" in text
    assert f"lease {lease['lease']}" in text
    assert re.search(r'id="empty"\s+hidden', text)


def figures(text: str) -> list[str]:
    """The figures of the overview's first tiles: the four states, and waiting."""
    return re.findall(r'class="figure">([\d,]+)<', text)[:5]


def keys_of(text: str) -> list[int]:
    """The ids of a table's rows."""
    return [int(number) for number in re.findall(r'class="key-row" data-id="(\d+)"', text)]


def expect_countdown(shown: str, whole: int, began: float) -> None:
    """Fails unless a page that was fetched by now may show this of so many seconds, which began after `began`."""
    possible = range(whole - int(time.monotonic() - began) - 1, whole + 1)
    texts = [f"{left // 60}:{left % 60:02}" for left in possible if left < 3600]
    texts += [f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" for left in possible if left >= 3600]
    assert shown in texts, f"{shown} is left of {whole} s, wanted one of {texts}"


async def report(pages: Browser, outcome: str, **fields: object) -> int:
    """Acquire a key and give it back with an outcome. Returns its id."""
    lease = await pages.acquire()
    body = {"lease": lease["lease"], "outcome": outcome, **fields}
    (await pages.call("POST", f"/keys/id:{lease['id']}/unblock", body)).expect(200)
    return int(lease["id"])


async def quarantine(pages: Browser, key_id: int, **fields: object) -> None:
    """Quarantine a key as an admin."""
    (await pages.call("POST", f"/keys/id:{key_id}/quarantine", fields)).expect(200)


async def test_the_overview_counts_four_states(pages: Browser) -> None:
    """It lists the cooling key that is ready next, with its outcome."""
    await pages.make(9)
    began = time.monotonic()
    slow = await report(pages, "rate_limited", retry_after=3700)
    soon = await report(pages, "rate_limited", retry_after=300)
    await report(pages, "invalid", reason="401 from example.com")
    await pages.acquire()
    text = (await pages.fetch("/")).text
    assert figures(text) == ["5", "1", "2", "1", "0"]
    cooling = text[text.index('data-order="ready"') : text.index('id="latest-title"')]
    assert re.findall(r'<li data-id="(\d+)"', cooling) == [str(soon), str(slow)]
    assert "rate limited, 1 failure" in cooling
    for shown, whole in zip(re.findall(r'class="time">([^<]+)<', cooling), (300, 3700), strict=True):
        expect_countdown(shown, whole, began)


async def test_the_tiles_warn_when_over_half_of_the_pool_is_out(pages: Browser) -> None:
    """Cooling and quarantined keys count together; half of the pool is not more than half."""
    keys = await pages.make(4)
    await report(pages, "rate_limited", retry_after=300)
    [one, two] = [key["id"] for key in keys if (await is_available(pages, key["id"]))][:2]
    await quarantine(pages, one)
    assert "over half of the pool is out" not in (await pages.fetch("/")).text
    await quarantine(pages, two)
    text = (await pages.fetch("/")).text
    assert re.findall(r'<div class="tile warn" id="tile-(\w+)"', text) == ["cooling", "quarantined"]
    assert text.count("over half of the pool is out") == 2


async def is_available(pages: Browser, key_id: int) -> bool:
    """Whether a key is available."""
    row = (await pages.call("GET", f"/keys/id:{key_id}")).expect(200)
    return bool(row["state"] == "available")


async def test_each_state_has_a_list(pages: Browser) -> None:
    """The cooling ones in the order in which they are ready; a search keeps to the state."""
    keys = {key["id"]: key["key"] for key in await pages.make(6)}
    began = time.monotonic()
    later = await report(pages, "rate_limited", retry_after=100_000, reason="daily quota")
    sooner = await report(pages, "rate_limited", retry_after=40, reason="per minute")
    gone = await report(pages, "invalid", reason="<i>401</i>")
    text = (await pages.fetch("/keys?tab=cooling")).text
    assert keys_of(text) == [sooner, later]
    assert text.index("per minute") < text.index("daily quota")
    soon, late = re.findall(r'data-kind="ready".*?class="time">([^<]+)<', text, re.DOTALL)
    expect_countdown(soon, 40, began)
    assert late == "1 d 3 h"
    text = (await pages.fetch("/keys?tab=quarantined")).text
    assert keys_of(text) == [gone]
    assert "&lt;i&gt;401&lt;/i&gt;" in text
    assert '<span class="state" data-state="quarantined">quarantined</span>' in text
    assert len(keys_of((await pages.fetch("/keys?tab=available")).text)) == 3
    for tab, found in (("cooling", [later]), ("quarantined", []), ("all", [later])):
        query = urlencode({"tab": tab, "q": keys[later][:4]})
        assert keys_of((await pages.fetch(f"/keys?{query}")).text) == found


async def test_a_state_that_no_key_is_in_says_so(pages: Browser) -> None:
    """Each list has a sentence of its own."""
    await pages.make()
    for tab in ("blocked", "cooling", "quarantined"):
        text = (await pages.fetch(f"/keys?tab={tab}")).text
        shown = re.findall(r'<div data-when="(\w+)">', text)
        assert shown == [tab]
        assert f"No key is {tab}" in text


async def test_the_page_of_a_key_that_is_out_says_why(pages: Browser) -> None:
    """State, countdown, outcome, reason and failures; an operator's reason while the key is quarantined."""
    await pages.make()
    began = time.monotonic()
    key_id = await report(pages, "rate_limited", retry_after=30, reason="429 from example.com")
    text = unescape((await pages.fetch(f"/keys/{key_id}")).text)
    for name, value in (
        ("State", "cooling"), ("Last outcome", "rate limited"), ("Reason", "429 from example.com"),
        ("Failures in a row", "1"),
    ):  # fmt: skip
        assert re.search(rf"<dt>{name}</dt><dd[^>]*>(<span[^>]*>)?{value}<", text), name
    left = re.search(r"<dt>Available in</dt><dd><span class=\"countdown\" data-left=\"([\d.]+)", text)
    assert left is not None
    assert 29 - (time.monotonic() - began) <= float(left[1]) <= 30
    assert "Release in" not in text
    await quarantine(pages, key_id, reason="ticket 4711")
    text = (await pages.fetch(f"/keys/{key_id}")).text
    assert "ticket 4711" in text
    assert "429 from example.com" not in text


@guarded
async def test_events_say_who_or_what_brought_them_about(pages: Browser) -> None:
    """A holder by its name, a deadline, and an operator by the token's mark with the holder who lost the key."""
    await pages.make(2)
    await report(pages, "ok")
    held = await pages.acquire(owner="late <b>")
    await quarantine(pages, held["id"], now=True)
    cookie = await pages.sign_in(VIEWER_TOKEN)
    text = unescape((await pages.fetch("/events", Cookie=cookie)).text)
    line = (
        r'class="event" .*?data-kind="(\w+)">.*?data-f="whom">(.*?)</td>.*?data-f="owner"[^>]*>([^\n]*)</a>'
    )
    said = re.findall(line, text, re.DOTALL)
    mark = sha256(ADMIN_TOKEN.encode()).hexdigest()[:8]
    assert said[::-1] == [
        ("generated", f"operator {mark}", ""),
        ("generated", f"operator {mark}", ""),
        ("acquired", "holder", "worker-7"),
        ("unblocked", "holder", "worker-7"),
        ("acquired", "holder", "late <b>"),
        ("unblocked", f"operator {mark}", "late <b>"),
        ("quarantined", f"operator {mark}", "late <b>"),
    ]
    only = (await pages.fetch("/events?kind=quarantined", Cookie=cookie)).text
    assert only.count('data-kind="quarantined"') == 4  # a tab, the list, one event and its cell


async def test_templates_are_compiled_before_the_first_request(
    pages: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compile one holds up the loop for tens of milliseconds."""
    [key] = await pages.make()
    monkeypatch.delattr(Environment, "compile")
    for path in (*PAGES, f"/keys/{key['id']}", f"/keys/{key['id']}?part", "/login", "/logout", "/nothing"):
        assert (await pages.fetch(path)).status in (200, 303, 404), path


async def test_an_empty_pool_says_what_to_do(pages: Browser) -> None:
    """Its page offers to generate keys, there or from a shell."""
    for path in ("/", "/keys"):
        text = unescape((await pages.fetch(path)).text)
        assert "The pool is empty" in text
        assert '"op":"generate"' in text
        assert not re.search(r'id="empty"[^>]*hidden', text)


async def test_an_exhausted_pool_says_when_a_key_is_free_again(pages: Browser) -> None:
    """The page shows the time until the earliest release."""
    await pages.make()
    began = time.monotonic()
    await pages.acquire()
    text = (await pages.fetch("/")).text
    assert not re.search(r'id="exhausted"[^>]*hidden', text)
    due = re.search(r'id="next-due">The next block or cooldown ends in <strong[^>]*>([\d:]+)<', text)
    assert due is not None
    expect_countdown(due[1], 60, began)
    assert re.search(r'id="none-due"\s+hidden', text)


async def test_a_pool_that_is_out_for_good_says_that_nothing_comes_back_by_itself(pages: Browser) -> None:
    """All keys are quarantined."""
    for key in await pages.make(2):
        await quarantine(pages, key["id"])
    text = unescape((await pages.fetch("/")).text)
    plain = " ".join(re.sub(r"<[^>]+>", "", text).split())
    assert "An acquire waits or gets 404: 0 blocked, 0 cooling and 2 quarantined." in plain
    assert re.search(r'id="next-due"\s+hidden', text)
    assert not re.search(r'id="none-due"\s+hidden', text)


async def test_keys_are_listed_in_pages_of_fifty_by_cursor(pages: Browser) -> None:
    """Every key is on one of them, once."""
    made = {key["id"] for key in await pages.make(120)}
    seen: list[int] = []
    path = "/keys"
    for _ in range(3):
        text = (await pages.fetch(path)).text
        seen += [int(number) for number in re.findall(r'class="key-row" data-id="(\d+)"', text)]
        following = re.search(r'rel="next" href="([^"]+)"', text)
        if following is None:
            break
        path = unescape(following[1])
    assert len(seen) == 120
    assert set(seen) == made


async def test_search_by_prefix_and_by_id(pages: Browser) -> None:
    """A prefix lists; an id leads to the key; anything else is 400 with what would be right, in the page."""
    key = (await pages.make(10))[3]
    text = (await pages.fetch("/keys?" + urlencode({"q": key["key"][:4]}))).text
    assert re.findall(r'class="key-row" data-id="(\d+)"', text) == [str(key["id"])]
    page = await pages.fetch(f"/keys?q=id:{key['id']}")
    assert (page.status, page.headers["Location"]) == (303, f"/keys/{key['id']}")
    none = (await pages.fetch("/keys?q=zz")).text
    assert "key starts with" in none
    assert "Clear the search" in none
    for wrong in ("abcde", "a-b", "id:", "id:x"):
        page = await pages.fetch("/keys?" + urlencode({"q": wrong}))
        assert page.status == 400
        assert "1 to 4 characters" in page.text


async def test_a_key_has_a_page(pages: Browser) -> None:
    """State, holder, deadlines, its events, and the calls as lines for a shell."""
    [made] = await pages.make()
    await pages.acquire(owner="worker-7")
    text = unescape((await pages.fetch(f"/keys/{made['id']}")).text)
    assert "worker-7" in text
    assert text.count('class="event"') >= 2
    assert f"/api/v1/keys/id:{made['id']}/unblock" in text
    gone = await pages.fetch("/keys/999999")
    assert gone.status == 404
    assert "No key has this id" in gone.text
    assert (await pages.fetch("/keys/nonsense")).status == 404


@serves("--block-seconds=31", KEYPOOL_ADMIN_TOKEN=ADMIN_TOKEN, KEYPOOL_MAX_WAITERS="77")
async def test_system_shows_settings_and_where_they_came_from(pages: Browser) -> None:
    """A flag, a variable and a default are shown with their origin; tokens are not shown."""
    text = (await pages.fetch("/system", Authorization=f"Bearer {ADMIN_TOKEN}")).text
    found = re.findall(r"<code>([^<]+)</code></th><td><code>([^<]*)</code></td><td><span[^>]*>(\w+)<", text)
    rows = {flag: (value, origin) for flag, value, origin in found}
    assert rows["--block-seconds"] == ("31", "flag")
    assert rows["--max-waiters"] == ("77", "environment")
    assert rows["--max-viewers"] == ("200", "default")
    assert rows["KEYPOOL_ADMIN_TOKEN"][0].startswith("1 set")
    assert rows["KEYPOOL_VIEWER_TOKEN"] == ("none", "default")
    assert ADMIN_TOKEN not in text


async def test_the_calls_are_those_of_the_api(pages: Browser) -> None:
    """Each call has its shell line."""
    text = unescape((await pages.fetch("/calls")).text)
    for path in ("/keys/acquire", "/keys/{key}/unblock", "/keys/{key}/keepalive", "/batch", "/stats"):
        assert f"<code>/api/v1{path}</code>" in text
    assert text.count("curl -sS") >= 10


async def test_a_browser_gets_a_page_for_an_error(pages: Browser) -> None:
    """This holds outside /api/; other clients get a problem."""
    page = await pages.fetch("/nothing-here")
    assert page.status == 404
    assert page.headers["Content-Type"].startswith("text/html")
    assert "Not found" in page.text
    for path, accept in (("/nothing-here", "*/*"), (API + "/nothing", "text/html")):
        page = await pages.fetch(path, Accept=accept)
        assert page.headers["Content-Type"] == "application/problem+json"


async def test_static_files_may_be_kept_for_ever(pages: Browser) -> None:
    """Their URL changes with their content; other URLs get 404."""
    paths = re.findall(r'(?:href|src)="(/static/[^"]+)"', (await pages.fetch("/")).text)
    assert len(paths) >= 5
    for path in paths:
        page = await pages.fetch(path)
        assert page.status == 200, path
        assert "immutable" in page.headers["Cache-Control"]
    version = paths[0].split("/")[2]
    for path in (
        paths[0].replace(version, "0" * 12),
        f"/static/{version}/../app.py",
        f"/static/{version}/%2e%2e/server.py",
    ):
        assert (await pages.fetch(path)).status == 404


@pytest.mark.parametrize(
    ("accepted", "compressed"),
    [
        ("gzip, deflate, br", True),
        ("br, GZIP; q=0.5", True),
        ("gzip;q=0, *", False),
        ("identity", False),
        ("", False),
    ],
)
async def test_pages_are_compressed_where_that_is_accepted(
    pages: Browser, accepted: str, compressed: bool
) -> None:
    """A page of keys to less than a quarter; answers of the API and figures never."""
    await pages.make(60)
    headers = {"Accept": "text/html", "Accept-Encoding": accepted}
    page = await pages.request("/keys", headers=headers, decompress=False)
    assert (page.headers.get("Content-Encoding") == "gzip") is compressed
    assert page.headers["Vary"] == "Accept-Encoding"
    plain = gzip.decompress(page.body) if compressed else page.body
    assert plain.rstrip().endswith(b"</html>")
    assert not compressed or len(page.body) * 4 < len(plain)
    for path in ("/figures", "/api/v1/keys"):
        assert (
            "Content-Encoding" not in (await pages.request(path, headers=headers, decompress=False)).headers
        )


async def test_every_module_that_a_module_imports_is_there(pages: Browser) -> None:
    """A wrong path would only be noticed by a user who opens that page."""
    entry = re.search(r'src="(/static/\w+/js/)main.js"', (await pages.fetch("/")).text)
    assert entry
    seen: set[str] = set()
    todo = ["main.js", "login.js", *(f"pages/{page}.js" for page in ("overview", "keys", "events", "system"))]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        page = await pages.fetch(entry[1] + name)
        assert page.status == 200, name
        assert name.rpartition("/")[0] in ("", "pages")
        imports = re.findall(r'^import .*?"(\.[^"]+)";$', page.text, re.MULTILINE)
        todo += [re.sub(r"^\.\.?/", "", found) for found in imports]


async def test_a_chosen_theme_is_rendered_by_the_server(pages: Browser) -> None:
    """Then pages don't flash; invalid values of the cookie are ignored."""
    dark = await pages.fetch("/", Cookie="keypool_theme=dark")
    assert '<html lang="en" data-theme="dark">' in dark.text
    assert '<html lang="en">' in (await pages.fetch("/", Cookie='keypool_theme="><script>')).text


# -------------------------------------------------------------------------------------------- who gets them


@guarded
async def test_a_browser_without_a_session_is_sent_to_the_sign_in_and_back(pages: Browser) -> None:
    """A page redirects; a script's call gets 401."""
    page = await pages.fetch("/keys?tab=blocked")
    assert (page.status, page.headers["Location"]) == (303, "/login?next=%2Fkeys%3Ftab%3Dblocked")
    form = await pages.fetch(page.headers["Location"])
    assert '<input type="hidden" name="next" value="/keys?tab=blocked">' in form.text
    done = await pages.fetch("/login", form={"token": VIEWER_TOKEN, "next": "/keys?tab=blocked"})
    assert (done.status, done.headers["Location"]) == (303, "/keys?tab=blocked")
    assert (await pages.fetch("/figures", Accept="application/json")).status == 401


@guarded
@pytest.mark.parametrize(
    "wanted", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:1", "/login"]
)
async def test_the_sign_in_redirects_to_no_other_server(pages: Browser, wanted: str) -> None:
    """`next` must be a path of this server; otherwise the overview is used."""
    done = await pages.fetch("/login", form={"token": VIEWER_TOKEN, "next": wanted})
    assert (done.status, done.headers["Location"]) == (303, "/")


@guarded
async def test_the_cookie_is_kept_from_scripts_and_other_sites(pages: Browser) -> None:
    """It holds no token either."""
    page = await pages.fetch("/login", form={"token": ADMIN_TOKEN})
    given = page.headers["Set-Cookie"]
    for attribute in ("HttpOnly", "SameSite=Strict", "Path=/"):
        assert attribute in given
    assert ADMIN_TOKEN not in given
    assert "Secure" not in given
    forged = await pages.fetch("/login", form={"token": ADMIN_TOKEN}, X_Forwarded_Proto="https")
    assert "Secure" not in forged.headers["Set-Cookie"]  # of a trusted proxy only: tests/test_audit.py
    assert (await pages.fetch("/", Cookie=page.cookie)).status == 200


@guarded
async def test_a_cookie_that_was_changed_is_refused(pages: Browser) -> None:
    """Its signature doesn't fit."""
    cookie = await pages.sign_in(VIEWER_TOKEN)
    last = "0" if cookie[-1] != "0" else "1"
    for changed in (
        cookie[:-1] + last, cookie.replace("=", "=x", 1), "keypool_session=", "keypool_session=a.b",
    ):  # fmt: skip
        assert (await pages.fetch("/", Cookie=changed)).status == 303


@guarded
async def test_a_wrong_token_and_a_clients_token_open_nothing(pages: Browser) -> None:
    """401 and 403 with the form again, which says why; nor does a client token in a header open a page."""
    wrong = await pages.fetch("/login", form={"token": "no-such-token-000"})
    assert wrong.status == 401
    assert "not known" in wrong.text
    assert "Set-Cookie" not in wrong.headers
    client = await pages.fetch("/login", form={"token": CLIENT_TOKEN})
    assert client.status == 403
    assert "client token" in client.text
    problem = await pages.fetch("/login", form={"token": "no-such"}, Accept="*/*")
    assert problem.headers["Content-Type"] == "application/problem+json"
    assert (await pages.fetch("/", Authorization=f"Bearer {CLIENT_TOKEN}")).status == 403


@guarded
async def test_guessing_is_throttled_and_locks_nobody_out(pages: Browser) -> None:
    """After a few wrong tokens the next gets 429 with Retry-After; a valid one is accepted at any time."""
    guesses = [await pages.fetch("/login", form={"token": f"guess-number-{i:08}"}) for i in range(6)]
    assert [page.status for page in guesses] == [401] * 5 + [429]
    page = await pages.fetch("/login", form={"token": "guess-number-99"})
    assert page.status == 429
    assert int(page.headers["Retry-After"]) >= 1
    assert f"in {page.headers['Retry-After']} s" in page.text
    assert (await pages.fetch("/login", form={"token": ADMIN_TOKEN})).status == 303
    (await pages.call("GET", "/stats")).expect(200)


@guarded
async def test_a_viewer_is_offered_nothing_that_it_may_not_do(pages: Browser) -> None:
    """Such controls are absent, not disabled."""
    [key] = await pages.make()
    await pages.acquire()
    cookie = await pages.sign_in(VIEWER_TOKEN)
    for path in ("/", "/keys", f"/keys/{key['id']}"):
        text = (await pages.fetch(path, Cookie=cookie)).text
        body = re.sub(r"<dialog.*?</dialog>", "", text, flags=re.DOTALL)
        assert not re.search(r"data-act=|data-generate|data-bulk|data-reveal|type=\"checkbox\"", body), path
    text = (await pages.fetch("/keys", Cookie=await pages.sign_in(ADMIN_TOKEN))).text
    assert 'data-act="delete"' in text
    assert "data-generate" in text


# ---------------------------------------------------------------------------------------- actions by cookie


@guarded
async def test_the_cookie_alone_changes_nothing(pages: Browser) -> None:
    """The API accepts it only with the XSRF value from the session's own pages."""
    cookie = await pages.sign_in(ADMIN_TOKEN)
    other = await pages.proof(await pages.sign_in(ADMIN_TOKEN))
    for method in ("POST", "GET"):
        (await pages.call(method, "/keys", token=None, Cookie=cookie)).expect(401, "unauthorized")
    for wrong in ("", "0" * 32, other):
        page = await pages.call("POST", "/keys", token=None, Cookie=cookie, X_Keypool_Xsrf=wrong)
        page.expect(401, "unauthorized")
    right = {"Cookie": cookie, "X_Keypool_Xsrf": await pages.proof(cookie)}
    (await pages.call("POST", "/keys", token=None, **right)).expect(201)
    evil = await pages.call("POST", "/keys", token=None, Origin="https://evil.example", **right)
    evil.expect(403, "cross-site")


@guarded
async def test_no_two_pages_have_the_same_xsrf_value(pages: Browser) -> None:
    """So the length of a compressed page doesn't tell how much of it somebody has guessed; all of them are valid."""
    cookie = await pages.sign_in(ADMIN_TOKEN)
    values = [await pages.proof(cookie) for _ in range(3)]
    assert len({value[i : i + 8] for value in values for i in range(0, 64, 8)}) == 24
    for value in values:
        page = await pages.call("POST", "/keys", token=None, Cookie=cookie, X_Keypool_Xsrf=value)
        page.expect(201)
    for wrong in (values[0][:32] + values[1][32:], values[0][:-1], "0" * 64, values[0][32:]):
        page = await pages.call("POST", "/keys", token=None, Cookie=cookie, X_Keypool_Xsrf=wrong)
        page.expect(401, "unauthorized")


@guarded
async def test_the_role_of_the_session_counts(pages: Browser) -> None:
    """A viewer with cookie and XSRF value still may not generate."""
    cookie = await pages.sign_in(VIEWER_TOKEN)
    sent = {"Cookie": cookie, "X_Keypool_Xsrf": await pages.proof(cookie)}
    (await pages.call("GET", "/keys", token=None, **sent)).expect(200)
    (await pages.call("POST", "/keys", token=None, **sent)).expect(403, "forbidden")


@guarded
async def test_the_audit_log_names_the_token_of_the_session(
    pages: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    """For the sign-in, and for what was done with the session."""
    with caplog.at_level(logging.INFO, "keypool.audit"):
        cookie = await pages.sign_in(ADMIN_TOKEN)
        sent = {"Cookie": cookie, "X_Keypool_Xsrf": await pages.proof(cookie)}
        (await pages.call("POST", "/keys", token=None, **sent)).expect(201)
    [signed] = re.findall(r"sign-in by admin \(token (\w+)\) from 127", caplog.text)
    assert re.findall(r"generate by admin \(token (\w+)\) from 127", caplog.text) == [signed]


@guarded
async def test_a_session_quarantines_and_restores_under_its_tokens_name(
    pages: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    """In the audit log and in the events; not without the XSRF value, and not as a viewer."""
    [key] = await pages.make()
    path = f"/keys/id:{key['id']}/quarantine"
    cookie, viewer = await pages.sign_in(ADMIN_TOKEN), await pages.sign_in(VIEWER_TOKEN)
    (await pages.call("POST", path, {}, token=None, Cookie=cookie)).expect(401, "unauthorized")
    as_viewer = {"Cookie": viewer, "X_Keypool_Xsrf": await pages.proof(viewer)}
    (await pages.call("POST", path, {}, token=None, **as_viewer)).expect(403, "forbidden")
    sent = {"Cookie": cookie, "X_Keypool_Xsrf": await pages.proof(cookie)}
    with caplog.at_level(logging.INFO, "keypool.audit"):
        row = (await pages.call("POST", path, {"reason": "leaked"}, token=None, **sent)).expect(200)
        assert (row["state"], row["reason"]) == ("quarantined", "leaked")
        restored = await pages.call("POST", f"/keys/id:{key['id']}/restore", token=None, **sent)
        assert restored.expect(200)["state"] == "available"
    mark = sha256(ADMIN_TOKEN.encode()).hexdigest()[:8]
    acts = re.findall(rf"(quarantine|restore) by admin \(token {mark}\)", caplog.text)
    assert acts == ["quarantine", "restore"]
    state = (await pages.fetch("/figures?state", Cookie=cookie)).json["state"]
    assert [(event["event"], event["by"], event["actor"]) for event in state["events"][-2:]] == [
        ("quarantined", "operator", mark),
        ("restored", "operator", mark),
    ]


@guarded
async def test_a_form_of_another_site_signs_nobody_in_or_out(pages: Browser) -> None:
    """403, by the Origin or by Sec-Fetch-Site."""
    foreign = [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
    for headers in foreign:
        assert (await pages.fetch("/login", form={"token": VIEWER_TOKEN}, **headers)).status == 403
    cookie = await pages.sign_in(VIEWER_TOKEN)
    assert (await pages.fetch("/logout", form={"xsrf": "wrong"}, Cookie=cookie)).status == 403
    assert (await pages.fetch("/", Cookie=cookie)).status == 200


@guarded
async def test_signing_out_ends_the_session_for_every_copy_of_the_cookie(pages: Browser) -> None:
    """The next page with that cookie redirects to the sign-in."""
    cookie = await pages.sign_in(VIEWER_TOKEN)
    page = await pages.fetch("/logout", form={"xsrf": await pages.proof(cookie)}, Cookie=cookie)
    assert (page.status, page.headers["Location"]) == (303, "/login")
    assert (await pages.fetch("/", Cookie=cookie)).status == 303


# ------------------------------------------------------------------------------------- with a server process


def test_signing_out_closes_an_open_feed(guarded_server: ServerProcess) -> None:
    """The close code is 4401."""
    client = guarded_server.client()
    cookie = client.sign_in(VIEWER_TOKEN)
    headers = {"Cookie": cookie, "Origin": f"http://{guarded_server.host}"}
    proof = re.search(rb'<meta name="xsrf" content="(\w+)"', client.page("/", cookie).body)
    assert proof
    form = b"xsrf=" + proof[1]
    with Viewer(guarded_server, headers=headers) as viewer:
        assert viewer.frame()["type"] == "hello"
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        assert client.post("/logout", body=form, headers=headers).status == 303
        with pytest.raises(Closed) as closed:
            viewer.until("never")
        assert closed.value.code == 4401


def test_a_cookie_opens_the_feed_for_our_own_pages_only(guarded_server: ServerProcess) -> None:
    """Another site's Origin, which browsers send with every websocket, is refused. Programs send no Origin."""
    cookie = guarded_server.client().sign_in(VIEWER_TOKEN)
    with Viewer(guarded_server, headers={"Cookie": cookie, "Sec-Fetch-Site": "cross-site"}) as viewer:
        assert viewer.status == 101
    with Viewer(guarded_server, headers={"Cookie": cookie, "Origin": "https://evil.example"}) as viewer:
        assert viewer.status == 403


@pytest.mark.once
def test_a_session_lives_through_a_restart(start_server: Start) -> None:
    """It lasts as long as its own token is valid, whatever happens to other tokens."""
    admin, another = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}, {"KEYPOOL_ADMIN_TOKEN": "another-admin-token-1"}
    cookie = start_server(env=admin).client().sign_in(ADMIN_TOKEN)
    for env, status in ((admin, 200), (admin | {"KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN}, 200), (another, 303)):
        assert start_server(env=env).client().page("/", cookie).status == status
