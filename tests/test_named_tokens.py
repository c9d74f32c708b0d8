"""Named tokens: what their file may say, who a caller then is, and how a server follows the file while it runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import run_command
from client_support import ports_in_a_row
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    ROOT,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
    eventually,
    run_server,
)
from valkeys import new_pool, shared_valkey
from viewing import Closed, Viewer

from keypool.api.auth import Access, Role
from keypool.config import token_sources
from keypool.config.named_tokens import NamedToken, parse, read_named_tokens
from keypool.config.settings import Settings, effective_settings, load
from keypool.config.token_sources import FileWatch
from keypool.core.errors import SettingsError, Unauthorized
from keypool.server import launch
from keypool.web.session import Sessions

ALICE, BOB, CAROL = "alice-token-5d21c0", "bob-token-77e1b9a0", "carol-token-0a44ee"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def stanza(name: str, role: str, token: str, **more: object) -> str:
    """A table of the file; `more` are further members as TOML writes them."""
    lines = [f"[tokens.{name}]", f'role = "{role}"', f'digest = "{digest(token)}"']
    return "\n".join([*lines, *(f"{member} = {value}" for member, value in more.items())]) + "\n"


def refused(text: str, file: str = "t.toml") -> str:
    """The line that refuses the text of a file."""
    with pytest.raises(SettingsError) as caught:
        parse("--tokens", file, text)
    line = str(caught.value)
    assert line.isprintable(), f"more than one line: {line!r}"
    return line


# -------------------------------------------------------------------------------------------------------- the file


def test_a_table_says_role_digest_pools_and_share() -> None:
    """Pools and share may be left out; a digest may be in capitals; the tokens keep the file's order."""
    text = (
        stanza("alice", "client", ALICE, pools='["openai", "b-1"]', max_held=20)
        + stanza('"bob.smith@example.com"', "viewer", BOB, pools='["openai"]')
        + stanza("carol", "admin", CAROL).replace(digest(CAROL), digest(CAROL).upper())
    )
    assert parse("--tokens", "t.toml", text) == (
        NamedToken("alice", "client", bytes.fromhex(digest(ALICE)), frozenset({"openai", "b-1"}), 20),
        NamedToken("bob.smith@example.com", "viewer", bytes.fromhex(digest(BOB)), frozenset({"openai"})),
        NamedToken("carol", "admin", bytes.fromhex(digest(CAROL))),
    )


def test_a_table_is_written_as_it_is_read() -> None:
    """Names that TOML wants in quotes too."""
    for name in ("alice", "a.b", "x@y", "0-_"):
        for pools, held in ((None, None), (frozenset({"b", "a"}), 1)):
            token = NamedToken(name, "client", bytes(32), pools, held)
            assert parse("--tokens", "t.toml", token.stanza()) == (token,)


A = stanza("alice", "client", ALICE)
WRONG = {
    "not TOML": ("[tokens.alice\n", "--tokens takes the path of a TOML file of named tokens, but t.toml is not valid"),
    "another table": (A + "[token.bob]\n", "'token' in t.toml is unknown"),
    "tokens is no table": ("tokens = 1", "tokens in t.toml takes tables [tokens.NAME], not 1"),
    "a token is no table": ("[tokens]\nalice = 'x'", "alice in [tokens] of t.toml takes a table [tokens.alice]"),
    "no role": (A.replace('role = "client"', ""), "[tokens.alice] of t.toml has no role, which takes client, viewer"),
    "an unknown role": (
        A.replace("client", "boss"), "role in [tokens.alice] of t.toml takes client, viewer or admin, not 'boss'",
    ),
    "no digest": ("[tokens.alice]\nrole = 'client'", "[tokens.alice] of t.toml has no digest, which takes the SHA-256"),
    "a short digest": (A.replace('digest = "', 'digest = "0'), "digest in [tokens.alice] of t.toml takes the SHA-256"),
    "an unknown member": (A + "pool = 'x'", "'pool' in [tokens.alice] of t.toml is unknown; the members are role"),
    "a name with a dot": (A.replace("alice", "alice.smith"), "is written in quotes: [tokens.\"alice.smith\"]"),
    "pools is no list": (A + "pools = 'openai'", "pools in [tokens.alice] of t.toml takes a list of names of pools"),
    "no pools": (A + "pools = []", "at least one, not an empty one"),
    "a wrong pool": (A + "pools = ['ok', 'Open AI']", "not 'Open AI'"),
    "a pool that is a number": (A + "pools = [1]", "pools in [tokens.alice] of t.toml takes a list"),
    "a share of nothing": (A + "max_held = 0", "max_held in [tokens.alice] of t.toml takes a whole number from 1 to"),
    "half a share": (A + "max_held = 1.5", "max_held in [tokens.alice] of t.toml takes a whole number from 1 to"),
    "a share that is a word": (A + "max_held = true", "max_held in [tokens.alice] of t.toml takes a whole number"),
    "a share for a viewer": (stanza("v", "viewer", BOB, max_held=1), "is for tokens of the role client only"),
    "a digest twice": (A + stanza("bob", "client", ALICE), "digest in [tokens.bob] of t.toml is that of [tokens."),
    "a table twice": (A + A, "is not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_file_is_one_line_that_names_table_and_member(case: str) -> None:
    """It says what would be right, and shows no digest: somebody may have put the token there."""
    text, line = WRONG[case]
    assert line in refused(text)
    assert digest(ALICE) not in refused(text)


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", ".a", "é", "a/b", "a\\nb", "a" * 64, "none", "0123abcd", "a:b"]
)
def test_a_name_with_odd_characters_is_refused(name: str) -> None:
    """As are names that the audit log has for something else: `none`, and 8 hex digits."""
    line = refused(A.replace("alice", f'"{name}"'))
    assert line.startswith("the name of a token in t.toml takes 1 to 63 letters, digits and . _ - @")


def test_the_secret_in_place_of_its_digest_is_not_shown() -> None:
    line = refused(A.replace(digest(ALICE), ALICE))
    assert ALICE not in line
    assert "keypool token" in line


NAMES = st.one_of(st.text(max_size=5), st.sampled_from(["alice", "a.b", "none"]))
MEMBERS = st.one_of(st.text(max_size=5), st.sampled_from(["role", "digest", "pools", "max_held"]))
VALUES = st.recursive(
    st.one_of(st.text(max_size=5), st.sampled_from(["client", "0" * 64]), st.integers(-1, 3), st.booleans()),
    lambda some: st.lists(some, max_size=3),
)


@settings(deadline=None)  # an example may take long on a busy machine
@given(st.one_of(st.text(), st.dictionaries(NAMES, st.dictionaries(MEMBERS, VALUES, max_size=4), max_size=3)))
def test_no_file_gives_anything_but_tokens_or_one_line(content: str | dict[str, dict[str, object]]) -> None:
    """Whatever is in it."""

    def table(name: str, members: dict[str, object]) -> str:
        lines = [f"{json.dumps(member)} = {json.dumps(value)}" for member, value in members.items()]
        return "\n".join([f"[tokens.{json.dumps(name)}]", *lines])

    text = content if isinstance(content, str) else "\n".join(table(*each) for each in content.items())
    try:
        tokens = parse("--tokens", "t.toml", text)
    except SettingsError:
        refused(text)
    else:
        assert "".join(each.stanza() for each in tokens).count("[tokens.") == len(tokens)


# ------------------------------------------------------------------------------------------------------ at the start


def test_it_is_a_setting_like_others(tmp_path: Path) -> None:
    """Flag, variable, key of the TOML file; with named tokens only, the server isn't open."""
    file, config = tmp_path / "tokens.toml", tmp_path / "keypool.toml"
    file.write_text(A)
    config.write_text(f'tokens = "{file}"')
    for argv, environ in (
        ([f"--tokens={file}"], {}),
        ([], {"KEYPOOL_TOKENS": str(file)}),
        ([f"--config={config}"], {}),
    ):
        settings = load(["--address=0.0.0.0", *argv], environ)
        assert [token.name for token in settings.named_tokens] == ["alice"]
        assert not settings.open
        assert settings.origins["named_tokens"] == settings.origins["tokens"] != "default"
        assert digest(ALICE) not in repr(settings)


def test_what_is_printed_of_it_is_its_path(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(A)
    text = effective_settings(load([f"--tokens={file}"], {}))
    assert tomllib.loads(text)["tokens"] == str(file)
    assert "alice" not in text
    assert digest(ALICE) not in text


@pytest.mark.parametrize("content", ["", "[tokens]\n", "# nothing yet\n"])
def test_a_file_without_a_token_is_refused(content: str, tmp_path: Path) -> None:
    """It must not leave the server open, and one that an editor has just emptied must not lock everybody out."""
    file = tmp_path / "tokens.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"^KEYPOOL_TOKENS takes .* has no table \[tokens.NAME\]"):
        load([], {"KEYPOOL_TOKENS": str(file), "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN})
    with pytest.raises(SettingsError, match=r"^--tokens takes .* has no table"):
        read_named_tokens("--tokens", str(file))


@pytest.mark.parametrize("role", ["client", "viewer", "admin"])
def test_a_token_of_the_environment_has_no_name_as_well(role: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(A)
    variable = f"KEYPOOL_{role.upper()}_TOKEN"
    with pytest.raises(SettingsError) as caught:
        load([f"--tokens={file}"], {variable: f"{ADMIN_TOKEN},{ALICE}"})
    line = str(caught.value)
    assert line.startswith(f"digest in [tokens.alice] of {file} is that of a token of {variable}")
    assert ALICE not in line


def test_a_broken_file_ends_the_start_with_one_line(tmp_path: Path) -> None:
    """Exit status 2; one that is missing too."""
    file = tmp_path / "tokens.toml"
    for content, why in ((None, "cannot be read"), (A.replace("client", "boss"), "role in [tokens.alice]")):
        if content is not None:
            file.write_text(content)
        status, text = run_server([f"--tokens={file}"])
        assert (status, len(text.splitlines())) == (2, 1), text
        assert why in text


# ------------------------------------------------------------------------------------------------------- the callers


NAMED = (
    NamedToken("alice", "client", bytes.fromhex(digest(ALICE)), frozenset({"openai"}), 3),
    NamedToken("bob", "viewer", bytes.fromhex(digest(BOB))),
)


def test_a_caller_has_name_pools_and_share_of_its_token() -> None:
    """One without a name has none of them, and stands in the log by the start of its digest."""
    access = Access(admin=[ADMIN_TOKEN], named=NAMED)
    alice = access.identify(f"Bearer {ALICE}")
    assert (alice.role, alice.token, alice.name) == (Role.CLIENT, "alice", "alice")
    assert (alice.pools, alice.max_held) == (frozenset({"openai"}), 3)
    admin = access.identify(f"Bearer {ADMIN_TOKEN}")
    assert (admin.token, admin.name, admin.pools, admin.max_held) == (
        digest(ADMIN_TOKEN)[:8],
        None,
        None,
        None,
    )
    assert not access.open


def test_another_token_under_the_same_name_is_another_caller() -> None:
    """So what was opened with the old token ends, as with any other removed token."""
    access = Access(named=NAMED)
    before = access.identify(f"Bearer {BOB}")
    access.replace(named=[NAMED[0], NamedToken("bob", "viewer", bytes.fromhex(digest(CAROL)))])
    assert not access.knows(before)
    assert access.identify(f"Bearer {CAROL}").name == "bob"
    access.replace(named=NAMED)
    assert access.knows(before)


def test_a_session_lasts_as_long_as_its_token() -> None:
    """Whether its signing key was prepared or not; for a client's token there is none."""
    access = Access(named=NAMED)
    sessions = Sessions(access)
    session, cookie = sessions.sign_in(BOB)
    headers = {"Cookie": f"keypool_session={cookie}"}
    assert sessions.of(headers).caller.name == "bob"
    sessions.prepare()
    assert sessions.of(headers).caller.name == "bob"
    access.replace(named=NAMED[:1])
    with pytest.raises(Unauthorized):
        sessions.of(headers)
    sessions.prepare()
    with pytest.raises(Unauthorized):
        sessions.xsrf(session)
    access.replace(named=NAMED)
    assert sessions.of(headers).caller.name == "bob"


# -------------------------------------------------------------------------------------------- a file that is changed


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], bool]]:
    """A file that was read, and a poll of its watch, one interval after the poll before."""
    file, moment = tmp_path / "tokens.toml", [0.0]
    file.write_text("1")

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return moment[0]

    monkeypatch.setattr(token_sources, "time", Clock)
    watch = FileWatch(str(file))
    watch.reading()

    def poll() -> bool:
        moment[0] += token_sources.POLL_SECONDS
        changed = watch.changed()
        assert not watch.changed(), "at most one look an interval"
        if changed:
            watch.reading()
        return changed

    assert not poll()
    assert not poll()
    return file, poll


def test_a_change_counts_once_when_the_file_rests(watched: tuple[Path, Callable[[], bool]]) -> None:
    """Written in place, replaced by rename, removed, and there again; and once only."""
    file, poll = watched
    other = file.with_name("other")

    def write() -> None:
        file.write_text("another")

    def rename() -> None:
        other.write_text("another")
        other.rename(file)

    for change in (write, rename, file.unlink, write):
        change()
        assert [poll() for _ in range(4)] == [False, True, False, False], change.__name__
    assert 3 * token_sources.POLL_SECONDS < 10, "a server follows within 10 s of a change"


def test_a_file_that_is_being_written_is_left_alone(watched: tuple[Path, Callable[[], bool]]) -> None:
    """An editor that writes it twice, or a slow copy, is waited for."""
    file, poll = watched
    for text in ("", "h", "ha", "half", "halfway"):
        file.write_text(text)
        assert not poll()
    assert poll()


# -------------------------------------------------------------------------------------------------- a running server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a named token of each role."""
    path = tmp_path / "tokens.toml"
    path.write_text(
        stanza("alice", "client", ALICE) + stanza("bob", "viewer", BOB) + stanza("carol", "admin", CAROL)
    )
    path.chmod(0o600)
    return path


@pytest.fixture
def named_server(file: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server with these tokens, and one of the environment; the parameter is for --http."""
    flags = ["--port=0", "--data=:memory:", f"--tokens={file}", "--log-format=json"]
    flags.append(f"--http={getattr(request, 'param', 'fast')}")
    with ServerProcess(flags, cwd=file.parent, env={"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}) as server:
        server.secrets |= {ALICE, BOB, CAROL, ADMIN_TOKEN, digest(ALICE), digest(BOB), digest(CAROL)}
        yield server
        server.hang_up()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        server.check()


def logged(server: ServerProcess, text: str) -> None:
    eventually(lambda: text in server.log, f"{text!r} in the log", within=30)


def test_names_stand_in_the_audit_log_and_in_events(named_server: ServerProcess) -> None:
    """As the token that did it, and as the actor of what an operator did; others by their digest's start."""
    carol, other = named_server.client(CAROL), named_server.client(ADMIN_TOKEN)
    with Viewer(named_server, BOB) as viewer:
        viewer.until("hello")
        first, second = carol.make(), other.make()
        for client, key in ((carol, first), (other, second)):
            client.post(f"{API}/keys/id:{key['id']}/quarantine", json={}).expect(200)
        events: list[dict[str, Any]] = []
        while len(events) < 4:
            events += viewer.until("delta")["events"]
    by_act = [(event["event"], event["actor"]) for event in events]
    assert ("quarantined", "carol") in by_act
    assert ("quarantined", digest(ADMIN_TOKEN)[:8]) in by_act

    def audited() -> list[str]:
        lines = [line for line in named_server.log_since(0) if '"keypool.audit"' in line]
        return [found[1] for line in lines if (found := re.search(r'"token": ?"([^"]*)"', line))]

    eventually(lambda: len(audited()) >= 4, "four lines of the audit log")
    assert sorted(audited()) == sorted(["carol", "carol", digest(ADMIN_TOKEN)[:8], digest(ADMIN_TOKEN)[:8]])


def test_a_named_session_is_written_under_its_name(named_server: ServerProcess) -> None:
    """The System page has the names, and neither digests nor paths of anything secret beside the file's."""
    cookie = named_server.client().sign_in(BOB)
    logged(named_server, "sign-in by viewer (token bob)")
    body = named_server.client().page("/system", cookie).body.decode()
    assert "3 set: alice, bob, carol" in body
    assert digest(ALICE)[:8] not in body
    assert "KEYPOOL_SECRETS_KEY" in body


@pytest.mark.parametrize(
    ("how", "named_server"),
    [("signal", "fast"), ("write", "fast"), ("rename", "tornado")],
    indirect=["named_server"],
)
def test_the_server_follows_the_file(named_server: ServerProcess, file: Path, how: str) -> None:
    """At SIGHUP, and within 10 s of a change. A removed token gets 401 at once, on connections that are open too and
    whose headers were seen before; its sessions and feeds end, and all others go on.
    """
    alice, carol, dave = map(named_server.client, (ALICE, CAROL, CLIENT_TOKEN))
    for _ in range(3):
        alice.post(ACQUIRE).expect_problem(404, "no-key-available")
        dave.post(ACQUIRE).expect_problem(401, "unauthorized")
    cookies = [named_server.client().sign_in(token) for token in (BOB, CAROL)]
    with Viewer(named_server, headers={"Cookie": cookies[0]}) as feed, Viewer(named_server, CAROL) as kept:
        feed.until("hello")
        kept.until("hello")
        change(
            file, stanza("dave", "client", CLIENT_TOKEN) + stanza("carol", "admin", CAROL), how, named_server
        )
        logged(named_server, "3 valid tokens, 1 of them new; 2 were removed")
        alice.post(ACQUIRE).expect_problem(401, "unauthorized")
        dave.post(ACQUIRE).expect_problem(404, "no-key-available")
        with pytest.raises(Closed) as closed:
            feed.until("the end")
        assert closed.value.code == 4401
        carol.make()
        kept.until("delta")
    assert named_server.client().page("/", cookies[0]).status == 303
    assert named_server.client().page("/", cookies[1]).status == 200


def change(file: Path, text: str, how: str, server: ServerProcess) -> None:
    """Give the file another content."""
    if how == "rename":
        new = file.with_name("new.toml")
        new.write_text(text)
        new.rename(file)
    else:
        file.write_text(text)
    if how == "signal":
        server.signal(signal.SIGHUP)


def test_a_broken_file_is_logged_once_and_changes_nothing(named_server: ServerProcess, file: Path) -> None:
    """Until it is right again, however long it takes; the last admin of the file may go, too."""
    named_server.allow("previous tokens stay valid")
    alice = named_server.client(ALICE)
    file.write_text("[tokens.alice]\nrole = 'boss'\n")
    logged(named_server, "role in [tokens.alice]")
    alice.post(ACQUIRE).expect_problem(404, "no-key-available")
    file.unlink()
    logged(named_server, "cannot be read: No such file")
    alice.post(ACQUIRE).expect_problem(404, "no-key-available")
    file.write_text(stanza("alice", "client", ALICE))
    logged(named_server, "2 valid tokens, 0 of them new; 2 were removed")
    assert named_server.log.count("previous tokens stay valid") == 2
    named_server.client(CAROL).get(API + "/stats").expect_problem(401, "unauthorized")


def test_a_file_that_was_only_touched_is_no_news(named_server: ServerProcess, file: Path) -> None:
    """Not even at the start, when it is read a second time."""
    os.utime(file, (1, 1))
    file.write_text(file.read_text() + "# a remark\n")
    file.write_text(file.read_text() + stanza("dave", "client", CLIENT_TOKEN))
    logged(named_server, "5 valid tokens, 1 of them new; 0 were removed")
    assert named_server.log.count("were reloaded") == 1


def test_a_file_that_others_can_read_is_warned_of(file: Path) -> None:
    """As the other files of tokens; without any admin token there is a warning too."""
    file.write_text(stanza("bob", "viewer", BOB))
    file.chmod(0o644)
    flags = ["--port=0", "--data=:memory:", f"--tokens={file}"]
    with ServerProcess(flags, cwd=file.parent) as server:
        assert f"--tokens: others than its owner can read {file} (mode 0644); make it 0600" in server.log
        assert "there is no admin token" in server.log


def test_a_named_admin_is_an_admin(caplog: pytest.LogCaptureFixture) -> None:
    """Then there is no warning that nobody can generate keys."""
    launch._warn(Settings(named_tokens=NAMED))
    assert "there is no admin token" in caplog.text
    caplog.clear()
    launch._warn(Settings(named_tokens=(*NAMED, NamedToken("carol", "admin", bytes.fromhex(digest(CAROL))))))
    assert not caplog.text


def test_all_processes_follow_the_file(file: Path) -> None:
    """The supervisor looks after it for all, and for those that it starts later."""
    first = ports_in_a_row(2)
    flags = [
        f"--engine={new_pool(shared_valkey())}", "--processes=2", "--port=0", f"--process-port={first}",
        f"--tokens={file}",
    ]  # fmt: skip
    with ServerProcess(flags, cwd=file.parent) as server:

        def statuses(token: str) -> list[int]:
            found = []
            for number in range(2):
                shared, server.port = server.port, first + number
                with Client(server, token) as client:
                    found.append(client.get(API + "/stats").status)
                server.port = shared
            return found

        assert statuses(BOB) == [200, 200]
        file.write_text(stanza("dave", "viewer", VIEWER_TOKEN))
        eventually(lambda: statuses(BOB) == [401, 401], "the removed token refused by both", 30)
        assert statuses(VIEWER_TOKEN) == [200, 200]
        # One that is killed may not have written its line yet.
        eventually(lambda: server.log.count("were reloaded") == 2, "both have logged it")
        workers = [int(pid) for pid in re.findall(r"serves, pid (\d+)", server.log)]
        os.kill(workers[0], signal.SIGKILL)
        eventually(lambda: server.log.count("serves, pid") == 3, "another in its place")
        assert statuses(BOB) == [401, 401]
        assert server.log.count("were reloaded") == 2


# ---------------------------------------------------------------------------------------------------- keypool token


def test_a_token_is_printed_once_with_its_table() -> None:
    """256 bits, with a beginning by which scanners find it. Each is another."""
    seen = set()
    for _ in range(3):
        ran = run_command(
            None, "token", "alice", "--role=client", "--pool=openai", "--pool", "b", "--max-held=5"
        )
        assert (ran.status, ran.err) == (0, "")
        token, _, table = ran.out.partition("\n\n")
        assert re.fullmatch(r"kp_[A-Za-z0-9]{43}", token)
        made = NamedToken("alice", "client", bytes.fromhex(digest(token)), frozenset({"openai", "b"}), 5)
        assert parse("--tokens", "t.toml", table) == (made,)
        seen.add(token)
    assert len(seen) == 3


def test_it_is_appended_to_a_file_that_stays_as_it_was_besides(tmp_path: Path) -> None:
    """A new file has mode 0600, another keeps its mode; remarks stay; only the token is printed then."""
    file = tmp_path / "tokens.toml"
    first = run_command(None, "token", "alice", "--role=client", f"--file={file}")
    assert first.status == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("# ours\n" + file.read_text().rstrip("\n"))
    file.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    second = run_command(None, "token", "b.c", "--role=admin", f"--file={link}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert "mode 0640" in second.err
    assert link.is_symlink()
    assert file.read_text().startswith("# ours\n[tokens.alice]\n")
    found = {token.name: token.digest.hex() for token in read_named_tokens("--tokens", str(file))}
    assert found == {"alice": digest(first.out.strip()), "b.c": digest(second.out.strip())}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "tokens.toml"]


def test_a_name_that_is_there_is_refused(tmp_path: Path) -> None:
    """And a file that is broken is not touched."""
    file = tmp_path / "tokens.toml"
    file.write_text(A)
    ran = run_command(None, "token", "alice", "--role=client", f"--file={file}")
    assert (ran.status, ran.out) == (2, "")
    assert "has a table [tokens.alice] already" in ran.err
    file.write_text("[tokens.x]\n")
    ran = run_command(None, "token", "alice", "--role=client", f"--file={file}")
    assert (ran.status, ran.out, file.read_text()) == (2, "", "[tokens.x]\n")
    assert "has no role" in ran.err


def test_of_many_at_once_none_is_lost(tmp_path: Path) -> None:
    """Each finds the file as the one before has left it."""
    file = tmp_path / "tokens.toml"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "keypool", "token", f"t{n}", f"--file={file}", "--role=client"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        )
        for n in range(4)
    ]  # fmt: skip
    printed = [each.communicate(timeout=60)[0].decode().strip() for each in running]
    found = {token.digest.hex() for token in read_named_tokens("--tokens", str(file))}
    assert found == {digest(token) for token in printed}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["alice"], "--role"),
        (["--role=client"], "NAME"),
        (["alice", "--role=boss"], "--role"),
        (["a b", "--role=client"], "the name of a token takes"),
        (["none", "--role=client"], "the name of a token takes"),
        (["alice", "--role=client", "--pool=A"], "--pool takes the name of a pool"),
        (["alice", "--role=client", "--max-held=0"], "--max-held"),
        (["alice", "--role=client", f"--max-held={10**12}"], "--max-held"),
        (["alice", "--role=viewer", "--max-held=1"], "--max-held is for tokens of the role client only"),
        (["alice", "--role=client", "--digest=x"], "--digest"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words: list[str], line: str) -> None:
    ran = run_command(None, "token", *words)
    assert (ran.status, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1
    assert line in ran.err


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    ran = run_command(None, "token", "alice", "--role=client", f"--file={tmp_path}/no/tokens.toml")
    assert (ran.status, ran.out) == (1, "")
    assert "can't be written: No such file or directory" in ran.err


def test_a_server_takes_what_the_command_made(tmp_path: Path) -> None:
    """Whatever the roles; and while it runs."""
    file = tmp_path / "tokens.toml"

    def made(name: str, role: str) -> str:
        return run_command(None, "token", name, f"--role={role}", f"--file={file}").out.strip()

    admin = made("root", "admin")
    with ServerProcess(["--port=0", "--data=:memory:", f"--tokens={file}"], cwd=tmp_path) as server:
        server.client(admin).make()
        client = server.client(made("worker", "client"))
        eventually(lambda: client.post(ACQUIRE).status == 200, "the new token is valid", 30)


# ------------------------------------------------------------------------------------------------- pools and shares


def test_pools_share_and_name_of_a_token_reach_the_calls(tmp_path: Path) -> None:
    """Another pool is as unknown as one that isn't there; the share counts in all pools; rows show the name."""
    file = tmp_path / "tokens.toml"
    file.write_text(stanza("alice", "client", ALICE, pools='["openai", "mistral"]', max_held=2))
    env = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}
    with ServerProcess(["--port=0", "--data=:memory:", f"--tokens={file}"], cwd=tmp_path, env=env) as server:
        admin, alice = server.client(ADMIN_TOKEN), server.client(ALICE)
        admin.make()
        for pool in ("openai", "mistral"):
            admin.put(f"{API}/pools/{pool}", json={}).expect(201)
            admin.post(f"{API}/pools/{pool}/batch", json={"op": "generate", "count": 2}).expect(201)
        for path in (ACQUIRE, f"{API}/pools/default/keys/acquire", f"{API}/pools/nowhere/keys/acquire"):
            alice.post(path).expect_problem(404, "unknown-pool")
        first = alice.post(f"{API}/pools/openai/keys/acquire").expect(200)
        alice.post(f"{API}/pools/mistral/keys/acquire").expect(200)
        alice.post(f"{API}/pools/openai/keys/acquire").expect_problem(429, "share-spent")
        row = admin.get(f"{API}/pools/openai/keys/id:{first['id']}").expect(200)
        assert row["client"] == "alice"
        alice.post(f"{API}/pools/openai/keys/{first['handle']}/unblock").expect(200)
        alice.post(f"{API}/pools/openai/keys/acquire").expect(200)
        file.write_text(stanza("alice", "client", ALICE, max_held=4))
        eventually(lambda: alice.post(ACQUIRE).status == 200, "the default pool", 30)
