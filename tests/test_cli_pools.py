"""The command's part in pools and imports: files of keys, files of pools, and keys by name, against the fake server."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cli_support import Ran, run_command

from keypool.cli import imports, pools, run
from keypool.cli.status import CommandError, Status
from keypool.client import KeyPool
from keypool.client.testing import FakeServer

SECRETS = ["sk-live-0123456789abcdef", "sk-live-ffffffffffffffff"]
USER = "somebody@example.org"

Command = Callable[..., Ran]


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer(pools={"openai": []})


@pytest.fixture
def command(fake: FakeServer) -> Iterator[Command]:
    """Runs a command against the fake server."""
    client = functools.partial(KeyPool, transport=fake)
    with mock.patch("keypool.cli.connection.KeyPool", client):
        yield lambda *words, **options: run_command(None, *words, **options)


def keys_of(text: str, format: str | None = None) -> list[Any]:
    """The keys in a text, each as its number and item, or its number and problem."""
    return [
        (number, problem if item is None else item)
        for number, item, problem in imports.parse(text, format, "keys.txt")
    ]


# --------------------------------------------------------------------------------------------------- files of keys


def test_a_secret_a_line() -> None:
    assert keys_of(" one \r\n\n two words\t\nthree") == [(1, "one"), (3, "two words"), (4, "three")]
    assert keys_of("") == keys_of("\n\n") == []


def test_csv_with_a_header() -> None:
    text = (
        "secret, name,label:region,data:user,data:note\r\n"
        'sk-1,acct-1,eu,x,"two\nlines, one cell"\r\n'
        "\r\n"
        "sk-2,,,,\r\n"
        "sk-3\r\n"
        ",acct-4,,,\r\n"
        "sk-5,a,b,c,d,e\r\n"
    )
    first = {
        "secret": "sk-1",
        "name": "acct-1",
        "labels": {"region": "eu"},
        "data": {"user": "x", "note": "two\nlines, one cell"},
    }
    assert keys_of(text) == [
        (2, first),
        (5, {"secret": "sk-2"}),
        (6, {"secret": "sk-3"}),
        (7, {"secret": "", "name": "acct-4"}),
        (8, "it has 6 columns, and the header has 5"),
    ]


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_csv_as_a_spreadsheet_writes_it(delimiter: str) -> None:
    text = f"name{delimiter}secret\nacct-1{delimiter}sk-1\n"
    assert keys_of(text) == [(2, {"secret": "sk-1", "name": "acct-1"})]


def test_the_delimiter_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each line: a file of many secrets took the square of its length."""
    found: list[str] = []
    delimiter = imports._delimiter

    def looked_for(text: str) -> str:
        found.append(text)
        return delimiter(text)

    monkeypatch.setattr(imports, "_delimiter", looked_for)
    assert len(imports.parse("\n".join(f"sk-live-{number:08}" for number in range(500)), None, "f")) == 500
    assert len(found) <= 2


def test_json_lines() -> None:
    wrong = ["none", '["sk-2"]', '{"secret":5}', '{"nmae":1,"secret":"x"}', '{"secret":"\\ud800"}', "{}"]
    text = "\n".join(['{"secret":"sk-1","data":{"n":1}}', "", *wrong])
    found = keys_of(text)
    assert found[0] == (1, {"secret": "sk-1", "data": {"n": 1}})
    assert [number for number, _ in found] == [1, 3, 4, 5, 6, 7, 8]
    problems = ["JSON", "object", "string", "'nmae'", "UTF-8", "has a secret"]
    for (_, problem), says in zip(found[1:], problems, strict=True):
        assert says in problem


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[\n{}]", "JSON array"),
        ("key,name\nsk-1,a", "no column secret"),
        ("sk-1,acct-1\nsk-2,acct-2", "without a first line"),
        ("secret,nmae\nsk-1,a", "'nmae'"),
        ("secret,label:\nsk-1,a", "'label:'"),
        ("secret,secret\nsk-1,a", "twice"),
    ],
)
def test_a_file_that_is_no_file_of_keys_is_refused_as_a_whole(text: str, says: str) -> None:
    with pytest.raises(CommandError, match=says) as refused:
        keys_of(text)
    assert "keys.txt" in str(refused.value)
    assert "sk-1" not in str(refused.value)
    assert refused.value.status == Status.USAGE


def test_a_format_can_be_forced() -> None:
    assert keys_of("a,b\nc", None) == keys_of("a,b\nc", "lines")
    assert keys_of('{"secret":"x"}', "lines") == [(1, '{"secret":"x"}')]
    assert keys_of("secret\nsk-1", "lines") == [(1, "secret"), (2, "sk-1")]
    with pytest.raises(CommandError, match="no column secret"):
        keys_of("sk-1\nsk-2", "csv")


# --------------------------------------------------------------------------------------------------------- import


def test_a_file_is_imported_and_what_failed_is_told_by_line(
    fake: FakeServer, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "keys.csv"
    file.write_text(
        f"secret,name,label:region,data:user\n{SECRETS[0]},a,eu,{USER}\n{SECRETS[1]},a,,\n{SECRETS[0]},,,\n,b,,\n",
        encoding="utf-8",
    )
    done = command("--pool", "openai", "import", str(file))
    assert done.status == Status.FAILED
    assert done.fields == {"created": "1", "updated": "0", "existed": "0", "duplicate": "1", "failed": "2"}
    assert "line 3: a fake name-taken (name-taken)" in done.err
    assert "line 5: secret has 1 to 4096 bytes (bad-request)" in done.err
    assert fake.pool("openai").keys == SECRETS[:1]
    for text in (*SECRETS, USER, "sk-l"):
        assert text not in done.out + done.err
    again = command("import", str(file), "--exists", "update", "--json", KEYPOOL_POOL="openai")
    assert json.loads(again.out)["updated"] == 1
    assert [each["line"] for each in json.loads(again.out)["failures"]] == [3, 5]
    with KeyPool(transport=fake, pool="openai") as pool, pool.lease() as key:
        assert (key.name, key.data) == ("a", {"user": USER})


def test_keys_come_from_standard_input_too(fake: FakeServer, command: Command) -> None:
    done = command("import", "-", "--pool", "openai", stdin="\n".join(SECRETS))
    assert (done.status, done.err, done.fields["created"]) == (0, "", "2")
    assert command("import", "-", "--pool", "openai", stdin="\n".join(SECRETS)).fields["existed"] == "2"
    nothing = command("import", "-", "--pool", "openai")
    assert (nothing.status, nothing.fields["created"]) == (0, "0")
    assert "no key in standard input" in nothing.err


def test_bytes_that_are_no_utf8_fail_alone(fake: FakeServer, command: Command, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfsk-1\nsk-\xff\nsk-3\n")
    done = command("import", str(tmp_path / "keys"), "--pool", "openai")
    assert (done.status, done.fields["created"], done.fields["failed"]) == (1, "2", "1")
    assert "line 2: " in done.err
    assert fake.pool("openai").keys == ["sk-1", "sk-3"]


def test_a_pool_that_purges_takes_them_with_expire_only(fake: FakeServer, command: Command) -> None:
    refused = command("import", "-", stdin=SECRETS[0])
    assert refused.status == Status.FAILED
    assert "keys-would-expire" in refused.err
    assert command("import", "-", "--expire", stdin=SECRETS[0]).fields["created"] == "1"


def test_an_import_that_ends_early_says_how_far_it_came(fake: FakeServer, command: Command) -> None:
    """The progress bar is for a terminal only, and is erased before anything else is written."""
    command("pools", "apply", "-", stdin='[pools.openai]\nkeepalive_seconds="never"\nmax_keys=1500')
    text = "\n".join(f"sk-{number}" for number in range(2500))
    for columns in (0, 80):
        ended = command(
            "import",
            "-",
            "--pool",
            "openai",
            **({"typed": text} if columns else {"stdin": text}),
            columns=columns,
        )
        assert ended.status == Status.FAILED
        assert "the first 1000 of 2500 keys were imported" in ended.err
        assert "pool-full" in ended.err
        assert ("importing [" in ended.err) is (columns > 0)
        assert "sk-" not in ended.err


def test_a_file_that_is_not_there(command: Command, tmp_path: Path) -> None:
    for words in (("import", str(tmp_path / "none")), ("pools", "apply", str(tmp_path))):
        missing = command(*words)
        assert missing.status == Status.USAGE
        assert "can't be read" in missing.err


# ------------------------------------------------------------------------------------------- names, labels, secrets


def test_keys_are_found_changed_and_replaced(fake: FakeServer, command: Command) -> None:
    in_pool = functools.partial(command, KEYPOOL_POOL="openai")
    in_pool("import", "-", stdin="\n".join(SECRETS))
    found = in_pool("find", "-", stdin=f"{SECRETS[0]}\n")
    assert (found.status, found.fields["id"], found.fields["expires_in"]) == (0, "1", "")
    changed = in_pool("update", "id:1", "--name", "acct-1", "--label", "region=eu", "--label", "tier=", "--data", "-",
                      stdin=json.dumps({"user": USER}))  # fmt: skip
    assert changed.fields["labels"] == "region=eu,tier="
    assert USER not in changed.out
    assert in_pool("find", "acct-1").fields["id"] == "1"
    listed = in_pool("list", "--name", "acct").lines
    assert [columns[0] for columns in listed] == ["1"]
    assert listed[0][-8:] == ["acct-1", "region=eu,tier=", "", "", "1", "1", "", "0"]
    heading = in_pool("list", columns=200).out.splitlines()[0]
    assert heading.replace("\x1b[1m", "").split()[:4] == ["ID", "HINT", "NAME", "STATE"]
    assert "LABELS" in heading
    assert "CLIENT" not in heading
    assert in_pool("update", "acct-1", "--no-labels", "--name", "").fields["labels"] == ""
    new = in_pool("replace", "id:1", "-", stdin="sk-new\n")
    assert (new.status, new.fields["id"]) == (0, "1")
    shown = in_pool("show", "-k", "id:1").fields
    assert (shown["key"], shown["data"]) == ("sk-new", f"user={USER}")
    assert "data" not in in_pool("show", "id:1").fields
    assert in_pool("find", "nobody").status == Status.UNKNOWN_KEY
    assert in_pool("update", SECRETS[1], "--name", "b").status == 0
    assert not [path for _, path in fake.requests if "sk-" in path]


@pytest.mark.parametrize(
    ("words", "stdin", "says"),
    [
        (["replace", "id:1", "sk-secret"], "", "never an argument"),
        (["replace", "id:1", "-"], "", "nothing"),
        (["replace", "id:1", "-"], "sk-a\nsk-b", "more than one line"),
        (["replace", "-", "-"], "sk-a", "id:N"),
        (["update", "id:1"], "", "--name"),
        (["update", "id:1", "--label", "region"], "", "NAME=VALUE"),
        (["update", "id:1", "--label", "a=b", "--no-labels"], "", "together"),
        (["update", "id:1", "--data", "-"], '["sk-secret"]', "no JSON object"),
        (["update", "-", "--data", "-"], "{}", "not both"),
        (["update", "sk-l…cdef", "--name", "x"], "", "masked"),
        (["list", "--pool", "a/b"], "", "pool's name"),
        (["import", "-", "--format", "xml"], "", "choose from"),
    ],
)
def test_wrong_usage_is_one_line_without_secrets(
    fake: FakeServer, command: Command, words: list[str], stdin: str, says: str
) -> None:
    wrong = command(*words, stdin=stdin)
    assert wrong.status == Status.USAGE
    assert says in wrong.err
    assert wrong.err.count("\n") == 1
    assert "sk-secret" not in wrong.err
    assert not fake.requests


# ----------------------------------------------------------------------------------------------------------- pools


def test_pools_are_listed_shown_and_deleted(fake: FakeServer, command: Command) -> None:
    assert [columns[:2] for columns in command("pools").lines] == [["default", "0"], ["openai", "0"]]
    assert json.loads(command("pools", "--json").out.splitlines()[1])["settings"]["keepalive_seconds"] is None
    assert command("pools", "show", "openai").fields["keepalive_seconds"] == "never"
    command("import", "-", "--pool", "openai", stdin="\n".join(SECRETS))
    assert command("pools", columns=100).out.splitlines()[0].split()[:2] == ["\x1b[1mNAME", "TOTAL"]
    refused = command("pools", "delete", "openai")
    assert (refused.status, "pool-not-empty" in refused.err) == (Status.FAILED, True)
    with KeyPool(transport=fake, pool="openai") as pool, pool.lease():
        assert (
            command("pools", "delete", "openai", "--drain").out
            == "openai: draining: 1 keys left, 1 of them held\n"
        )
        assert command("acquire", "--pool", "openai").status == Status.FAILED
    assert command("pools", "show", "openai").status == Status.UNKNOWN_KEY
    assert command("pools", "delete", "default").status == Status.FAILED


FILE = """
[pools.openai]
block_seconds = 120
keepalive_seconds = "never"

[pools.mail]
error_threshold = "never"
max_keys = 50
"""


def test_a_file_makes_the_pools_as_it_says(fake: FakeServer, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "pools.toml"
    file.write_text(FILE)
    with KeyPool(transport=fake) as client:
        client.put_pool("old")
        before = client.pools()
        dry = command("pools", "apply", str(file), "--dry-run")
        assert dry.out == (
            "mail: would be created\n"
            "old: not in the file: left as it is; --delete deletes it\n"
            "openai: would be changed: block_seconds 60 -> 120, max_block_seconds 60 -> 120\n"
        )
        assert client.pools() == before
        done = command("pools", "apply", str(file))
        assert (done.status, done.out) == (0, dry.out.replace("would be ", ""))
        again = command("pools", "apply", "-", stdin=FILE)
        assert again.out == "old: not in the file: left as it is; --delete deletes it\n"
        assert command("pools", "apply", str(file), "--delete", "--dry-run").out == "old: would be deleted\n"
        assert command("pools", "apply", str(file), "--delete").out == "old: deleted\n"
        same = command("pools", "apply", str(file))
        assert (same.status, same.out) == (0, "")
        assert "are as" in same.err
        assert client.get_pool("mail").settings["error_threshold"] is None
        assert client.get_pool("mail").settings["max_keys"] == 50
        # What the file leaves out has its default again.
        file.write_text("[pools.openai]\n[pools.mail]\n")
        back = command("pools", "apply", str(file), "--json")
        assert [json.loads(line)["did"] for line in back.out.splitlines()] == ["changed", "changed"]
        assert client.get_pool("openai").settings["keepalive_seconds"] == 300


def test_a_file_gives_pools_their_pace(fake: FakeServer, command: Command) -> None:
    """`default` too, though the server's flags decide its other settings; what the file leaves out is none."""
    text = """
[pools.openai]
keepalive_seconds = "never"
pace = { count = 5, seconds = 60 }
[pools.default.pace]
count = 1
seconds = 0.5
burst = 2
"""
    assert command("pools", "apply", "-", stdin=text).out.splitlines() == [
        "default: changed: pace never -> count 1, seconds 0.5, burst 2",
        "openai: changed: pace never -> count 5, seconds 60, burst 1",
    ]
    assert "are as" in command("pools", "apply", "-", stdin=text).err
    with KeyPool(transport=fake) as client:
        assert client.get_pool("openai").settings["pace"] == {"count": 5, "seconds": 60, "burst": 1}
        assert command("pools", "apply", "-", stdin="[pools.default]\n[pools.openai]").status == 0
        assert {info.settings["pace"] for info in client.pools()} == {None}


def test_a_key_gets_a_pace_and_an_unblock_says_its_uses(fake: FakeServer, command: Command) -> None:
    in_pool = functools.partial(command, KEYPOOL_POOL="openai")
    in_pool("import", "-", stdin=json.dumps({"secret": SECRETS[0], "pace": {"count": 1, "seconds": 60}}))
    for given, pace in (("3/60", [3, 60, 1]), ("5/0.5/2", [5, 0.5, 2])):
        row = json.loads(in_pool("update", "id:1", "--pace", given, "--json").out)
        assert list(row["pace"].values()) == pace
    assert json.loads(in_pool("update", "id:1", "--pace", "none", "--json").out)["pace"] is None
    assert "COUNT/SECONDS" in in_pool("update", "id:1", "--pace", "5").err
    in_pool("update", "id:1", "--pace", "1/60")
    leased = json.loads(in_pool("acquire", "--json").out)
    done = json.loads(in_pool("unblock", leased["handle"], "--outcome", "ok", "--uses", "2", "--json").out)
    assert done["state"] == "cooling"
    assert 100 < done["available_in"] <= 120


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[pools.openai]\npace = 5", "pace takes an object of count, seconds, burst"),
        ("[pools.openai]\npace = { count = 5 }", "seconds is a number from 0.001"),
        ("[pools.openai]\npace = { count = 5, seconds = 1, per = 2 }", "pace takes an object"),
        ("[pools.openai", "no TOML"),
        ("[pool.openai]", "pool is not known"),
        ("pools = 3", "pools is not a setting"),
        ("[pools]\nopenai = 3", "[pools.openai]"),
        ('[pools."a/b"]', "[pools.a/b]"),
        ('[pools.".."]', "[pools...]"),
        (
            "[pools.openai]\nblok_seconds = 3",
            "blok_seconds is not a setting of a pool; did you mean block_seconds",
        ),
        (
            '[pools.openai]\nblock_seconds = "60s"',
            "block_seconds takes a number from 0.001 to 86400, not '60s'",
        ),
        ("[pools.openai]\nblock_seconds = true", "block_seconds takes"),
        ("[pools.openai]\nblock_seconds = 0", "block_seconds takes"),
        ("[pools.openai]\nblock_seconds = nan", "block_seconds takes"),
        ('[pools.openai]\nblock_seconds = "never"', "block_seconds takes"),
        ("[pools.openai]\nkeepalive_seconds = -1", 'or "never"'),
        ("[pools.openai]\nmax_keys = 1.5", "max_keys takes a whole number"),
        ("[pools.openai]\nblock_seconds = 60\nmax_block_seconds = 30", "max_block_seconds takes no less"),
        ("[pools.default]\nblock_seconds = 30", "flags decide block_seconds"),
    ],
)
def test_a_typo_in_a_file_of_pools_changes_nothing(
    fake: FakeServer, command: Command, text: str, says: str
) -> None:
    """One line that names the file, the table and the key; the right tables before it are not applied either."""
    wrong = command("pools", "apply", "-", stdin=f"[pools.first]\n{text}")
    assert wrong.status == Status.USAGE
    assert says in wrong.err
    assert "standard input" in wrong.err
    assert wrong.err.count("\n") == 1
    assert wrong.out == ""
    assert not [method for method, _ in fake.requests if method != "GET"]


def test_what_the_server_refuses_names_the_table(fake: FakeServer, command: Command) -> None:
    with KeyPool(transport=fake, pool="openai") as pool:
        pool.import_key(SECRETS[0])
        with pool.lease():
            pool.delete_pool("openai", drain=True)
            wrong = command("pools", "apply", "-", stdin="[pools.openai]")
            assert (wrong.status, "[pools.openai]" in wrong.err) == (Status.FAILED, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pools", "apply"], "takes a file"),
        (["pools", "delete"], "name of a pool"),
        (["pools", "list", "openai"], "takes nothing"),
        (["pools", "--drain"], "pools delete"),
        (["pools", "delete", "openai", "--dry-run"], "pools apply"),
        (["pools", "delete", "openai", "--now"], "--drain"),
        (["pools", "delete", "a/b"], "pool's name"),
        (["pools", "drop"], "choose from"),
    ],
)
def test_wrong_usage_of_pools(fake: FakeServer, command: Command, words: list[str], says: str) -> None:
    wrong = command(*words)
    assert (wrong.status, wrong.err.count("\n")) == (Status.USAGE, 1)
    assert says in wrong.err
    assert not fake.requests


def test_rekey_is_waited_for(command: Command) -> None:
    from keypool.client import Rekeying

    steps = [
        Rekeying("running", 10, 5000, True),
        Rekeying("idle", 5000, 5000, True),
        Rekeying("failed", 10, 5000, True),
    ]
    with (
        mock.patch.object(KeyPool, "rekey", return_value=Rekeying("running", 0, 5000, True)),
        mock.patch.object(KeyPool, "rekeying", side_effect=steps),
        mock.patch.object(pools, "_POLL_SECONDS", 0.0),
    ):
        assert command("rekey").fields["state"] == "running"
        assert command("rekey", "--wait").fields["done"] == "5000"
        assert command("rekey", "--wait").status == Status.FAILED
    assert "secrets-key-required" in command("rekey").err


# ------------------------------------------------------------------------------------------------------------- run


def test_a_command_gets_the_data_of_its_key(fake: FakeServer, command: Command, tmp_path: Path) -> None:
    data = {"user": USER, "org-id": 7, "scopes": ["a", "b"], "ok": True}
    with KeyPool(transport=fake, pool="openai") as pool:
        pool.import_key(SECRETS[0], data=data)
    code = (
        "import json, os, sys; json.dump({n: v for n, v in os.environ.items() if n.startswith('KEYPOOL_')},"
        " open(sys.argv[1], 'w'))"
    )
    out = tmp_path / "environment"
    outer = {
        "KEYPOOL_TOKEN": "t-0123456789abcdef",
        "KEYPOOL_DATA_USER": "others",
        "KEYPOOL_DATA_OLD": "others",
    }
    words = ("run", "--pool", "openai", "--", sys.executable, "-c", code, str(out))
    ran = command(*words, **outer)
    assert (ran.status, ran.err) == (0, "")
    got = json.loads(out.read_text())
    assert got["KEYPOOL_KEY"] == SECRETS[0]
    assert {name: value for name, value in got.items() if name.startswith("KEYPOOL_DATA_")} == {
        "KEYPOOL_DATA_USER": USER,
        "KEYPOOL_DATA_ORG_ID": "7",
        "KEYPOOL_DATA_SCOPES": '["a", "b"]',
        "KEYPOOL_DATA_OK": "true",
    }
    assert got["KEYPOOL_POOL"] == "openai"
    assert "KEYPOOL_TOKEN" not in got


def test_names_of_data_that_fall_together_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.data_variables({"a-b": "1", "a_b": "2", "ü": "3"}) == {
        "KEYPOOL_DATA_A_B": "2",
        "KEYPOOL_DATA__": "3",
    }
    assert "KEYPOOL_DATA_A_B" in capsys.readouterr().err


def test_a_key_that_no_variable_can_hold_is_given_back(fake: FakeServer, command: Command) -> None:
    with KeyPool(transport=fake, pool="openai") as pool:
        pool.import_key("sk-\0-secret")
    ran = command("run", "--pool", "openai", "--", "true")
    assert ran.status == Status.RUN_FAILED
    assert "NUL" in ran.err
    assert fake.pool("openai").blocked == []
    assert os.environ.get("KEYPOOL_KEY") is None
