"""Pools in the browser: the switch, the list, and importing keys."""

from __future__ import annotations

from pathlib import Path

from support import API, Client, ServerProcess, eventually

from browser.conftest import Page, Tabs

SECRETS = [f"sk-live-{number:016}" for number in range(4)]
FOREVER = {"keepalive_seconds": None}


def make(client: Client, name: str = "openai", **settings: object) -> None:
    """Make a pool whose keys never expire."""
    client.put(f"{API}/pools/{name}", json=FOREVER | settings)


def open_import(page: Page) -> None:
    """Open the dialog."""
    page.locator("[data-import]:visible").first.click()
    page.wait_for_selector("#import[open]")


def summary(page: Page, wanted: str) -> None:
    """Wait until the import has this result."""
    page.wait_for_function(
        "wanted => document.getElementById('import-summary').textContent === wanted", arg=wanted
    )


def test_keys_are_imported_by_pasting_them(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """Results by line; no secret is left in the page, and the pool's own table shows the new keys."""
    make(client)
    page = tabs.live(server, "/pools/openai/keys")
    open_import(page)
    lines = [
        "secret,name,seats,label:region,data:user",
        *(f"{each},acct-{n},1,eu,u{n}" for n, each in enumerate(SECRETS)),
    ]
    lines += ["", f"{SECRETS[0]},,,,", f"{SECRETS[1]}x,acct-0,,,", "too,few", f"{SECRETS[1]}y,,five,,"]
    page.locator("#import textarea").fill("\n".join(lines))
    page.locator("#import-go").click()
    summary(page, "4 created, 1 duplicate, 3 failed")
    failed = page.locator("#import-failed").inner_text()
    assert "Line 8: name-taken" in failed
    assert "Line 9: has 2 fields; the header has 5" in failed
    assert "Line 10: has seats that are not a whole number" in failed
    held = page.evaluate(
        "document.documentElement.innerHTML + document.querySelector('#import textarea').value"
    )
    assert not [secret for secret in SECRETS if secret in held]
    page.locator("#import-cancel").click()
    page.wait_for_function("() => document.querySelectorAll('.key-row').length === 4")
    assert page.locator(".key-row .name").all_inner_texts() == [f"acct-{n}" for n in range(4)]
    lease = client.post(f"{API}/pools/openai/keys/acquire").expect(200)
    assert lease["data"] == {"user": "u" + lease["name"].removeprefix("acct-")}


def test_a_file_of_secrets_is_imported(
    server: ServerProcess, client: Client, tabs: Tabs, tmp_path: Path
) -> None:
    """One secret a line; what the pool has already is left as it is."""
    make(client)
    file = tmp_path / "keys.txt"
    file.write_text("\n".join(SECRETS))
    page = tabs.live(server, "/pools/openai/keys")
    open_import(page)
    page.locator("#import [name=file]").set_input_files(file)
    page.locator("#import-go").click()
    summary(page, "4 created")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelectorAll('.key-row').length === 4")
    open_import(page)
    page.locator("#import textarea").fill(SECRETS[2])
    page.locator("#import-go").click()
    summary(page, "1 existed")


def test_a_pool_that_purges_says_so_before_an_import(server: ServerProcess, tabs: Tabs) -> None:
    """And takes keys only if that is what somebody wants."""
    page = tabs.live(server, "/keys")
    open_import(page)
    assert "purges keys" in page.locator("#import").inner_text()
    tabs.allow("409")
    page.locator("#import textarea").fill(SECRETS[0])
    page.locator("#import-go").click()
    summary(page, "1 failed")
    assert "keepalive_seconds" in page.locator("#import-failed").inner_text()
    page.locator("#import-cancel").click()
    open_import(page)
    page.get_by_label("Import them nevertheless").check()
    page.locator("#import textarea").fill(SECRETS[0])
    page.locator("#import-go").click()
    summary(page, "1 created")


def test_the_switch_leads_to_the_same_page_of_another_pool(
    server: ServerProcess, client: Client, tabs: Tabs
) -> None:
    """And back to `default`, whose paths have no name in them."""
    make(client)
    page = tabs.live(server, "/keys")
    page.locator("#pool-switch").select_option("openai")
    page.wait_for_url("**/pools/openai/keys")
    assert page.title() == "Keys · openai · keypool"
    page.locator("#pool-switch").select_option("default")
    page.wait_for_url(f"http://{server.host}/keys")


def test_a_pool_is_made_and_deleted(server: ServerProcess, client: Client, tabs: Tabs) -> None:
    """A pool with keys only after its name was typed: then it is emptied, and gone."""
    page = tabs.live(server, "/pools")
    page.locator("#make-pool").click()
    page.locator("#new-pool [name=name]").fill("fresh")
    page.locator("#new-pool [value=go]").click()
    row = page.locator(".pool-row[data-pool=fresh]")
    row.wait_for()
    assert "never expire" in row.inner_text()
    client.post(f"{API}/pools/fresh/keys", json={"secret": SECRETS[0]}).expect(201)
    page.wait_for_function(
        "() => document.querySelector('[data-pool=fresh] [data-f=total]').textContent === '1'"
    )
    row.locator("[data-delete-pool]").click()
    assert page.locator("#confirm-go").is_disabled()
    page.locator("#confirm-typed input").fill("fresh")
    page.locator("#confirm-go").click()
    row.wait_for(state="detached")
    eventually(lambda: client.get(f"{API}/pools/fresh").status == 404, "the pool is gone")
    client.get(f"{API}/pools/fresh").expect_problem(404, "unknown-pool")
