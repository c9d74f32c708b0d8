"""What the processes that keypool starts can read of its secrets: those in their environment."""

from __future__ import annotations

import base64
import os
import signal
from pathlib import Path

from client_support import started
from crash import children_of
from support import ADMIN_TOKEN, CLIENT_TOKEN, VIEWER_TOKEN, ServerProcess, eventually

from keypool.client import KeyPool
from keypool.environment import without_secrets

SECRETS_KEY = base64.b64encode(bytes(range(32))).decode()
SECRET = {
    "KEYPOOL_TOKEN": CLIENT_TOKEN,
    "KEYPOOL_TOKEN_FILE": "/etc/keypool/token",
    "KEYPOOL_TOKENS": "/etc/keypool/tokens.toml",
    "KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN,
    "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN,
    "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
    "KEYPOOL_CLIENT_TOKEN_FILE": "/etc/keypool/client",
    "KEYPOOL_VIEWER_TOKEN_FILE": "/etc/keypool/viewer",
    "KEYPOOL_ADMIN_TOKEN_FILE": "/etc/keypool/admin",
    "KEYPOOL_SECRETS_KEY": SECRETS_KEY,
    "KEYPOOL_SECRETS_KEY_FILE": "/etc/keypool/secrets-key",
    "KEYPOOL_ENGINE": "valkey://user:password@10.0.0.1:6379/0",
}
PLAIN = {
    "PATH": "/bin",
    "KEYPOOL_URL": "http://127.0.0.1:8888",
    "KEYPOOL_POOL": "openai",
    "KEYPOOL_DATA_TOKEN_URL": "x",
    "MY_TOKEN": "mine",
}


def test_tokens_secrets_keys_and_their_files_are_left_out() -> None:
    """And a URL with a password; all else is inherited, other programs' tokens too."""
    assert without_secrets(SECRET | PLAIN) == PLAIN
    plain_url = {"KEYPOOL_ENGINE": "valkey://10.0.0.1:6379/0"}
    assert without_secrets(plain_url) == plain_url


def environment_of(pid: int) -> dict[str, str]:
    """The variables of a process, as everybody who may read them finds them."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(each.split("=", 1) for each in text.split("\0") if each)


def test_the_command_of_run_inherits_no_secret(guarded_server: ServerProcess, tmp_path: Path) -> None:
    """Neither in its own environment nor in its children's; the key is there, and what isn't secret."""
    with KeyPool(f"http://{guarded_server.host}", ADMIN_TOKEN) as pool:
        made = pool.generate()
    token = tmp_path / "token"
    token.write_text(CLIENT_TOKEN)
    words = ["-m", "keypool", f"--token-file={token}", "run", "--", "sh", "-c", "sleep 60 & wait"]
    env = SECRET | {"KEYPOOL_POOL_NOTE": "kept"}
    with started(guarded_server, words, more=env) as run:
        shell = eventually(lambda: children_of(run.pid), "the command")[0]
        sleep = eventually(lambda: children_of(shell), "its child")[0]
        for pid in (shell, sleep):
            found = environment_of(pid)
            assert found["KEYPOOL_KEY"] == made.secret
            assert found["KEYPOOL_POOL_NOTE"] == "kept"
            assert not found.keys() & SECRET.keys()
            text = " ".join(found.values())
            for secret in (CLIENT_TOKEN, VIEWER_TOKEN, ADMIN_TOKEN, SECRETS_KEY, "password"):
                assert secret not in text
        os.kill(run.pid, signal.SIGTERM)
        run.wait(30)
