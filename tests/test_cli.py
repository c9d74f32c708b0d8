"""The `keypool` command: tables, lines and JSON; exit statuses; pipes, terminals and signals.

Most tests call `main` in this process (cli_support). A process is started where signals, pipes, a terminal or
the time of the start are the point.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import run_command
from client_support import Proxy, clean, environment, keypool, ports_in_a_row, started, url_of
from conftest import Start
from support import ADMIN_TOKEN, CLIENT_TOKEN, ROOT, ServerProcess, eventually

from keypool.cli import keys
from keypool.cli.status import Status
from keypool.client import KeyPool


@pytest.fixture
def pool(server: ServerProcess) -> Iterator[KeyPool]:
    with KeyPool(url_of(server)) as made:
        yield made
    clean(server)


# --------------------------------------------------------------------------------------------------- each command


def test_every_command_in_a_pipe(server: ServerProcess, pool: KeyPool) -> None:
    made = run_command(server, "generate", "2")
    assert (made.status, made.err) == (0, "")
    [[key, number, _], _] = made.lines
    assert pool.get(key).id == int(number)

    [[leased, lease, *_]] = run_command(server, "acquire", "--owner", "me").lines
    [row] = list(pool.rows(state="blocked"))
    assert (row.owner, str(row.lease), row.id) == ("me", lease, pool.get(leased).id)

    listed = run_command(server, "list").lines
    assert [int(columns[0]) for columns in listed] == sorted(row.id for row in pool.rows())
    assert len(run_command(server, "list", "--limit", "1").lines) == 1
    assert len(run_command(server, "list", "--state", "blocked").lines) == 1

    shown = run_command(server, "show", f"id:{row.id}").fields
    assert (shown["state"], shown["owner"]) == ("blocked", "me")
    assert "key" not in shown
    assert run_command(server, "show", "-k", f"id:{row.id}").fields["key"] == leased
    assert run_command(server, "show", "-", stdin=leased).fields["id"] == str(row.id)

    stale = run_command(server, "unblock", leased, "--lease", "999999")
    assert stale.status == Status.LEASE_OVER
    assert "stale-lease" in stale.err
    assert run_command(server, "unblock", leased, "--lease", lease).fields["changed"] == "True"
    assert run_command(server, "keepalive", key).status == 0
    assert run_command(server, "stats").fields["total"] == "2"
    gone = run_command(server, "delete", *(f"id:{columns[0]}" for columns in listed))
    assert gone.fields["done"] == "2"
    assert pool.stats().total == 0


def test_json(server: ServerProcess, pool: KeyPool) -> None:
    for words in (["--json", "generate", "3"], ["generate", "3", "--json"]):
        made = [json.loads(line) for line in run_command(server, *words).out.splitlines()]
        assert [set(row) for row in made] == [{"id", "key", "state", "expires_in"}] * 3
    served = json.loads(run_command(server, "acquire", "--json").out)
    assert pool.get(served["key"]).lease == served["lease"]
    assert len(run_command(server, "list", "--json").lines) == 6
    assert json.loads(run_command(server, "show", "--json", served["key"]).out)["state"] == "blocked"
    assert json.loads(run_command(server, "stats", "--json").out)["total"] == 6
    assert json.loads(run_command(server, "unblock", "--json", served["key"]).out)["changed"] is True
    assert json.loads(run_command(server, "keepalive", "--json", served["key"]).out)["expires_in"] == 300.0
    assert json.loads(run_command(server, "delete", "--json", served["key"]).out)["done"] == 1


def test_keys_by_standard_input(server: ServerProcess, pool: KeyPool) -> None:
    """Keys need not be arguments, which other users can see."""
    made = run_command(server, "generate", "1200").out
    assert run_command(server, "keepalive", "-", stdin=made).out == "done\t1200\nunknown\t0\nstale\t0\n"
    served = run_command(server, "acquire", "1200").out
    assert pool.stats().blocked == 1200
    assert run_command(server, "unblock", "-", stdin=served).status == 0
    assert pool.stats().blocked == 0
    # The second column of what generate prints is an id, not a lease number.
    assert run_command(server, "unblock", "-", stdin=made).fields["stale"] == "0"
    masked = "\n".join(hint for _, hint, *_ in run_command(server, "list").lines)
    assert run_command(server, "delete", "-", stdin=masked).status == Status.USAGE
    assert run_command(server, "delete", "-", stdin=made + "nobody\n").status == Status.UNKNOWN_KEY
    assert pool.stats().total == 0
    assert run_command(server, "delete", "-", stdin="").status == Status.USAGE


@pytest.mark.parametrize("command", ["unblock", "keepalive", "delete", "show", "quarantine", "restore"])
def test_a_masked_key_is_recognised(command: str) -> None:
    refused = run_command(None, command, "SPyr…mEqp")
    assert refused.status == Status.USAGE
    assert "masked" in refused.err
    assert "--show-keys" in refused.err


def test_a_client_gives_back_what_it_acquired(guarded_server: ServerProcess) -> None:
    with KeyPool(url_of(guarded_server), ADMIN_TOKEN) as pool:
        pool.generate()
        served = run_command(guarded_server, "acquire", KEYPOOL_TOKEN=CLIENT_TOKEN).out
        back = run_command(guarded_server, "unblock", "-", stdin=served, KEYPOOL_TOKEN=CLIENT_TOKEN)
        assert back.fields["done"] == "1"
        assert pool.stats().blocked == 0
    clean(guarded_server, ADMIN_TOKEN)


# ----------------------------------------------------------------------------------- reports, quarantine, extensions


def test_an_outcome_for_each_way_to_name_a_lease(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    words = ("--outcome", "rate_limited", "--retry-after", "1234", "--reason", "HTTP 429")
    for named in ("handle", "lease", "line"):
        acquired = run_command(server, "acquire")
        [[key, lease, _, _, _, handle]] = acquired.lines
        names = {"handle": [handle], "lease": [key, "--lease", lease], "line": ["-"]}[named]
        reported = run_command(server, "unblock", *names, *words, stdin=acquired.out)
        assert reported.status == 0
        row = pool.get(made)
        assert (row.state, row.outcome, row.reason) == ("cooling", "rate_limited", "HTTP 429"), named
        assert 1200 < (row.available_in or 0) <= 1234
        if named != "line":
            assert (reported.fields["state"], reported.fields["changed"]) == ("cooling", "True")
        pool.restore(made)


def test_a_retry_after_may_be_a_date(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    words = ("--outcome", "rate_limited", "--retry-after", "Wed, 21 Oct 2099 07:28:00 GMT", "--json")
    [[_, _, _, _, _, handle]] = run_command(server, "acquire").lines
    reported = json.loads(run_command(server, "unblock", handle, *words).out)
    assert reported["available_in"] == 604_800, "the most that the pool allows"
    assert set(reported) == {"id", "state", "changed", "available_in", "guarded"}
    assert pool.get(made).state == "cooling"


def test_a_report_comes_once_and_from_the_latest_holder(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate()
    first = run_command(server, "acquire").lines[0][5]
    assert run_command(server, "unblock", first, "--outcome", "error").fields["changed"] == "True"
    assert run_command(server, "unblock", first, "--outcome", "error").fields["changed"] == "False"
    second = run_command(server, "acquire").lines[0][5]
    stale = run_command(server, "unblock", first, "--outcome", "error")
    assert stale.status == Status.LEASE_OVER
    both = run_command(server, "unblock", first, second, "--outcome", "ok")
    assert (both.status, both.fields["done"], both.fields["stale"]) == (Status.LEASE_OVER, "1", "1")
    assert f"stale: {first}" in both.err, "a handle is not masked"


def test_quarantine_and_restore(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate_many(3)
    ids = [f"id:{key.id}" for key in made]
    held = pool.acquire()
    row = run_command(server, "quarantine", f"id:{held.id}", "--reason", "abuse").fields
    assert (row["state"], row["reason"]) == ("blocked", ""), "it goes when its lease ends"
    row = run_command(server, "quarantine", f"id:{held.id}", "--now").fields
    assert (row["state"], row["reason"]) == ("quarantined", "abuse")
    assert run_command(server, "quarantine", *ids, "id:999999999").fields["done"] == "3"
    none = run_command(server, "acquire")
    assert none.status == Status.NO_KEY
    assert "3 quarantined" in none.err
    assert len(run_command(server, "list", "--state", "quarantined").lines) == 3
    one = json.loads(run_command(server, "restore", ids[0], "--json").out)
    assert (one["state"], one["reason"], one["failures"]) == ("available", None, 0)
    texts = "\n".join(key.secret for key in made)
    assert run_command(server, "restore", "-", stdin=texts).fields["done"] == "3"
    assert pool.stats().available == 3


def test_a_client_may_not_quarantine(guarded_server: ServerProcess) -> None:
    for command in ("quarantine", "restore"):
        assert (
            run_command(guarded_server, command, "id:1", KEYPOOL_TOKEN=CLIENT_TOKEN).status == Status.DENIED
        )


def test_extending_leases(start_server: Start) -> None:
    server = start_server("--max-block-seconds=3000")
    with KeyPool(url_of(server)) as pool:
        pool.generate_many(2)
        acquired = run_command(server, "acquire", "2", "--block-seconds", "100")
        assert all(100 >= float(line[3]) > 60 for line in acquired.lines)
        first, second = (line[5] for line in acquired.lines)
        extended = run_command(server, "extend", first, "--seconds", "2000").fields
        assert set(extended) == {"id", "lease", "release_in", "block_left"}
        assert float(extended["release_in"]) > 1900
        many = run_command(server, "extend", "-", "--seconds", "2900", stdin=acquired.out)
        assert (many.status, many.fields["done"]) == (0, "2")
        shorter = run_command(server, "extend", first, "--seconds", "5")
        assert shorter.status == Status.BLOCK_LIMIT
        assert "block-limit" in shorter.err
        pool.unblock(second)
        over = run_command(server, "extend", second)
        assert over.status == Status.LEASE_OVER
        assert "lease-over" in over.err
        mixed = run_command(server, "extend", "--seconds", "5", "--json", first, second)
        counts = json.loads(mixed.out)
        assert counts == {"done": 0, "unknown": 0, "stale": 0, "over": 1, "limit": 1}
        assert mixed.status == Status.LEASE_OVER
        assert run_command(server, "extend", "--seconds", "5", first, first).status == Status.BLOCK_LIMIT


def test_no_lease_of_the_default_pool_is_extended(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate()
    [[*_, handle]] = run_command(server, "acquire").lines
    refused = run_command(server, "extend", handle)
    assert refused.status == Status.BLOCK_LIMIT
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["unblock --outcome ok", "extend"])
def test_the_lease_must_be_named(command: str) -> None:
    for words in (["id:1"], ["h:1.1.aaaaaaaaaaa", "id:1"], ["-"]):
        refused = run_command(None, *command.split(), *words, stdin="SPyrSPyrmEqpmEqp\t1\t300.0\n")
        assert refused.status == Status.USAGE
        assert "--lease" in refused.err


def test_lists_by_state_with_all_columns(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate_many(3)
    held = pool.acquire()
    pool.unblock(held, outcome="rate_limited", retry_after=500, reason="too many\u202erequests")
    [cooling] = run_command(server, "list", "--state", "cooling").lines
    assert cooling[:5] == [str(held.id), held.hint, "cooling", "", ""]
    assert 400 < float(cooling[8]) <= 500
    assert cooling[9:11] == ["1", "rate_limited"]
    assert [line[0] for line in run_command(server, "list", "--order", "ready").lines] == [str(held.id)]
    as_json = json.loads(run_command(server, "list", "--json", "--state", "cooling").out)
    assert set(as_json) == {
        "id", "hint", "state", "owner", "lease", "created_at", "expires_in", "release_in", "available_in",
        "failures", "outcome", "reason", "client", "name", "labels", "pace", "seat", "seats",
        "acquired_at", "served",
    }  # fmt: skip
    heading, *rows = run_command(server, "list", columns=200).out.splitlines()
    assert heading.replace("\x1b[1m", "").split()[:7] == [
        "ID",
        "HINT",
        "STATE",
        "OWNER",
        "LEASE",
        "ENDS",
        "EXPIRES",
    ]
    [row] = [row for row in rows if "cooling" in row]
    assert 400 < float(row.split()[5]) <= 500
    assert "too many\ufffdrequests" in row
    stats = run_command(server, "stats").fields
    assert {name: stats[name] for name in ("available", "cooling", "quarantined")} == {
        "available": str(len(made) - 1), "cooling": "1", "quarantined": "0",
    }  # fmt: skip
    assert {"cooled", "quarantines", "restored"} <= set(stats)


# --------------------------------------------------------------------------------------- usage, statuses, variables


def test_exit_statuses(server: ServerProcess, pool: KeyPool) -> None:
    def status(*words: str) -> int:
        return run_command(server, *words).status

    assert status("acquire") == Status.NO_KEY
    assert status("show", "nobody") == Status.UNKNOWN_KEY
    assert status("delete", "nobody") == Status.UNKNOWN_KEY
    assert status("--help") == 0
    with Proxy(server) as proxy:
        proxy.faults[:] = ["lose"]
        lost = run_command(server, "--url", proxy.url, "generate")
    assert lost.status == Status.UNCERTAIN
    assert "may have taken effect" in lost.err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["acquire", "--wait", "soon"],
        ["acquire", "--wait", "-1"],
        ["acquire", "2", "--wait", "1"],
        ["generate", "0"],
        ["list", "--stat", "blocked"],
        ["--url", "nonsense", "stats"],
        ["--url", "nonsense", "events"],
        ["unblock", "one", "two", "--lease", "1"],
        ["extend", "one", "two", "--lease", "1"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--outcome", "good"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--outcome", "error", "--retry-after", "5"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--outcome", "rate_limited", "--retry-after", "-5"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--outcome", "rate_limited", "--retry-after", "nan"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--outcome", "rate_limited", "--retry-after", "soon"],
        ["unblock", "h:1.1.aaaaaaaaaaa", "--reason", "why"],
        ["extend", "h:1.1.aaaaaaaaaaa", "--seconds", "0"],
        ["acquire", "--block-seconds", "inf"],
        ["list", "--state", "held"],
        ["--url", "http://127.0.0.1:1", "serve", "--port", "8888"],
        ["--json", "serve"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(words: list[str]) -> None:
    refused = run_command(None, *words)
    assert (refused.status, refused.out) == (Status.USAGE, "")
    assert len(refused.err.splitlines()) == 1
    assert refused.err.startswith("keypool: ")


def test_every_status_stands_in_help_and_docs() -> None:
    shown = run_command(None, "--help").out
    shown_for_run = run_command(None, "run", "--help").out
    documented = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    for status in Status:
        assert f"{status.value:>3}  {status.about}" in shown
        assert f"| {status.value} | {status.about} |" in documented
        assert (f"{status.value:>3}  {status.about}" in shown_for_run) == status.about.startswith("run:")


def test_tokens_come_from_the_environment_or_a_file(guarded_server: ServerProcess, tmp_path: Path) -> None:
    server, file = guarded_server, tmp_path / "token"
    file.write_text(ADMIN_TOKEN + "\n")
    assert run_command(server, "generate").status == Status.DENIED
    assert run_command(server, "generate", KEYPOOL_TOKEN=CLIENT_TOKEN).status == Status.DENIED
    assert run_command(server, "generate", KEYPOOL_TOKEN=ADMIN_TOKEN).status == 0
    assert run_command(server, "generate", KEYPOOL_TOKEN_FILE=str(file)).status == 0
    assert run_command(server, "generate", KEYPOOL_TOKEN_FILE="~/token", HOME=str(tmp_path)).status == 0
    by_flag = ["generate", "--token-file", str(file)]
    assert run_command(server, *by_flag, KEYPOOL_TOKEN="wrong-wrong-wrong").status == 0
    for words in (["--token", ADMIN_TOKEN, "stats"], ["stats", f"--token={ADMIN_TOKEN}"]):
        refused = run_command(server, *words)
        assert refused.status == Status.USAGE
        assert "KEYPOOL_TOKEN" in refused.err
        assert ADMIN_TOKEN not in refused.err
    file.write_text("two\nlines\n")
    for words in (["--token-file", str(file), "stats"], ["--token-file", str(tmp_path), "stats"]):
        assert run_command(server, *words).status == Status.USAGE
    clean(server, ADMIN_TOKEN)


def test_the_base_path_may_stand_in_the_url(server: ServerProcess) -> None:
    assert run_command(None, "--url", f"{url_of(server)}/api/v1/", "stats").status == 0


def test_a_misspelled_variable_is_noted(server: ServerProcess) -> None:
    noted = run_command(server, "stats", KEYPOOL_TOKN="x", KEYPOOL_ADMIN_TOKEN_FILE="x", KEYPOOL_KEY="x")
    assert noted.status == 0
    assert [line.split()[1] for line in noted.err.splitlines()] == ["KEYPOOL_TOKN"]
    assert "KEYPOOL_TOKEN?" in noted.err


def test_an_unreachable_server() -> None:
    away = f"http://127.0.0.1:{ports_in_a_row(1)}"
    gone = run_command(None, "--url", away, "--retry", "0", "stats")
    assert gone.status == Status.UNREACHABLE
    assert gone.err == f"keypool: can't reach {away}: Connection refused\n"
    gone = run_command(None, "--url", away, "--retry", "0.2", "stats")
    assert gone.err.splitlines()[0] == "keypool: no answer from the server; retrying for 0.2 s"
    assert len(gone.err.splitlines()) == 2


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client and most commands don't need the server's packages."""
    monkeypatch.delitem(sys.modules, "keypool.cli.events", raising=False)
    monkeypatch.setitem(sys.modules, "tornado.httpclient", None)
    ran = run_command(None, "events")
    assert ran.status == Status.FAILED
    assert ran.err.count("\n") == 1
    assert "keypool-service[server]" in ran.err


# ------------------------------------------------------------------------------------------- masked keys, large N


def test_keys_on_a_terminal_are_masked(server: ServerProcess, pool: KeyPool) -> None:
    made = run_command(server, "generate", columns=80)
    [row] = list(pool.rows())
    assert row.hint in made.out
    assert "--show-keys" in made.err
    [key] = run_command(server, "show", "-k", f"id:{row.id}").fields["key"].split()
    assert key not in made.out + made.err
    refused = run_command(server, "acquire", columns=80)
    assert refused.status == Status.USAGE
    assert "--show-keys" in refused.err
    assert pool.stats().blocked == 0, "a key whose text nobody has seen"
    assert key in run_command(server, "acquire", "-k", columns=80).out


def test_a_large_number_is_confirmed(
    server: ServerProcess, pool: KeyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_CONFIRM_ABOVE", 2)
    assert run_command(server, "generate", "3").status == Status.USAGE
    assert run_command(server, "generate", "3", columns=80, typed="n\n").status == Status.FAILED
    assert pool.stats().total == 0
    assert run_command(server, "generate", "3", "--yes").status == 0
    assert run_command(server, "generate", "3", columns=80, typed="y\n").status == 0
    assert pool.stats().total == 6


def test_an_interrupted_generate_has_printed_all_its_keys(server: ServerProcess, pool: KeyPool) -> None:
    with started(server, ["-m", "keypool", "generate", "500000", "--yes"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed = [first, *process.stdout]
        assert process.wait(30) == Status.INTERRUPTED
        noted = process.stderr.read()
    assert len(printed) == pool.stats().total
    assert all(line.count("\t") == 2 and line.endswith("\n") for line in printed)
    assert f"{len(printed)} of 500000 keys were generated, {len(printed)} of them printed" in noted
    assert "Traceback" not in noted


def test_a_batch_that_fails_half_way_has_printed_what_it_made(start_server: Start) -> None:
    made = run_command(start_server("--max-keys=1500"), "generate", "2000")
    assert made.status == Status.FAILED
    assert "pool-full" in made.err
    assert len(made.lines) == 1000


def test_a_key_that_nobody_could_read_is_given_back(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate()
    reader, writer = os.pipe()
    os.close(reader)
    with started(server, ["-m", "keypool", "acquire"], stdout=writer) as process:
        os.close(writer)
        assert process.wait(30) == Status.BROKEN_PIPE
    assert pool.stats().blocked == 0


def test_waiting_for_longer_than_one_call_may(
    server: ServerProcess, pool: KeyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keypool.client.attempts._LONGEST_WAIT", 0.1)
    for seconds in ("2", "10", "50"):  # the longer ones for a machine that stands still meanwhile
        before = pool.stats().refused
        assert run_command(server, "acquire", "--wait", seconds).status == Status.NO_KEY
        if pool.stats().refused >= before + 3:
            break
    else:
        raise AssertionError("it didn't ask again and again")
    with started(server, ["-m", "keypool", "acquire", "--wait", "forever"]) as process:
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        made = pool.generate()
        assert process.stdout is not None
        assert process.stdout.read().split("\t")[0] == made.secret


# ------------------------------------------------------------------------------------------------- on a terminal


def in_terminal(
    server: ServerProcess | None, *words: str, keys: bytes = b"", until: str = ""
) -> tuple[int, str]:
    """Run the command on a terminal of its own: its exit status and all that was shown, both streams."""
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "keypool", *words]
        os.execve(sys.executable, command, environment(server, COLUMNS="200"))  # noqa: S606 - no shell is wanted
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends it with EIO
        while part := os.read(terminal, 65536):
            shown += part
            if until and until.encode() in shown:
                os.write(terminal, keys)
                until = ""
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_tables_on_a_terminal(server: ServerProcess, pool: KeyPool) -> None:
    made = pool.generate()
    status, shown = in_terminal(server, "list")
    heading, row = shown.strip().splitlines()
    assert status == 0
    assert "ID" in heading
    assert "CREATED AT" in heading
    assert heading.startswith("\x1b[1m")
    assert made.hint in row
    assert "\t" not in row
    assert made.secret not in shown


def test_a_table_fits_the_terminal(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate_many(2)
    served = pool.acquire(owner="an owner whose name is long " * 7)
    pool.unblock(pool.acquire())
    printed = run_command(server, "list", columns=80).out.replace("\x1b[1m", "").replace("\x1b[0m", "")
    heading, *rows = printed.splitlines()
    assert max(map(len, [heading, *rows])) <= 80
    assert "EXPIRES" in heading
    place = re.split(r" {2,}", heading).index("LEASE")
    [held] = [row for row in rows if "blocked" in row]
    [free] = [row for row in rows if "available" in row]
    assert re.split(r" {2,}", held)[place] == str(served.lease)
    assert re.split(r" {2,}", free)[place] == "-", "an old lease"
    assert json.loads(run_command(server, "list", "--json", columns=80).out.splitlines()[0])["id"]


def test_an_owner_cannot_write_on_the_terminal(server: ServerProcess, pool: KeyPool) -> None:
    """Control characters in an owner's name, which clients choose, are not printed."""
    pool.generate()
    pool.acquire(owner="a\u202eb")
    assert "\u202e" not in run_command(server, "list", columns=80).out


def test_a_bar_for_long_batches_only(server: ServerProcess, pool: KeyPool) -> None:
    made = "".join(f"{key.secret}\n" for key in pool.generate_many(2500))
    shown = run_command(server, "keepalive", "-", columns=80, typed=made).err
    assert "keeping alive [" in shown
    assert "2000/2500" in shown
    assert "keeping" not in run_command(server, "keepalive", "-", columns=80, typed=made[:100]).err
    assert "keeping" not in run_command(server, "keepalive", "-", stdin=made).err


def test_watching_stats_until_ctrl_c(server: ServerProcess, pool: KeyPool) -> None:
    status, shown = in_terminal(server, "stats", "--watch", "0.05", keys=b"\x03", until="\x1b[J")
    assert status == 130
    assert shown.count("available") >= 1
    assert "Traceback" not in shown


def test_ctrl_c_is_never_a_traceback() -> None:
    """Not even while modules are imported. Python's own start is left out, since it may print one."""
    code = """
import os, signal, sys
from keypool.cli import main as entry
sys.argv[1:] = ["stats"]
entry._run = lambda *_: os.kill(os.getpid(), signal.SIGINT)
entry.main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False)
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, b"")


# ----------------------------------------------------------------------------------------------------------- pipes


def test_a_reader_that_goes_away_ends_it_quietly(server: ServerProcess, pool: KeyPool) -> None:
    pool.generate_many(3000)
    with started(server, ["-m", "keypool", "list"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == Status.BROKEN_PIPE
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(("redirection", "status"), [(">/dev/full", 1), (">&-", 0), ("<&-", 0)])
def test_streams_that_are_full_or_closed(
    server: ServerProcess, pool: KeyPool, redirection: str, status: int
) -> None:
    pool.generate()
    line = f'"{sys.executable}" -m keypool acquire {redirection}'
    ran = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env=environment(server), check=False
    )
    assert ran.returncode == status
    assert ran.stderr == ("keypool: the output can't be written: No space left on device\n" if status else "")
    assert pool.stats().blocked == (0 if status else 1)


# -------------------------------------------------------------------------------------------------------- keepalive


def test_keepalive_watch_reports_the_dead(start_server: Start) -> None:
    server = start_server("--keepalive-seconds=5")
    with KeyPool(url_of(server)) as pool:
        made = pool.generate_many(2)
        with started(
            server, ["-m", "keypool", "keepalive", "--watch", *(key.secret for key in made)]
        ) as process:
            own = 0

            def second_round() -> bool:
                """The keys live on meanwhile, however long the command takes to start."""
                nonlocal own
                own += pool.keepalive_many(made).done
                return pool.stats().kept_alive >= own + 4

            eventually(second_round, "a second round", within=60)
            pool.delete_many(made)
            assert process.stdout is not None
            assert sorted(process.stdout.read().splitlines()) == sorted(f"dead\t{key.hint}" for key in made)
            assert process.wait(30) == Status.UNKNOWN_KEY


def test_keepalive_watch_ends_by_a_wrong_token(guarded_server: ServerProcess) -> None:
    ran = run_command(guarded_server, "keepalive", "--watch", "nobody", KEYPOOL_TOKEN="wrong-wrong-wrong")
    assert ran.status == Status.DENIED
    assert "unauthorized" in ran.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_keepalive_watch_ends_by_a_signal(
    server: ServerProcess, pool: KeyPool, number: signal.Signals, status: int
) -> None:
    made, before = pool.generate(), pool.stats().kept_alive
    with started(server, ["-m", "keypool", "keepalive", "--watch", made.secret]) as process:
        eventually(lambda: pool.stats().kept_alive > before, "a first round")
        process.send_signal(number)
        assert process.wait(30) == status


# ------------------------------------------------------------------------------------------------------------ serve


def test_serve_is_the_server(tmp_path: Path) -> None:
    relative = os.path.relpath(tmp_path / "keys.db", ROOT / "tests")
    words = ["serve", "--json", "--port=0", f"--data={relative}"]
    with started(None, ["-m", "keypool", *words], more={"KEYPOOL_PROT": "1"}) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ready on http://" in line:
                break
        assert line.startswith("{")
        assert any("restored from /" in each for each in lines), "the data file's absolute path"
        assert any("did you mean KEYPOOL_PORT?" in each for each in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    wrong = keypool(None, "serve", "--nonsense")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    name, *rest = keypool(None, "serve", "--help").stdout.splitlines()
    assert name == "usage: keypool serve [--NAME=VALUE ...]"
    assert rest == subprocess.run(
        [sys.executable, str(ROOT / "server.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_serve_without_a_reader(flag: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with started(None, ["-m", "keypool", "serve", flag], stdout=writer) as process:
        os.close(writer)
        assert process.wait(30) == Status.BROKEN_PIPE
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_starting_takes_no_longer_than_it_must() -> None:
    """A small command imports neither asyncio nor a package of the server, since scripts run it in loops."""
    code = "import sys; from keypool.cli.main import main; main(['show', 'a…b'])"
    code += "; print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert not {"asyncio", "tornado", "msgspec", "multiprocessing"} & set(ran.stderr.split())
