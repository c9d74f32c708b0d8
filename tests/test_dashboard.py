"""The dashboard's pages as they leave the server, without a browser: what they hold, and who gets them."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from urllib.parse import urlencode

import pytest
from conftest import Start
from support import (
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
)
from viewing import Closed, Viewer

PAGES = (
    "/",
    "/keys",
    "/keys?tab=blocked",
    "/keys?tab=available",
    "/keys?tab=expiring",
    "/events",
    "/system",
    "/calls",
)
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@dataclass
class Page:
    """One answer."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def cookie(self) -> str:
        """What Set-Cookie asks the browser to keep, without its attributes."""
        return (self.headers["Set-Cookie"] or "").split(";")[0]


def fetch(
    server: ServerProcess,
    path: str,
    method: str = "GET",
    form: Mapping[str, str] | None = None,
    **headers: str,
) -> Page:
    """One request as a browser sends it; underscores in a header's name stand for dashes."""
    sent = BROWSER | {name.replace("_", "-"): value for name, value in headers.items()}
    body = None
    if form is not None:
        method, body = "POST", urlencode(form)
        sent["Content-Type"] = "application/x-www-form-urlencoded"
    connection = http.client.HTTPConnection(server.address, server.port, timeout=20)
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return Page(response.status, response.headers, response.read().decode())
    finally:
        connection.close()


def sign_in(server: ServerProcess, token: str) -> str:
    """The cookie of a new session."""
    page = fetch(server, "/login", form={"token": token, "next": "/"}, Origin=f"http://{server.host}")
    assert page.status == 303, page.text
    return page.cookie


def proof(server: ServerProcess, cookie: str) -> str:
    """What the session's pages prove themselves with."""
    found = re.search(r'<meta name="xsrf" content="(\w+)"', fetch(server, "/", Cookie=cookie).text)
    assert found
    return found[1]


# ---------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("path", PAGES)
def test_every_page_comes_whole_and_guarded(server: ServerProcess, client: Client, path: str) -> None:
    """With a strict policy, nothing inline, and nothing for a cache to keep."""
    client.make_many(3)
    client.acquire(owner="<b>worker</b>")
    page = fetch(server, path)
    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=UTF-8"
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["X-Frame-Options"] == "DENY"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert re.search(r"<title>.+ · keypool</title>", page.text)
    assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son\w+=|javascript:", page.text)
    assert "<b>worker" not in page.text


def test_no_page_shows_a_key(server: ServerProcess, client: Client) -> None:
    """Hints do; a script gets a key by reveal alone."""
    keys = client.make_many(30)
    client.acquire(owner="worker-7")
    pages = [fetch(server, path).text for path in (*PAGES, f"/keys/{keys[0]['id']}", "/figures?state")]
    for key in keys:
        assert not any(key["key"] in text or key["key"][:6] in text for text in pages)
    hint = f"{keys[0]['key'][:4]}…{keys[0]['key'][-4:]}"
    assert hint in pages[1]


def test_the_overview_is_right_before_any_script_runs(server: ServerProcess, client: Client) -> None:
    """Numbers, what is released next, and the latest events are in its HTML."""
    client.make_many(5)
    lease = client.acquire(owner="worker-7")
    text = fetch(server, "/").text
    figures = re.findall(r'class="figure">([\d,]+)<', text)
    assert figures[:3] == ["4", "1", "0"]
    assert "worker-7" in text
    assert f"lease {lease['lease']}" in text
    assert 'id="empty" hidden' in text or re.search(r'id="empty"\s+hidden', text)


def test_an_empty_pool_says_what_to_do(server: ServerProcess) -> None:
    """Generate, here or from a shell."""
    for path in ("/", "/keys"):
        text = unescape(fetch(server, path).text)
        assert "The pool is empty" in text
        assert '"op":"generate"' in text
        assert not re.search(r'id="empty"[^>]*hidden', text)


def test_an_exhausted_pool_says_so(server: ServerProcess, client: Client) -> None:
    """And when it ends."""
    client.make()
    client.acquire()
    text = fetch(server, "/").text
    assert not re.search(r'id="exhausted"[^>]*hidden', text)
    assert re.search(r'id="next-release"[^>]*>(1:00|0:59)<', text)


def test_pages_of_fifty_by_cursor(server: ServerProcess, client: Client) -> None:
    """Every key stands on one of them, once."""
    made = {key["id"] for key in client.make_many(120)}
    seen: list[int] = []
    path = "/keys"
    for _ in range(3):
        text = fetch(server, path).text
        seen += [int(number) for number in re.findall(r'class="key-row" data-id="(\d+)"', text)]
        following = re.search(r'rel="next" href="([^"]+)"', text)
        if following is None:
            break
        path = unescape(following[1])
    assert len(seen) == 120
    assert set(seen) == made


def test_search_by_prefix_and_by_id(server: ServerProcess, client: Client) -> None:
    """A prefix lists; an id goes to the key."""
    key = client.make_many(10)[3]
    text = fetch(server, "/keys?" + urlencode({"q": key["key"][:4]})).text
    assert re.findall(r'class="key-row" data-id="(\d+)"', text) == [str(key["id"])]
    page = fetch(server, f"/keys?q=id:{key['id']}")
    assert (page.status, page.headers["Location"]) == (303, f"/keys/{key['id']}")
    none = fetch(server, "/keys?q=zz").text
    assert "key starts with" in none
    assert "Clear the search" in none


@pytest.mark.parametrize("wrong", ["abcde", "a-b", "id:", "id:x"])
def test_a_search_that_makes_no_sense_is_told_what_would(server: ServerProcess, wrong: str) -> None:
    """In the page, which goes on."""
    page = fetch(server, "/keys?" + urlencode({"q": wrong}))
    assert page.status == 400
    assert "1 to 4 characters" in page.text


def test_one_key_on_a_page_of_its_own(server: ServerProcess, client: Client) -> None:
    """State, holder, deadlines, its events, and the calls as lines for a shell."""
    made = client.make()
    client.acquire(owner="worker-7")
    text = unescape(fetch(server, f"/keys/{made['id']}").text)
    assert "worker-7" in text
    assert text.count('class="event"') >= 2
    assert f"/api/v1/keys/id:{made['id']}/unblock" in text
    gone = fetch(server, "/keys/999999")
    assert gone.status == 404
    assert "No key has this id" in gone.text
    assert fetch(server, "/keys/nonsense").status == 404


def test_system_shows_settings_and_where_they_came_from(lend: Start) -> None:
    """A flag, a variable and a default; tokens never."""
    env = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN, "KEYPOOL_MAX_WAITERS": "77"}
    server = lend("--block-seconds=31", env=env, admin_token=ADMIN_TOKEN)
    text = fetch(server, "/system", Authorization=f"Bearer {ADMIN_TOKEN}").text
    rows = {
        flag: (value, origin)
        for flag, value, origin in re.findall(
            r"<code>([^<]+)</code></th><td><code>([^<]*)</code></td><td><span[^>]*>(\w+)<", text
        )
    }
    assert rows["--block-seconds"] == ("31", "flag")
    assert rows["--max-waiters"] == ("77", "environment")
    assert rows["--max-viewers"] == ("200", "default")
    assert rows["KEYPOOL_ADMIN_TOKEN"][0].startswith("1 set")
    assert rows["KEYPOOL_VIEWER_TOKEN"] == ("none", "default")
    assert ADMIN_TOKEN not in text


def test_the_calls_are_those_of_the_api(server: ServerProcess) -> None:
    """Each with its line for a shell."""
    text = unescape(fetch(server, "/calls").text)
    for path in (
        "/keys/acquire",
        "/keys/{key}/unblock",
        "/keys/{key}/keepalive",
        "/batch",
        "/stats",
        "/keys/{key}/reveal",
    ):
        assert f"<code>/api/v1{path}</code>" in text
    assert text.count("curl -sS") >= 10


def test_a_browser_gets_a_page_for_an_error(server: ServerProcess) -> None:
    """Outside /api/; everybody else a problem."""
    page = fetch(server, "/nothing-here")
    assert page.status == 404
    assert page.headers["Content-Type"].startswith("text/html")
    assert "Not found" in page.text
    assert fetch(server, "/nothing-here", Accept="*/*").headers["Content-Type"] == "application/problem+json"
    assert fetch(server, API + "/nothing").headers["Content-Type"] == "application/problem+json"


def test_static_files_may_be_kept_for_ever(server: ServerProcess) -> None:
    """Their address changes with what is in them; another address has nothing."""
    paths = re.findall(r'(?:href|src)="(/static/[^"]+)"', fetch(server, "/").text)
    assert len(paths) >= 5
    for path in paths:
        page = fetch(server, path)
        assert page.status == 200, path
        assert "immutable" in page.headers["Cache-Control"]
    version = paths[0].split("/")[2]
    assert fetch(server, paths[0].replace(version, "0" * 12)).status == 404
    assert fetch(server, f"/static/{version}/../app.py").status == 404
    assert fetch(server, f"/static/{version}/%2e%2e/server.py").status == 404


def test_every_module_that_a_module_imports_is_there(server: ServerProcess) -> None:
    """A path that is wrong would only be seen by who opens that page."""
    entry = re.search(r'src="(/static/\w+/js/)main.js"', fetch(server, "/").text)
    assert entry
    seen, todo = (
        set[str](),
        ["main.js", "login.js", *(f"pages/{page}.js" for page in ("overview", "keys", "events", "system"))],
    )
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        page = fetch(server, entry[1] + name)
        assert page.status == 200, name
        folder = name.rpartition("/")[0]
        for found in re.findall(r'^import .*?"(\.[^"]+)";$', page.text, re.MULTILINE):
            todo.append(found.removeprefix("./") if not found.startswith("..") else found.removeprefix("../"))
            assert folder in ("", "pages")


def test_a_chosen_theme_is_drawn_by_the_server(server: ServerProcess) -> None:
    """So that no page flashes; anything else in the cookie is none."""
    assert '<html lang="en" data-theme="dark">' in fetch(server, "/", Cookie="keypool_theme=dark").text
    assert '<html lang="en">' in fetch(server, "/", Cookie='keypool_theme="><script>').text


# -------------------------------------------------------------------------------------------- who gets them


def test_strangers_are_sent_to_the_sign_in_and_back(guarded_server: ServerProcess) -> None:
    """A page by a redirect, a script's call by 401."""
    page = fetch(guarded_server, "/keys?tab=blocked")
    assert (page.status, page.headers["Location"]) == (303, "/login?next=%2Fkeys%3Ftab%3Dblocked")
    form = fetch(guarded_server, page.headers["Location"])
    assert '<input type="hidden" name="next" value="/keys?tab=blocked">' in form.text
    done = fetch(guarded_server, "/login", form={"token": VIEWER_TOKEN, "next": "/keys?tab=blocked"})
    assert (done.status, done.headers["Location"]) == (303, "/keys?tab=blocked")
    assert fetch(guarded_server, "/figures", Accept="application/json").status == 401


@pytest.mark.parametrize(
    "wanted", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:1", "/login"]
)
def test_nobody_is_sent_elsewhere(guarded_server: ServerProcess, wanted: str) -> None:
    """`next` is a path of this server, or it is the overview."""
    done = fetch(guarded_server, "/login", form={"token": VIEWER_TOKEN, "next": wanted})
    assert (done.status, done.headers["Location"]) == (303, "/")


def test_the_cookie_is_kept_from_scripts_and_other_sites(guarded_server: ServerProcess) -> None:
    """And holds no token."""
    page = fetch(guarded_server, "/login", form={"token": ADMIN_TOKEN})
    given = page.headers["Set-Cookie"]
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given
    assert "Path=/" in given
    assert ADMIN_TOKEN not in given
    assert "Secure" not in given
    forged = fetch(guarded_server, "/login", form={"token": ADMIN_TOKEN}, X_Forwarded_Proto="https")
    assert "Secure" not in forged.headers["Set-Cookie"]  # of a trusted proxy only: tests/test_audit.py
    assert fetch(guarded_server, "/", Cookie=page.cookie).status == 200


def test_a_cookie_that_was_changed_is_worth_nothing(guarded_server: ServerProcess) -> None:
    """Its signature tells."""
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    for changed in (
        cookie[:-1] + ("0" if cookie[-1] != "0" else "1"),
        cookie.replace("=", "=x", 1),
        "keypool_session=",
        "keypool_session=a.b",
    ):
        assert fetch(guarded_server, "/", Cookie=changed).status == 303


def test_a_wrong_token_and_a_clients_token_open_nothing(lend: Start) -> None:
    """401 and 403 on the form again, which says why."""
    server = lend(
        env={
            "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
            "KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN,
            "KEYPOOL_KEY": "wrong",
        },
        admin_token=ADMIN_TOKEN,
    )
    wrong = fetch(server, "/login", form={"token": "no-such-token-000"})
    assert wrong.status == 401
    assert "not known" in wrong.text
    assert wrong.headers["Set-Cookie"] is None
    client = fetch(server, "/login", form={"token": CLIENT_TOKEN})
    assert client.status == 403
    assert "client token" in client.text
    assert (
        fetch(server, "/login", form={"token": "no-such"}, Accept="*/*").headers["Content-Type"]
        == "application/problem+json"
    )


def test_guessing_is_throttled_and_locks_nobody_out(start_server: Start) -> None:
    """After a few wrong tokens the next wrong one gets 429, with when; a right one gets in at any time."""
    server = start_server(env={"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}, admin_token=ADMIN_TOKEN)
    statuses = [fetch(server, "/login", form={"token": f"guess-number-{i:08}"}).status for i in range(6)]
    assert statuses == [401] * 5 + [429]
    page = fetch(server, "/login", form={"token": "guess-number-99"})
    assert page.status == 429
    assert int(page.headers["Retry-After"]) >= 1
    assert f"in {page.headers['Retry-After']} s" in page.text
    assert fetch(server, "/login", form={"token": ADMIN_TOKEN}).status == 303
    assert server.client(ADMIN_TOKEN).get(API + "/stats").status == 200


def test_a_viewer_is_offered_nothing_that_it_may_not_do(guarded_server: ServerProcess) -> None:
    """Absent, not greyed."""
    key = guarded_server.client(ADMIN_TOKEN).make()
    guarded_server.client(ADMIN_TOKEN).acquire()
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    for path in ("/", "/keys", f"/keys/{key['id']}"):
        text = fetch(guarded_server, path, Cookie=cookie).text
        body = re.sub(r"<dialog.*?</dialog>", "", text, flags=re.DOTALL)
        assert not re.search(r"data-act=|data-generate|data-bulk|data-reveal|type=\"checkbox\"", body), path
    text = fetch(guarded_server, "/keys", Cookie=sign_in(guarded_server, ADMIN_TOKEN)).text
    assert 'data-act="delete"' in text
    assert "data-generate" in text


def test_a_client_token_reads_no_page(guarded_server: ServerProcess) -> None:
    """403."""
    assert fetch(guarded_server, "/", Authorization=f"Bearer {CLIENT_TOKEN}").status == 403


# ---------------------------------------------------------------------------------------- actions by cookie


def test_the_cookie_alone_moves_nothing(guarded_server: ServerProcess) -> None:
    """The API takes it only with the proof that stands in the session's own pages."""
    cookie = sign_in(guarded_server, ADMIN_TOKEN)
    client = guarded_server.client()
    client.post(API + "/keys", headers={"Cookie": cookie}).expect_problem(401, "unauthorized")
    client.get(API + "/keys", headers={"Cookie": cookie}).expect_problem(401, "unauthorized")
    for wrong in ("", "0" * 32, proof(guarded_server, sign_in(guarded_server, ADMIN_TOKEN))):
        sent = {"Cookie": cookie, "X-Keypool-Xsrf": wrong}
        client.post(API + "/keys", headers=sent).expect_problem(401, "unauthorized")
    right = {"Cookie": cookie, "X-Keypool-Xsrf": proof(guarded_server, cookie)}
    client.post(API + "/keys", headers=right).expect(201)
    evil = right | {"Origin": "https://evil.example"}
    client.post(API + "/keys", headers=evil).expect_problem(403, "cross-site")


def test_the_role_of_the_session_counts(guarded_server: ServerProcess) -> None:
    """A viewer with all proofs still generates nothing."""
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    sent = {"Cookie": cookie, "X-Keypool-Xsrf": proof(guarded_server, cookie)}
    client = guarded_server.client()
    client.get(API + "/keys", headers=sent).expect(200)
    client.post(API + "/keys", headers=sent).expect_problem(403, "forbidden")


def test_the_audit_log_names_whose_session_it_was(guarded_server: ServerProcess) -> None:
    """Signing in, and what was done with the session."""
    cookie = sign_in(guarded_server, ADMIN_TOKEN)
    sent = {"Cookie": cookie, "X-Keypool-Xsrf": proof(guarded_server, cookie)}
    guarded_server.client().post(API + "/keys", headers=sent).expect(201)
    log = guarded_server.log
    signed = re.findall(r"sign-in by admin \(token (\w+)\) from 127", log)
    made = re.findall(r"generate by admin \(token (\w+)\) from 127", log)
    assert signed
    assert signed[-1] == made[-1]


def test_a_form_of_another_site_signs_nobody_in_or_out(guarded_server: ServerProcess) -> None:
    """403, by the Origin or by what the browser says of where it comes from."""
    evil = {"Origin": "https://evil.example"}
    assert fetch(guarded_server, "/login", form={"token": VIEWER_TOKEN}, **evil).status == 403
    assert fetch(guarded_server, "/login", form={"token": VIEWER_TOKEN}, Origin="null").status == 403
    assert (
        fetch(guarded_server, "/login", form={"token": VIEWER_TOKEN}, Sec_Fetch_Site="cross-site").status
        == 403
    )
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    assert fetch(guarded_server, "/logout", form={"xsrf": "wrong"}, Cookie=cookie).status == 403
    assert fetch(guarded_server, "/", Cookie=cookie).status == 200


def test_signing_out_ends_the_session_everywhere(guarded_server: ServerProcess) -> None:
    """The cookie is worth nothing then, even to who has copied it, and an open feed is closed."""
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    origin = f"http://{guarded_server.host}"
    with Viewer(guarded_server, headers={"Cookie": cookie, "Origin": origin}) as viewer:
        assert viewer.frame()["type"] == "hello"
        page = fetch(guarded_server, "/logout", form={"xsrf": proof(guarded_server, cookie)}, Cookie=cookie)
        assert (page.status, page.headers["Location"]) == (303, "/login")
        with pytest.raises(Closed) as closed:
            viewer.until("never")
        assert closed.value.code == 4401
    assert fetch(guarded_server, "/", Cookie=cookie).status == 303


def test_a_cookie_opens_the_feed_for_our_own_pages_only(guarded_server: ServerProcess) -> None:
    """With another's Origin, which browsers send with every websocket, it doesn't. A program sends none."""
    cookie = sign_in(guarded_server, VIEWER_TOKEN)
    with Viewer(guarded_server, headers={"Cookie": cookie, "Sec-Fetch-Site": "cross-site"}) as viewer:
        assert viewer.status == 101
    with Viewer(guarded_server, headers={"Cookie": cookie, "Origin": "https://evil.example"}) as viewer:
        assert viewer.status == 403


def test_a_session_lives_through_a_restart(start_server: Start) -> None:
    """As long as its own token holds, whatever others do: an operator's page is left open all day."""
    env = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    cookie = sign_in(start_server(env=env, admin_token=ADMIN_TOKEN), ADMIN_TOKEN)
    again = start_server(env=env, admin_token=ADMIN_TOKEN)
    assert fetch(again, "/", Cookie=cookie).status == 200
    more = start_server(env=env | {"KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN}, admin_token=ADMIN_TOKEN)
    assert fetch(more, "/", Cookie=cookie).status == 200
    other = start_server(
        env={"KEYPOOL_ADMIN_TOKEN": "another-admin-token-1"}, admin_token="another-admin-token-1"
    )
    assert fetch(other, "/", Cookie=cookie).status == 303
