"""Settings: every rule of every source, and the error message for each violation.

What holds for all settings is tested for each of them, by its kind of value, so that a new field is covered
as it is written. A new kind has to say here which of its values are right and which are wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import keypool
from keypool.config.proxies import is_loopback
from keypool.config.setting_types import (
    Address,
    Choice,
    DataFile,
    EngineName,
    File,
    Percent,
    Proxies,
    Seconds,
    Text,
    Whole,
)
from keypool.config.settings import OPTIONS, Option, Settings, load, settings_table
from keypool.config.tokens import exposed_files
from keypool.core.errors import SettingsError, StartError
from keypool.core.rules import DEFAULT_RULES, NOT_FLAGS
from keypool.server import launch

TOKEN, OTHER = "client-token-0123456789", "viewer-token-0123456789"
TABLE = f"[tokens.alice]\nrole = 'client'\ndigest = '{'0' * 64}'\n"
BY_NAME = {option.name: option for option in OPTIONS}
IN_TOML = [option for option in OPTIONS if option.name != "config"]


def refusal(*argv: str, **environ: str) -> str:
    """The error message for these flags and variables."""
    with pytest.raises(SettingsError) as caught:
        load(argv, environ)
    line = str(caught.value)
    assert line.isprintable(), f"more than one line, or not readable: {line!r}"
    return line


def toml(directory: Path, text: str | bytes) -> str:
    path = directory / "keypool.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def spelled(value: object) -> str:
    """A value as TOML writes it."""
    return json.dumps(value)


def right_values(option: Option, directory: Path) -> list[object]:  # noqa: C901 - flat
    """Three valid values of the setting, different if it has as many."""
    match option.kind:
        case Choice(words=words):
            return [words[i % len(words)] for i in range(3)]
        case Whole(low=low, high=high):
            return [low, low + 1, high]
        case Seconds(low=low, high=high):
            return [low, low + 0.5, high]
        case Percent():
            return [0.0, 12.5, 100.0]
        case Address():
            return ["127.0.0.2", "::1", "localhost"]
        case Proxies():
            return ["none", "127.0.0.1", "10.0.0.0/8, fd00::/8,192.0.2.7"]
        case File():
            paths = [directory / f"{i}.toml" for i in range(3)]
            for path in paths:
                path.write_text(TABLE if option.name == "tokens" else "")
            return [str(path) for path in paths]
        case DataFile():
            return [str(directory / f"{i}.db") for i in range(3)]
        case EngineName():
            return [
                "embedded",
                "valkey://10.0.0.1:6379,10.0.0.2:6379/2",
                "valkeys+cluster://user:p%40ss@a:1,[::1]:2?pool=keys",
            ]
        case kind:
            pytest.fail(f"which values does {type(kind).__name__} take? Say so in right_values")


def wrong_texts(kind: Text) -> list[str]:
    """Invalid texts of a flag or a variable."""
    match kind:
        case Choice(words=words):
            return ["", "x", words[0].upper() + "!", words[0] + " "]
        case Whole(low=low, high=high):
            return [
                str(low - 1),
                str(high + 1),
                "",
                "x",
                "1.0",
                "1e3",
                "nan",
                "inf",
                " 20",
                "20 ",
                "\uff12\uff10",
                "0x14",
                "9" * 5000,
            ]
        case Seconds(low=low, high=high):
            return [
                *(["0"] if low > 0 else []),
                "-1",
                "-0.5",
                str(high + 1),
                "",
                "x",
                "nan",
                "inf",
                "-inf",
                " 1",
                "1\n",
                "\uff11",
                "1e999",
                "1s",
            ]
        case Percent():
            return ["-1", "-0.001", "100.001", "101", "", "x", "50%", "nan", "inf", " 1", "1\n", "\uff11"]
        case Address():
            return [
                "",
                " ",
                "[::1]",
                "127.0.0.1:80",
                "300.0.0.1",
                "127.1",
                "a b",
                "http://localhost",
                "-a",
                "a" * 64,
                "é.example",
            ]
        case Proxies():
            return [
                "",
                " ",
                "None",
                "localhost",
                "10.0.0.1/8",
                "10.0.0.0/33",
                "10.0.0.1:80",
                "[::1]",
                "127.0.0.1,",
                "127.0.0.1,none",
                "127.0.0.1;127.0.0.2",
            ]
        case File():
            return ["", ".", "does-not-exist.toml", "a\nb.toml"]
        case DataFile():
            return ["", "\0", "a\nb"]
        case EngineName():
            return [
                "",
                "embedded ",
                "redis://127.0.0.1:6379",
                "valkey://",
                "valkey://a:70000",
                "valkey+cluster://a:1/2",
                "valkey://a?pool={x}",
                "valkey://a/0\n",
            ]
        case _:
            pytest.fail(f"which texts does {type(kind).__name__} refuse? Say so in wrong_texts")


def wrong_toml(kind: Text) -> list[str]:
    """Invalid values in a TOML file, as written after the equals sign."""
    everywhere = ["true", "[]", "{}", "1979-05-27", "'\\n'"]
    match kind:
        case Whole(low=low, high=high):
            return [
                *everywhere,
                str(low - 1),
                str(high + 1),
                f"{low}.0",
                f'"{low}"',
                "nan",
                "0x" + "f" * 5000,
            ]
        case Seconds(low=low, high=high):
            outside = ["-1", f"{high + 1:.15g}", *(["0", "0.0"] if low > 0 else [])]
            return [*everywhere, *outside, "nan", "inf", "-inf", '"1.0"', "0x" + "f" * 5000]
        case Percent():
            return [*everywhere, "-1", "-0.1", "100.1", "101", "nan", "inf", '"50"', '"50%"']
        case DataFile():
            return ["true", "[]", "{}", "1979-05-27", "1", "1.5", "''", '"\\n"']
        case File():
            return ["true", "[]", "{}", "1979-05-27", "1", "1.5", "''"]
        case _:
            return [*everywhere, "1", "1.5", "''"]


def each(options: list[Option] | tuple[Option, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("option", options, ids=lambda option: option.name)


# What holds for every setting


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load([], {})
    assert settings == Settings()
    assert (settings.address, settings.port) == ("127.0.0.1", 8888)
    assert (settings.data, settings.engine) == ("data/keypool.db", "embedded")
    assert (settings.block_seconds, settings.keepalive_seconds, settings.drain_seconds) == (60.0, 300.0, 10.0)
    assert (settings.key_length, settings.max_keys, settings.max_waiters) == (20, 1_000_000, 10_000)
    assert settings.restart_grace == 0.0
    assert (settings.cooldown_seconds, settings.max_cooldown_seconds) == (60.0, 3600.0)
    assert (settings.max_retry_after_seconds, settings.forget_seconds) == (604_800.0, 3600.0)
    assert (settings.error_threshold, settings.max_quarantined_percent) == (3, 50.0)
    assert (settings.rest_seconds, settings.max_block_seconds) == (0.0, None)
    assert (settings.log_level, settings.log_format, settings.config) == ("info", "text", None)
    assert settings.client_tokens == settings.viewer_tokens == settings.admin_tokens == ()


def test_every_field_is_an_option_or_tokens_or_the_origins() -> None:
    rest = {field.name for field in fields(Settings)} - BY_NAME.keys()
    tokens = {"client_tokens", "viewer_tokens", "admin_tokens", "named_tokens"}
    assert rest == tokens | {"secrets_keys", "origins"}


@each(OPTIONS)
def test_default_is_a_value_that_the_setting_takes(option: Option) -> None:
    if option.default is not None:
        assert option.kind.typed(option.name, option.default) == option.default
        assert option.kind.spelled(option.name, option.default_text) == option.default


BESIDE = {
    "processes": {"KEYPOOL_ENGINE": "valkey://127.0.0.1:6379/0"},
    "max_block_seconds": {"KEYPOOL_BLOCK_SECONDS": "0.001"},
}
"""Variables without which a setting takes its default only."""


@each(OPTIONS)
def test_flag_beats_variable_beats_toml_beats_default(option: Option, tmp_path: Path) -> None:
    needed = BESIDE.get(option.name, {})
    flag_value, variable_value, toml_value = right_values(option, tmp_path)
    argv, environ = [f"{option.flag}={flag_value}"], {option.variable: str(variable_value)}
    if option in IN_TOML:
        config = toml(tmp_path, f"{option.name} = {spelled(toml_value)}")
        beside = needed | {"KEYPOOL_CONFIG": config}
        settings = load([], beside)
        assert (getattr(settings, option.name), settings.origins[option.name]) == (toml_value, "toml")
    else:
        beside = needed
    settings = load([], beside | environ)
    assert (getattr(settings, option.name), settings.origins[option.name]) == (variable_value, "environment")
    settings = load(argv, beside | environ)
    assert (getattr(settings, option.name), settings.origins[option.name]) == (flag_value, "flag")
    settings = load([], {})
    assert (getattr(settings, option.name), settings.origins[option.name]) == (option.default, "default")


@each(OPTIONS)
def test_value_has_the_type_of_its_field_from_every_source(option: Option, tmp_path: Path) -> None:
    needed = BESIDE.get(option.name, {})
    for value in right_values(option, tmp_path):
        assert type(getattr(load([option.flag, str(value)], needed), option.name)) is type(value)
        assert type(getattr(load([], needed | {option.variable: str(value)}), option.name)) is type(value)
        if option in IN_TOML:
            config = toml(tmp_path, f"{option.name} = {spelled(value)}")
            assert type(getattr(load(["--config", config], needed), option.name)) is type(value)


@each(OPTIONS)
def test_wrong_flag_value_is_named_with_what_it_takes(option: Option) -> None:
    for text in wrong_texts(option.kind):
        for line in (refusal(f"{option.flag}={text}"), refusal(option.flag, text)):
            assert line.startswith(f"{option.flag} takes {option.kind.takes}, ")
            assert text[:50] in line or repr(text)[1:-1][:50] in line


@each(OPTIONS)
def test_wrong_variable_is_named_with_what_it_takes(option: Option) -> None:
    for text in wrong_texts(option.kind):
        line = refusal(**{option.variable: text})
        assert line.startswith(f"{option.variable} takes {option.kind.takes}, ")
        assert text[:50] in line or repr(text)[1:-1][:50] in line


@each(IN_TOML)
def test_wrong_toml_value_is_named_with_its_file_and_what_it_takes(option: Option, tmp_path: Path) -> None:
    for value in wrong_toml(option.kind):
        config = toml(tmp_path, f"{option.name} = {value}")
        assert refusal("--config", config).startswith(
            f"{option.name} in {config} takes {option.kind.takes}, not "
        )


@each(OPTIONS)
def test_wrong_value_is_refused_though_another_source_overrides_it(option: Option, tmp_path: Path) -> None:
    flag = f"{option.flag}={right_values(option, tmp_path)[0]}"
    if option in IN_TOML:
        assert option.name in refusal(flag, KEYPOOL_CONFIG=toml(tmp_path, f"{option.name} = []"))
        assert option.variable in refusal(flag, **{option.variable: ""})
    assert refusal(f"{option.flag}=", flag).startswith(option.flag)


@each(IN_TOML)
def test_settings_made_in_code_are_held_to_the_same_rules(option: Option) -> None:
    wrong: Any = {option.name: []}
    with pytest.raises(SettingsError, match=f"^{option.name} takes "):
        Settings(**wrong)


# Flags


def test_flags_take_their_value_behind_a_space_or_an_equals_sign() -> None:
    settings = load(["--port", "1", "--log-level=debug", "--block-seconds", "0.25"], {})
    assert (settings.port, settings.log_level, settings.block_seconds) == (1, "debug", 0.25)


def test_the_last_of_two_equal_flags_counts() -> None:
    assert load(["--port=1", "--port=2"], {}).port == 2


def test_underscores_between_digits_are_fine_as_in_toml() -> None:
    assert load(["--max-keys=2_000_000"], {}).max_keys == 2_000_000


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_flag_without_a_value_says_what_it_takes(option: Option) -> None:
    assert refusal(option.flag) == f"{option.flag} takes {option.kind.takes}, but no value follows it"


@pytest.mark.parametrize("word", ["--prot", "--por", "-p", "--", "--block_seconds", "--Port", "-"])
def test_unknown_or_shortened_flag_is_named_with_the_flags_there_are(word: str) -> None:
    line = refusal(word)
    assert line.startswith(f"unknown flag '{word}'; the flags are --address, --port, ")
    assert all(option.flag in line for option in OPTIONS)


def test_value_of_an_unknown_flag_is_not_shown_as_it_may_be_a_token() -> None:
    line = refusal(f"--admin-token={TOKEN}")
    assert "'--admin-token'" in line
    assert TOKEN not in line


@pytest.mark.parametrize("word", ["8888", "", "test", "port=1", "a\nb"])
def test_a_word_that_is_not_a_flag_is_refused(word: str) -> None:
    line = refusal(word)
    assert repr(word) in line
    assert all(option.flag in line for option in OPTIONS)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--version"], {})
    assert (caught.value.code, capsys.readouterr()) == (0, (f"keypool {keypool.__version__}\n", ""))


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--port=1", "--help"]])
def test_help_lists_every_flag_with_what_it_takes(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(argv, {})
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    text = " ".join(printed.split())
    for option in OPTIONS:
        assert f"{option.flag}=..." in text
        assert f"Takes {option.kind.takes}. Default: {option.default_text}." in text


# Settings that depend on another


@pytest.mark.parametrize("source", ["flag", "environment", "toml"])
def test_the_longest_block_is_not_shorter_than_a_block(source: str, tmp_path: Path) -> None:
    """Whichever of the two is wrong, the line names both and what would be right."""
    config = toml(tmp_path, "max_block_seconds = 59.5")
    argv, environ, named = {
        "flag": (["--max-block-seconds=59.5"], {}, "--max-block-seconds"),
        "environment": ([], {"KEYPOOL_MAX_BLOCK_SECONDS": "59.5"}, "KEYPOOL_MAX_BLOCK_SECONDS"),
        "toml": (["--config", config], {}, f"max_block_seconds in {config}"),
    }[source]
    assert refusal(*argv, **environ) == f"{named} takes no less than block_seconds, which is 60, not 59.5"
    assert refusal("--block-seconds=86400", *argv, **environ).endswith("which is 86400, not 59.5")
    assert load(["--block-seconds=59.5", *argv], environ).max_block_seconds == 59.5


def test_without_a_longest_block_a_lease_lasts_as_long_as_a_block() -> None:
    assert load([], {}).rules.longest_block == 60
    assert load(["--block-seconds=20"], {}).rules.longest_block == 20
    assert load(["--block-seconds=20", "--max-block-seconds=3600"], {}).rules.longest_block == 3600


def test_every_setting_of_the_pool_reaches_its_rules() -> None:
    given = {
        "block_seconds": 61.0,
        "keepalive_seconds": 301.0,
        "key_length": 21,
        "max_keys": 7,
        "max_waiters": 8,
        "restart_grace": 9.0,
        "cooldown_seconds": 10.0,
        "max_cooldown_seconds": 11.0,
        "max_retry_after_seconds": 12.0,
        "error_threshold": 13,
        "forget_seconds": 14.0,
        "max_quarantined_percent": 15.0,
        "rest_seconds": 16.0,
        "max_block_seconds": 617.0,
    }
    rules = asdict(load([f"{BY_NAME[name].flag}={value}" for name, value in given.items()], {}).rules)
    assert rules == given | {name: getattr(DEFAULT_RULES, name) for name in NOT_FLAGS}


def test_large_numbers_are_written_out() -> None:
    """Not as 3.16224e+07, in errors as in the printed settings."""
    assert refusal("--forget-seconds=1e9") == (
        "--forget-seconds takes a number of seconds from 0 to 31622400, fractions allowed, not '1e9'"
    )
    assert BY_NAME["forget_seconds"].text(1_234_567.25) == "1234567.25"


# Environment


def test_unknown_keypool_variables_are_left_alone() -> None:
    assert (
        load([], {"KEYPOOL_VENV": "x", "KEYPOOL_PROT": "1", "KEYPOOL_ORIGINS": "x", "PORT": "1"})
        == Settings()
    )


# TOML


def test_toml_takes_a_whole_number_for_seconds(tmp_path: Path) -> None:
    settings = load(["--config", toml(tmp_path, "block_seconds = 5")], {})
    assert isinstance(settings.block_seconds, float)
    assert settings.block_seconds == 5.0


def test_config_flag_beats_config_variable(tmp_path: Path) -> None:
    config = toml(tmp_path, "port = 1")
    settings = load(["--config", config], {"KEYPOOL_CONFIG": "does-not-exist.toml"})
    assert (settings.port, settings.config, settings.origins["config"]) == (1, config, "flag")


@pytest.mark.parametrize(
    "key", ["prot", "block-seconds", "config", "client_tokens", "origins", "open", '"a\\nb"', "'é'"]
)
def test_unknown_toml_key_is_named_with_the_keys_there_are(key: str, tmp_path: Path) -> None:
    config = toml(tmp_path, f"port = 1\n{key} = 'x'")
    line = refusal("--config", config)
    assert key.strip("'\"") in line
    assert f" in {config} is not a setting; the keys are address, port, " in line
    assert all(option.name in line for option in IN_TOML)


def test_toml_tables_are_no_settings(tmp_path: Path) -> None:
    assert "'keypool' in " in refusal("--config", toml(tmp_path, "[keypool]\nport = 1"))


@pytest.mark.parametrize("source", ["--config", "KEYPOOL_CONFIG"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"port = ", "is not valid TOML: Invalid value (at end of document)"),
        (b"port = 1\nport = 2", "is not valid TOML: Cannot overwrite a value"),
        (b"port = 1 x\n", "is not valid TOML: Expected newline or end of document"),
        (b"\xff = 1", "is not text in UTF-8"),
        (b"port = " + b"[" * 5000, "is not valid TOML: "),
        (b"port = " + b"9" * 5000, "is not valid TOML: "),
        (b"\x00", "is not valid TOML: "),
    ],
    ids=["half", "twice", "more", "bytes", "deep", "long", "nul"],
)
def test_broken_toml_file_is_named_with_what_is_wrong_in_it(
    source: str, content: bytes, why: str, tmp_path: Path
) -> None:
    config = toml(tmp_path, content)
    line = refusal("--config", config) if source == "--config" else refusal(KEYPOOL_CONFIG=config)
    assert line.startswith(f"{source} takes the path of a TOML file, but {config} {why}")


@pytest.mark.parametrize("source", ["--config", "KEYPOOL_CONFIG"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.toml", "cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("a" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be the name of a file"),
        ("a\ud800b", "cannot be the name of a file"),
    ],
    ids=["missing", "directory", "long", "nul", "surrogate"],
)
def test_file_that_cannot_be_read_is_named_with_the_reason(
    source: str, name: str, why: str, tmp_path: Path
) -> None:
    config = f"{tmp_path}/{name}"
    line = refusal("--config", config) if source == "--config" else refusal(KEYPOOL_CONFIG=config)
    assert line.startswith(f"{source} takes the path of a TOML file, but ")
    assert line.endswith(why)


def test_empty_toml_file_sets_nothing(tmp_path: Path) -> None:
    config = toml(tmp_path, "# nothing\n")
    assert load(["--config", config], {}) == Settings(config=config)


# Tokens


@pytest.mark.parametrize("role", ["client", "viewer", "admin"])
def test_tokens_come_from_their_variable_or_from_their_file(role: str, tmp_path: Path) -> None:
    variable, file = f"KEYPOOL_{role.upper()}_TOKEN", tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{OTHER}\r\n\n")
    from_variable = load([], {variable: f"{TOKEN}, {OTHER},"})
    from_file = load([], {f"{variable}_FILE": str(file)})
    for settings in (from_variable, from_file):
        assert getattr(settings, f"{role}_tokens") == (TOKEN, OTHER)
        assert settings.origins[f"{role}_tokens"] == "environment"
        assert not settings.open
    assert load([], {}).origins[f"{role}_tokens"] == "default"


def test_tokens_in_a_file_may_stand_between_commas_too(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN},{OTHER}")
    assert load([], {"KEYPOOL_ADMIN_TOKEN_FILE": str(tmp_path / "tokens")}).admin_tokens == (TOKEN, OTHER)


def test_token_given_twice_in_one_role_counts_once() -> None:
    assert load([], {"KEYPOOL_ADMIN_TOKEN": f"{TOKEN},{OTHER},{TOKEN}"}).admin_tokens == (TOKEN, OTHER)


def test_empty_token_variables_are_as_if_not_set(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    settings = load([], {"KEYPOOL_CLIENT_TOKEN": "", "KEYPOOL_ADMIN_TOKEN_FILE": ""})
    assert settings.open
    assert settings.origins["client_tokens"] == "default"
    environ = {"KEYPOOL_CLIENT_TOKEN": "", "KEYPOOL_CLIENT_TOKEN_FILE": str(tmp_path / "tokens")}
    assert load([], environ).client_tokens == (TOKEN,)


@pytest.mark.parametrize("content", ["", "\n\n", " , "])
def test_file_without_a_token_does_not_leave_the_server_open(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(content)
    line = refusal(KEYPOOL_CLIENT_TOKEN_FILE=f"{tmp_path}/tokens")
    assert line.startswith(f"KEYPOOL_CLIENT_TOKEN_FILE ({tmp_path}/tokens) takes tokens of at least 16 ")
    assert line.endswith("has none")


@pytest.mark.parametrize("text", [",", " ", " ,, "])
def test_variable_with_nothing_between_commas_does_not_leave_the_server_open(text: str) -> None:
    assert refusal(KEYPOOL_VIEWER_TOKEN=text).endswith("has none")


def test_token_has_sixteen_characters_at_least() -> None:
    assert load([], {"KEYPOOL_CLIENT_TOKEN": "a" * 16}).client_tokens == ("a" * 16,)
    assert refusal(KEYPOOL_CLIENT_TOKEN=f"{TOKEN},{'b' * 15}") == (
        "KEYPOOL_CLIENT_TOKEN takes tokens of at least 16 visible ASCII characters, separated by commas, "
        "but token 2 has 15"
    )


@pytest.mark.parametrize("character", [" ", "\t", "\n", "\0", "\x7f", "é", "\udcff", "\u3000"])
def test_token_has_visible_ascii_only_and_is_never_shown(character: str, tmp_path: Path) -> None:
    token = f"secret-secret{character}secret-secret"
    line = refusal(KEYPOOL_CLIENT_TOKEN=token)
    assert line.startswith("KEYPOOL_CLIENT_TOKEN takes tokens of at least 16 visible ASCII characters")
    assert line.endswith("token 1 has another character")
    assert "secret" not in line


def test_every_visible_ascii_character_but_the_comma_may_stand_in_a_token() -> None:
    token = "".join(map(chr, range(0x21, 0x7F))).replace(",", "")
    assert load([], {"KEYPOOL_CLIENT_TOKEN": token}).client_tokens == (token,)


def test_token_has_one_role_and_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{OTHER}\n{TOKEN}")
    line = refusal(KEYPOOL_CLIENT_TOKEN=TOKEN, KEYPOOL_ADMIN_TOKEN_FILE=f"{tmp_path}/tokens")
    assert line == (
        f"KEYPOOL_ADMIN_TOKEN_FILE ({tmp_path}/tokens): token 2 is a client token too; a token has one role"
    )


def test_variable_and_file_of_one_role_are_not_both_set(tmp_path: Path) -> None:
    line = refusal(KEYPOOL_VIEWER_TOKEN=TOKEN, KEYPOOL_VIEWER_TOKEN_FILE=f"{tmp_path}/tokens")
    assert line.startswith("KEYPOOL_VIEWER_TOKEN and KEYPOOL_VIEWER_TOKEN_FILE are both set")


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read: No such file or directory"), (b"\xff", "is not text in UTF-8")],
)
def test_token_file_that_cannot_be_read_is_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    line = refusal(KEYPOOL_CLIENT_TOKEN_FILE=str(file))
    assert line.startswith(
        "KEYPOOL_CLIENT_TOKEN_FILE takes the path of a file of tokens of at least 16 visible "
    )
    assert line.endswith(f"{file} {why}")


def test_tokens_are_no_flags_and_no_toml_keys(tmp_path: Path) -> None:
    assert "unknown flag '--client-tokens'" in refusal(f"--client-tokens={TOKEN}")
    assert "is not a setting" in refusal("--config", toml(tmp_path, f"client_tokens = ['{TOKEN}']"))


def test_repr_shows_no_token() -> None:
    settings = load([], {"KEYPOOL_CLIENT_TOKEN": TOKEN, "KEYPOOL_ADMIN_TOKEN": OTHER})
    assert TOKEN not in repr(settings)
    assert OTHER not in repr(settings)


# Open or not


LOOPBACK = ["127.0.0.1", "127.1.2.3", "127.255.255.255", "::1", "0:0:0:0:0:0:0:1", "localhost", "LocalHost"]
OTHERS = [
    "0.0.0.0",
    "::",
    "10.0.0.1",
    "128.0.0.1",
    "::2",
    "::ffff:127.0.0.1",
    "fe80::1%eth0",
    "keys.example",
    "localhost.example",
]


@pytest.mark.parametrize("address", LOOPBACK)
def test_open_server_may_listen_on_loopback(address: str) -> None:
    assert is_loopback(address)
    assert load([f"--address={address}"], {}).open


@pytest.mark.parametrize("address", OTHERS)
def test_open_server_may_not_listen_elsewhere_and_says_what_to_set(address: str, tmp_path: Path) -> None:
    assert not is_loopback(address)
    config = toml(tmp_path, f"address = '{address}'")
    lines = {
        "--address": refusal(f"--address={address}"),
        "KEYPOOL_ADDRESS": refusal(KEYPOOL_ADDRESS=address),
        f"address in {config}": refusal("--config", config),
    }
    for source, line in lines.items():
        assert line.startswith(
            f"{source} takes a loopback address (127.0.0.1, ::1, localhost) as long as there is no "
        )
        assert f"not '{address}': set one of " in line
        for role in ("CLIENT", "VIEWER", "ADMIN"):
            assert f"KEYPOOL_{role}_TOKEN" in line
    with pytest.raises(SettingsError, match=r"^address takes a loopback address"):
        Settings(address=address)


@pytest.mark.parametrize("role", ["CLIENT", "VIEWER", "ADMIN"])
def test_with_any_token_the_server_may_listen_anywhere(role: str) -> None:
    for address in OTHERS:
        settings = load([f"--address={address}"], {f"KEYPOOL_{role}_TOKEN": TOKEN})
        assert settings.address == address
        assert not settings.open


# As a whole


def test_settings_error_is_an_error_of_the_start() -> None:
    assert issubclass(SettingsError, StartError)


def test_settings_cannot_be_changed_and_travel_to_other_processes() -> None:
    settings = load(["--port=1"], {"KEYPOOL_CLIENT_TOKEN": TOKEN})
    with pytest.raises(FrozenInstanceError):
        settings.port = 2  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert copy.origins == settings.origins
    assert asdict(settings)["port"] == 1


def test_origins_name_every_other_field_and_take_no_part_in_comparison() -> None:
    settings = load(["--port=8888"], {})
    assert settings == Settings()
    assert settings.origins.keys() == {field.name for field in fields(Settings)} - {"origins"}
    assert [name for name, origin in settings.origins.items() if origin != "default"] == ["port"]


def test_docs_table_has_a_row_of_five_cells_for_every_setting_and_role() -> None:
    head, rule, *rows = settings_table().splitlines()
    assert rule == "| --- | --- | --- | --- | --- |"
    cells = [row.strip("| ").split(" | ") for row in (head, *rows)]
    assert {len(row) for row in cells} == {5}
    assert [row[0] for row in cells[1:]] == [f"`{option.flag}`" for option in OPTIONS] + ["none"] * 4
    assert [row[1] for row in cells[1:-4]] == [f"`{option.variable}`" for option in OPTIONS]
    assert all(f"`KEYPOOL_{role}_TOKEN_FILE`" in settings_table() for role in ("CLIENT", "VIEWER", "ADMIN"))


FLAGS = st.sampled_from([option.flag for option in OPTIONS] + ["--help", "--version", "-h"])
VALUES = st.one_of(
    st.text(), st.integers().map(str), st.floats().map(str), st.sampled_from(["info", "::1", "localhost"])
)
WORDS = st.one_of(st.text(), FLAGS, VALUES, st.builds("{}={}".format, FLAGS, VALUES))


def outcome(argv: list[str], environ: dict[str, str]) -> Settings | str | SystemExit:
    """The result of `load`: settings, an error message, or a clean exit."""
    try:
        return load(argv, environ)
    except SettingsError as error:
        return str(error)
    except SystemExit as stop:
        return stop


@given(st.lists(WORDS, max_size=6))
@example(["--config=/dev/null"])
def test_no_argv_gives_anything_but_settings_one_line_or_a_clean_exit(argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = outcome(argv, {})
    if isinstance(result, SystemExit):
        assert result.code == 0
        assert printed.getvalue().endswith("\n")
    else:
        assert isinstance(result, Settings) or result.isprintable()
        assert not printed.getvalue()


@given(
    st.dictionaries(
        st.sampled_from([option.variable for option in OPTIONS] + ["KEYPOOL_CLIENT_TOKEN"]), VALUES
    )
)
def test_no_environment_gives_anything_but_settings_or_one_line(environ: dict[str, str]) -> None:
    result = outcome([], environ)
    assert isinstance(result, Settings) or (isinstance(result, str) and result.isprintable())


@pytest.mark.parametrize(("mode", "can"), [(0o600, None), (0o640, "read"), (0o604, "read"), (0o666, "write")])
def test_a_token_file_that_others_can_open_is_worth_a_warning(
    tmp_path: Path, mode: int, can: str | None
) -> None:
    """A reader of the file gets the token; a writer of it controls the server."""
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    path.chmod(mode)
    lines = exposed_files({"KEYPOOL_ADMIN_TOKEN_FILE": str(path)})
    assert len(lines) == (can is not None)
    if can:
        assert f"others than its owner can {can} {path} (mode {mode:04o})" in lines[0]


def test_a_token_file_that_was_removed_meanwhile_is_not_worth_a_traceback(tmp_path: Path) -> None:
    """It was there when the tokens were read."""
    assert exposed_files({"KEYPOOL_ADMIN_TOKEN_FILE": str(tmp_path / "removed")}) == []


def test_a_server_without_an_admin_token_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """No caller can generate keys on such a server."""
    launch._warn(Settings(client_tokens=(TOKEN,)))
    assert "no admin token" in caplog.text
    caplog.clear()
    launch._warn(Settings())
    launch._warn(Settings(client_tokens=(TOKEN,), admin_tokens=(OTHER,)))
    assert not caplog.text
