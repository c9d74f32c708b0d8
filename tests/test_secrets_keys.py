"""The secrets keys as a setting: how they are written, and that nothing shows one."""

from __future__ import annotations

import base64
import signal
from pathlib import Path

import pytest
from support import API, ServerProcess, run_server
from valkeys import new_pool, shared_valkey

from keypool.config.secrets_keys import read_secrets_keys
from keypool.config.settings import effective_settings, load
from keypool.core.errors import SettingsError

FIRST, SECOND = bytes(range(32)), bytes(range(100, 132))
ONE, TWO = (base64.b64encode(key).decode() for key in (FIRST, SECOND))
SHORT = base64.b64encode(FIRST[:31]).decode()


def refusal(**environ: str) -> str:
    """The line that refuses these variables."""
    with pytest.raises(SettingsError) as caught:
        load([], environ)
    line = str(caught.value)
    assert line.isprintable()
    for secret in (ONE, TWO, SHORT):
        assert secret[:12] not in line, "a key is shown"
    return line


def test_the_first_of_them_comes_first_wherever_they_stand(tmp_path: Path) -> None:
    """By commas, in a file also by line breaks; a repeated one counts once."""
    file = tmp_path / "keys"
    for text in (f"{ONE},{TWO}", f" {ONE} , {TWO},", f"{ONE},{TWO},{ONE}"):
        file.write_text(text)
        assert load([], {"KEYPOOL_SECRETS_KEY": text}).secrets_keys == (FIRST, SECOND)
        assert load([], {"KEYPOOL_SECRETS_KEY_FILE": str(file)}).secrets_keys == (FIRST, SECOND)
    file.write_text(f"{ONE}\r\n\n{TWO}\n")
    settings = load([], {"KEYPOOL_SECRETS_KEY_FILE": str(file)})
    assert settings.secrets_keys == (FIRST, SECOND)
    assert settings.origins["secrets_keys"] == "environment"


def test_there_are_none_unless_somebody_says_so() -> None:
    """Empty variables are as if not set; they have no part in whether a server is open."""
    settings = load([], {"KEYPOOL_SECRETS_KEY": "", "KEYPOOL_SECRETS_KEY_FILE": ""})
    assert (settings.secrets_keys, settings.origins["secrets_keys"]) == ((), "default")
    assert load([], {"KEYPOOL_SECRETS_KEY": ONE}).open


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (SHORT, "key 1 has 31 bytes"),
        (f"{ONE},{base64.b64encode(bytes(33)).decode()}", "key 2 has 33 bytes"),
        (ONE[:-1], "key 1 is not base64"),
        (f"{ONE},not base64 at all!", "key 2 is not base64"),
        (ONE.replace("A", "-"), "key 1 is not base64"),
        ("é" * 44, "key 1 is not base64"),
        (" , ", "has none"),
    ],
)
def test_a_malformed_one_is_named_by_its_number(text: str, why: str, tmp_path: Path) -> None:
    """With what would be right, and never shown."""
    takes = "takes base64 of 32 bytes (openssl rand -base64 32), several separated by commas, but"
    assert refusal(KEYPOOL_SECRETS_KEY=text) == f"KEYPOOL_SECRETS_KEY {takes} {why}"
    file = tmp_path / "keys"
    file.write_text(text)
    line = refusal(KEYPOOL_SECRETS_KEY_FILE=str(file))
    assert line == f"KEYPOOL_SECRETS_KEY_FILE ({file}) {takes} {why}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has none"),
        (b"\n", "has none"),
        (b"\xff" * 32, "is not text in UTF-8"),
    ],
)
def test_a_file_that_holds_none_is_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    """A key that failed to arrive must not leave the pool in clear. Nor is a file of 32 bytes one."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    line = refusal(KEYPOOL_SECRETS_KEY_FILE=str(file))
    assert line.startswith("KEYPOOL_SECRETS_KEY_FILE")
    assert str(file) in line
    assert line.endswith(why)


def test_variable_and_file_are_not_both_set(tmp_path: Path) -> None:
    line = refusal(KEYPOOL_SECRETS_KEY=ONE, KEYPOOL_SECRETS_KEY_FILE=str(tmp_path / "keys"))
    assert (
        line
        == "KEYPOOL_SECRETS_KEY and KEYPOOL_SECRETS_KEY_FILE are both set: the keys come from one of them"
    )


def test_it_is_no_flag_and_no_toml_key(tmp_path: Path) -> None:
    """Everybody on the machine can see a command line."""
    with pytest.raises(SettingsError, match="unknown flag '--secrets-key'") as caught:
        load([f"--secrets-key={ONE}"], {})
    assert ONE not in str(caught.value)
    config = tmp_path / "keypool.toml"
    config.write_text(f"secrets_keys = ['{ONE}']")
    with pytest.raises(SettingsError, match=r"'secrets_keys' in .* is not a setting"):
        load([f"--config={config}"], {})


def test_nothing_shows_them() -> None:
    """Neither the repr of the settings nor --print-config, which counts them."""
    settings = load([], {"KEYPOOL_SECRETS_KEY": f"{ONE},{TWO}"})
    printed = effective_settings(settings)
    assert "# secrets keys: 2 from KEYPOOL_SECRETS_KEY or KEYPOOL_SECRETS_KEY_FILE, not shown" in printed
    assert "# secrets keys: none from" in effective_settings(load([], {}))
    for text in (repr(settings), printed):
        assert ONE not in text
        assert repr(FIRST) not in text
        assert FIRST.hex() not in text


def test_a_malformed_one_ends_the_start_with_status_2() -> None:
    status, text = run_server(["--port=0"], {"KEYPOOL_SECRETS_KEY": SHORT})
    assert (status, len(text.splitlines())) == (2, 1), text
    assert "key 1 has 31 bytes" in text


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    """As files of tokens are; and a misspelled variable."""
    pytest.importorskip("cryptography")
    file = tmp_path / "keys"
    file.write_text(ONE)
    file.chmod(0o644)
    env = {"KEYPOOL_SECRETS_KEY_FILE": str(file), "KEYPOOL_SECRET_KEY": "x"}
    with ServerProcess(["--port=0", "--data=:memory:"], cwd=tmp_path, env=env) as server:
        assert f"KEYPOOL_SECRETS_KEY_FILE: others than its owner can read {file} (mode 0644)" in server.log
        assert (
            "KEYPOOL_SECRET_KEY is not a variable of keypool; did you mean KEYPOOL_SECRETS_KEY?" in server.log
        )


@pytest.mark.parametrize("engine", ["embedded", "valkey"])
def test_a_server_encrypts_under_them(engine: str, tmp_path: Path) -> None:
    """Whatever its engine is: the text of a key is in no file, and a server without them doesn't start on it."""
    pytest.importorskip("cryptography")
    secret = "sk-live-0123456789abcdefghijkl"
    if engine == "embedded":
        flags = [f"--data={tmp_path / 'keypool.db'}", "--port=0"]
    else:
        flags = [f"--engine={new_pool(shared_valkey())}", "--port=0"]
    with ServerProcess(flags, cwd=tmp_path, env={"KEYPOOL_SECRETS_KEY": f"{ONE},{TWO}"}) as server:
        client = server.client()
        client.post(f"{API}/keys", json={"secret": secret, "expire": True}).expect(201)
        assert client.acquire()["key"] == secret
        server.hang_up()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    for environ in ({}, {"KEYPOOL_SECRETS_KEY": TWO}):
        status, text = run_server(flags, environ)
        assert status == 1, text
        assert "Traceback" not in text
        assert "secrets key" in text.lower() or "KEYPOOL_SECRETS_KEY" in text


def test_other_programs_read_them_by_themselves() -> None:
    """As `keypool backup` and `keypool migrate` do, which take no settings of a server."""
    assert read_secrets_keys({"KEYPOOL_SECRETS_KEY": TWO}) == (SECOND,)
    assert read_secrets_keys({}) == ()
