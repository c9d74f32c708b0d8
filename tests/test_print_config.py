"""`--print-config`: what is in force, from where, no secret in it, and good as a file for --config."""

from __future__ import annotations

import tomllib
from pathlib import Path

from support import ADMIN_TOKEN, CLIENT_TOKEN, run_server

from keypool.config.settings import OPTIONS


def test_it_shows_each_value_and_where_it_comes_from(tmp_path: Path) -> None:
    """Flag before variable before file before default; every setting has its line; exit status 0."""
    file = tmp_path / "keypool.toml"
    file.write_text('max_keys = 7\nlog_level = "error"\nport = 1\n')
    status, text = run_server(
        ["--print-config", f"--config={file}", "--port=0"], {"KEYPOOL_LOG_LEVEL": "debug"}
    )
    assert status == 0, text
    lines = {line.partition("=")[0].strip(" #"): line for line in text.splitlines()}
    assert [option.name for option in OPTIONS if option.name not in lines] == []
    for name, value, source in (
        ("port", "0", "--port"),
        ("log_level", '"debug"', "KEYPOOL_LOG_LEVEL"),
        ("max_keys", "7", f"config file {file}"),
        ("key_length", "20", "default"),
    ):
        _, _, rest = lines[name].partition("=")
        assert rest.split("#")[0].strip() == value, lines[name]
        assert rest.split("#")[1].strip() == source, lines[name]


def test_what_it_prints_is_a_config_file(tmp_path: Path) -> None:
    """Given to --config, it says the same again."""
    status, text = run_server(
        ["--print-config", "--block-seconds=2.5", '--data=a "b"#.db', "--log-format=json"]
    )
    assert status == 0, text
    file = tmp_path / "printed.toml"
    file.write_text(text)
    status, again = run_server(["--print-config", f"--config={file}"])
    assert status == 0, again
    assert tomllib.loads(again) == tomllib.loads(text)
    assert tomllib.loads(text)["data"] == 'a "b"#.db'


def test_it_shows_no_token(tmp_path: Path) -> None:
    """It counts them."""
    file = tmp_path / "token"
    file.write_text(CLIENT_TOKEN)
    env = {"KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN, "KEYPOOL_CLIENT_TOKEN_FILE": str(file)}
    status, text = run_server(["--print-config"], env)
    assert status == 0, text
    assert ADMIN_TOKEN not in text
    assert CLIENT_TOKEN not in text
    assert "tokens of the role admin: 1" in text


def test_a_wrong_setting_is_one_line_and_status_2_there_too() -> None:
    """It prints what would be in force, or what is wrong."""
    status, text = run_server(["--print-config", "--port=x"])
    assert status == 2, text
    assert len(text.splitlines()) == 1, text
    status, text = run_server(["--max-block-seconds=10", "--block-seconds=20"])
    assert status == 2, text
    assert text == "keypool: --max-block-seconds takes no less than block_seconds, which is 20, not 10\n"
