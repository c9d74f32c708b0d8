"""No secret stands anywhere but in the answers that are asked for it: on a data file and over Valkey, encrypted.

Keys of all origins, their data, texts that were replaced, tokens and secrets keys are made and used, well and badly,
and looked for in all that a server writes, shows, stores and starts, before and after a crash, and during a rekey.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets as randomness
import socket
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from client_support import keypool
from crash import children_of
from durable_support import crash
from support import ADMIN_TOKEN, API, CLIENT_TOKEN, VIEWER_TOKEN, Answer, Client, ServerProcess, eventually
from valkeys import Valkey, with_pool
from viewing import Closed, Viewer

pytestmark = pytest.mark.thorough

NAMED_TOKEN = "named-admin-token-3b9f27c4"
OLD, NEW = (bytes([number, *range(100, 131)]) for number in (1, 2))
POOL = "openai"
OF_POOL = f"{API}/pools/{POOL}"
_CALLS_WITH_BODIES = (
    "/keys",
    "/batch",
    "/keys/acquire",
    "/keys/find",
    "/keys/id:1/replace",
    "/keys/id:1/extend",
)
_PIECE, _STEP = 12, 6  # a hint shows four and four characters


class Secrets:
    """What must not be found, in all the forms in which it might stand somewhere."""

    def __init__(self) -> None:
        self._forms: dict[bytes, str] = {}
        self.given = 0

    def add(self, secret: str | bytes) -> None:
        """One more: its pieces in clear, and all of it in hexadecimal digits and base64, whatever stands before it."""
        raw = secret.encode() if isinstance(secret, str) else secret
        self.given += 1
        name = f"secret {self.given}, {raw[:12]!r}…"
        for at in range(0, max(1, len(raw) - _PIECE + 1), _STEP):
            self._forms[raw[at : at + _PIECE]] = f"{name}, from byte {at} on"
        self._forms[raw.hex().encode()] = self._forms[raw.hex().upper().encode()] = f"{name}, as hex"
        for before in range(3):
            coded = base64.b64encode(bytes(before) + raw)[(0, 2, 3)[before] :].rstrip(b"=")[:-1]
            self._forms[coded] = self._forms[coded.translate(bytes.maketrans(b"+/", b"-_"))] = (
                f"{name}, as base64"
            )

    def make(self, kind: str) -> str:
        """A new one."""
        made = f"sk-{kind}-{randomness.token_hex(16)}"
        self.add(made)
        return made

    def found_in(self, content: bytes) -> set[str]:
        """Those that stand there."""
        return {name for form, name in self._forms.items() if form in content}

    def expect_none(self, content: bytes | str, where: str) -> None:
        """Fails if there is one."""
        found = self.found_in(content.encode() if isinstance(content, str) else content)
        assert not found, f"in {where}: {sorted(found)}"


def test_the_search_finds_what_it_should() -> None:
    """In clear, in part, and coded, at any place."""
    secrets = Secrets()
    secret = secrets.make("planted").encode()
    for before in (b"", b"a", b"ab", b"abc"):
        content = before + secret + b"behind"
        for form in (content, content[:-10], content.hex().encode(), content.hex().upper().encode()):
            assert secrets.found_in(form), form
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert secrets.found_in(encode(content)), (encode, before)
    assert secrets.found_in(secret[7:30])
    assert not secrets.found_in(secret[:4] + "…".encode() + secret[-4:])


# ------------------------------------------------------------------------------------------------- where keys are kept


class Store:
    """A data file of one's own, in the server's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flag = f"--data={folder / 'keypool.db'}"

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """All that is stored, by where it is."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()

    def close(self) -> None:
        """It is the test's folder."""


class ValkeyStore(Store):
    """A Valkey that writes all it can: a snapshot, a log of its changes, and each command as it was sent to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._kept = folder / "valkey"
        self._kept.mkdir()
        self._valkey = Valkey("--dir", str(self._kept), "--rdbcompression", "no", "--appendonly", "yes")
        self.flag = f"--engine={with_pool(self._valkey.url, 1)}"
        self._commands = bytearray()
        self._monitor = socket.create_connection(("127.0.0.1", self._valkey.port), 20)
        self._monitor.settimeout(None)
        self._monitor.sendall(b"MONITOR\r\n")
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._monitor.recv(1 << 16):
                self._commands += data

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Files, values and commands."""
        mark = randomness.token_hex(16)
        self._valkey.ask("ECHO", mark)
        eventually(lambda: mark.encode() in self._commands, "all commands were noted")
        yield "the commands", bytes(self._commands)
        with self._valkey.commands() as commands:
            assert commands.ask("SAVE") == b"OK"
            cursor, names = commands.ask("SCAN", 0, "COUNT", 100_000)
            assert cursor == b"0"
            assert len(names) > 3
            for name in names:
                yield "a name", name
                yield repr(name), commands.ask_bytes("DUMP", name) or b""
        assert (self._kept / "dump.rdb").exists()
        yield from super().contents()

    def close(self) -> None:
        """End Valkey."""
        self._monitor.close()
        self._valkey.close()


@pytest.fixture(params=["data file", "data file, tornado", "valkey"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each place in turn."""
    made = Place(ValkeyStore(tmp_path) if request.param == "valkey" else Store(tmp_path))
    made.flags += ["--http=tornado"] * request.param.endswith("tornado")
    try:
        yield made
    finally:
        for server in made.servers:
            server.close()
        made.store.close()


# ---------------------------------------------------------------------------------------------------------- the server


class Place:
    """A place for keys, and server after server on it. Every answer, but to who may see secrets, is searched."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.secrets = Secrets()
        self.servers: list[ServerProcess] = []
        tokens = store.folder / "tokens.toml"
        digest = sha256(NAMED_TOKEN.encode()).hexdigest()
        tokens.write_text(f'[tokens.ops]\nrole = "admin"\ndigest = "{digest}"\n')
        tokens.chmod(0o600)
        self.flags = [
            store.flag,
            "--port=0",
            "--log-level=debug",
            f"--tokens={tokens}",
            "--keepalive-seconds=3600",
        ]
        for secret in (CLIENT_TOKEN, VIEWER_TOKEN, ADMIN_TOKEN, NAMED_TOKEN, OLD, NEW):
            self.secrets.add(secret)
        for key in (OLD, NEW):
            self.secrets.add(base64.b64encode(key))

    def start(self, *keys: bytes) -> ServerProcess:
        """A new interpreter, whose environment is its own."""
        env = {
            "KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN,
            "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN,
            "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
            "KEYPOOL_SECRETS_KEY": ",".join(base64.b64encode(key).decode() for key in keys),
        }
        server = ServerProcess(self.flags, cwd=self.store.folder, env=env, forked=False)
        self.servers.append(server)
        return server

    def search(self, server: ServerProcess) -> None:
        """What is stored and logged, and what the processes show."""
        for where, content in self.store.contents():
            self.secrets.expect_none(content, where)
        for each in self.servers:
            self.secrets.expect_none(each.log, "the log")
        if server.running:
            self.secrets.expect_none(Path(f"/proc/{server.pid}/cmdline").read_bytes(), "the command line")
            for child in children_of(server.pid):
                for name in ("environ", "cmdline"):
                    content = Path(f"/proc/{child}/{name}").read_bytes()
                    assert content
                    self.secrets.expect_none(content, f"{name} of {child}")

    def look(self, server: ServerProcess) -> None:
        """Everything that a viewer can read, and an admin without a reveal."""
        for token in (VIEWER_TOKEN, ADMIN_TOKEN):
            client = server.client(token)
            cookie = client.sign_in(token)
            pages = ["/", "/pools", "/system", "/calls", "/metrics", "/login", "/healthz", "/readyz"]
            reads = [API + "/pools", API + "/rekey", API + "/openapi.json"]
            for of_api, of_page in ((API, ""), (OF_POOL, f"/pools/{POOL}")):
                ids = [row["id"] for row in client.get(of_api + "/keys?limit=500").expect(200)["keys"]]
                assert ids
                pages += [of_page or "/", *(f"{of_page}/{name}" for name in ("keys", "events", "figures"))]
                pages += [
                    f"{of_page}/keys?{query}" for query in ("name=acct", "order=release", "state=blocked")
                ]
                pages += [f"{of_page}/keys/{id}" for id in ids]
                reads += [f"{of_api}/{what}" for what in (
                    "keys?limit=500", "keys?name=acct", "stats", "owners", "waiters", "events?limit=500",
                )]  # fmt: skip
                reads += [f"{of_api}/keys/id:{id}" for id in ids]
            for path in pages:
                answer = client.page(path, cookie)
                assert answer.status == (303 if path == "/login" else 200), str(answer)
                self.secrets.expect_none(answer.body + str(answer.headers).encode(), path)
            for path in reads:
                answer = client.get(path)
                answer.expect(200)
                self.secrets.expect_none(answer.body, path)

    def refused(self, answer: Answer, *statuses: int) -> None:
        """An answer to a call that was wrong."""
        assert answer.status in (statuses or (400, 404, 409)), str(answer)
        self.secrets.expect_none(answer.body + str(answer.headers).encode(), str(answer))

    def searched(self, answer: Answer, status: int = 200) -> Any:
        """An answer in which no secret has to be."""
        self.secrets.expect_none(answer.body, f"{answer.method} {answer.path}")
        return answer.expect(status)

    # ---- the calls

    def imported(self, client: Client, count: int = 20) -> list[str]:
        """Import alone and by the batch, and make keys; texts of those in the pool."""
        made = [self.secrets.make("live") for _ in range(count)]
        for number, secret in enumerate(made[:3]):
            item = self.item(secret, f"acct-{number}-{secret[-4:]}")
            self.searched(client.post(OF_POOL + "/keys", json=item), 201)
            self.searched(client.post(OF_POOL + "/keys", json=item))  # existed
        odd = f'sk-"é\\\n{self.secrets.make("odd")}'
        keys = [self.item(secret, f"acct-{secret[-8:]}") for secret in [*made[3:], odd, made[5]]]
        failing = self.secrets.make("failing")
        keys += [
            self.item(failing, f"acct-0-{made[0][-4:]}"),
            self.item(failing, "n" * 64),
            self.item(failing, "id:7"),
            {"secret": failing, "labels": {str(number): "x" for number in range(17)}},
            {"secret": failing, "data": {"big": self.secrets.make("data") * 200}},
            {"secret": failing * 100},
        ]
        for exists in ("skip", "update"):
            body = {"op": "import", "keys": keys, "exists": exists}
            assert self.searched(client.post(OF_POOL + "/batch", json=body))["failed"] >= 5
        for key in client.batch(op="generate", count=5).expect(201)["keys"]:
            self.secrets.add(key["key"])
        return [*made, odd]

    def item(self, secret: str, name: str) -> dict[str, Any]:
        """What to import, with data."""
        return {
            "secret": secret,
            "name": name,
            "labels": {"region": "eu"},
            "data": {"user": self.secrets.make("data")},
        }

    def misused(self, client: Client, known: str) -> None:
        """Calls that fail, with secrets that the pool has and others, wherever a body or a path may have one."""
        unknown = self.secrets.make("unknown")
        for secret in (known, unknown):
            item = self.item(secret, "x")
            self.refused(client.post(API + "/keys", json=item))  # would expire
            self.refused(client.post(API + "/pools/nowhere/keys", json=item))
            for wrong in (
                {"secret": [secret]}, {"secret": secret, "nmae": "x"}, {"secret": secret, "data": secret},
                {"secret": secret, "labels": {"a": 1}}, {"secret": secret, "name": 7}, {"op": [secret]},
                {"op": "import", "keys": [secret]}, {"op": "import", "keys": [{"secret": "a", "data": [secret]}]},
                {"op": "keepalive", "keys": {"a": secret}}, {"op": "unblock", "keys": [{"key": [secret]}]},
                {"op": "import", "keys": [{"secret": secret}], "exists": 1}, {"lease": secret}, [secret], secret,
            ):  # fmt: skip
                for path in _CALLS_WITH_BODIES:
                    self.refused(client.post(OF_POOL + path, json=wrong))
                self.refused(client.patch(OF_POOL + "/keys/id:1", json=wrong))
            # These answers name the unknown member or word, to who sent it; nothing else does.
            import_ = {"op": "import", "keys": [{"secret": secret}], "exists": secret}
            for named in ({secret: 1}, {"op": secret}, import_):
                client.post(OF_POOL + "/keys", json=named).expect_problem(400, "bad-request")
                client.post(OF_POOL + "/batch", json=named).expect_problem(400, "bad-request")
                client.put(OF_POOL, json=named).expect_problem(400, "bad-request")
            client.get(f"{OF_POOL}/keys?{quote(secret)}={quote(secret)}").expect_problem(400, "bad-request")
            client.get(f"{OF_POOL}/keys?state={quote(secret)}").expect_problem(400, "bad-request")
            self.refused(client.post(OF_POOL + "/keys", body=f'{{"secret":"{secret}",}}'.encode()))
            self.refused(client.post(OF_POOL + "/keys", body=f'{{"secret":"{secret}\\ud800"}}'.encode()))
            self.refused(
                client.post(OF_POOL + "/keys", body=secret.encode(), headers={"Content-Type": "text/csv"}),
                415,
            )
            self.refused(client.post(OF_POOL + "/keys/id:2/replace", json={"secret": secret * 200}))
            self.refused(client.post(OF_POOL + "/keys/acquire", json={"owner": "x"}, token=secret), 401)
            self.refused(client.post(OF_POOL + "/keys/acquire", headers={"Idempotency-Key": secret * 3}))
        # Over Valkey, one that is no longer than a name is looked for as a name, which is stored in clear.
        self.refused(client.post(OF_POOL + "/keys/find", json={"key": unknown * 2}))
        path = quote(unknown)
        for call in ("", "/unblock", "/reveal", "/nonsense"):
            self.refused(client.request("POST" if call else "GET", f"{OF_POOL}/keys/{path}{call}"))
        self.refused(client.get(f"{API}/pools/{path}/keys"))
        self.refused(client.put(f"{API}/pools/{path}%20", json={}))
        for query in (f"prefix={path}", f"after={path}"):
            self.refused(client.get(f"{OF_POOL}/keys?{query}"))
        self.refused(client.put(f"{API}/random_api_key/?api_key={path}"))
        self.refused(client.post(f"/{path}"), 403, 404, 405)
        self.refused(client.get(f"/pools/{path}/keys", token=ADMIN_TOKEN))

    def used(self, server: ServerProcess, known: list[str]) -> None:
        """The life of keys: acquired, extended, given back, replaced, patched, revealed, quarantined, deleted."""
        admin, client = server.client(NAMED_TOKEN), server.client(CLIENT_TOKEN)
        held = [client.post(OF_POOL + "/keys/acquire", json={"owner": f"w{n}"}).expect(200) for n in range(6)]
        assert {lease["key"] for lease in held} <= set(known)
        for lease, body in zip(
            held, ({"outcome": "ok"}, {"outcome": "rate_limited"}, {"outcome": "invalid"}), strict=False
        ):
            self.searched(client.post(f"{OF_POOL}/keys/{lease['handle']}/unblock", json=body))
        for secret in (held[3]["key"], held[4]["key"]):
            name = quote(secret, safe="")
            self.searched(client.post(f"{OF_POOL}/keys/{name}/keepalive"))
            self.searched(admin.get(f"{OF_POOL}/keys/{name}"))
            self.searched(admin.post(OF_POOL + "/keys/find", json={"key": secret}))
            self.searched(admin.post(f"{OF_POOL}/keys/{name}/quarantine", json={"reason": "looked odd"}))
            self.refused(client.post(f"{OF_POOL}/keys/{name}/unblock", json={"lease": 10**9}))
        self.replaced(admin, held[5]["id"], known)
        self.searched(client.post(f"{OF_POOL}/keys/{quote(held[5]['key'], safe='')}/unblock"))
        self.refused(
            admin.post(f"{OF_POOL}/keys/id:{held[0]['id']}/replace", json={"secret": held[1]["key"]}), 409
        )
        patch = {"data": {"password": self.secrets.make("data")}}
        self.searched(admin.patch(f"{OF_POOL}/keys/id:{held[0]['id']}", json=patch))
        assert admin.post(f"{OF_POOL}/keys/id:{held[0]['id']}/reveal").expect(200)["data"] == patch["data"]
        self.searched(admin.delete(f"{OF_POOL}/keys/{quote(held[1]['key'], safe='')}"), 204)
        known.remove(held[1]["key"])

    def replaced(self, admin: Client, id: int, known: list[str]) -> None:
        """Another text for a key."""
        known.append(self.secrets.make("new"))
        self.searched(admin.post(f"{OF_POOL}/keys/id:{id}/replace", json={"secret": known[-1]}))


def some_id(admin: Client) -> int:
    """The id of a key in the pool."""
    rows = admin.get(OF_POOL + "/keys?limit=1&state=available").expect(200)["keys"]
    return int(rows[0]["id"])


@contextlib.contextmanager
def watched(server: ServerProcess, secrets: Secrets) -> Iterator[None]:
    """All frames of both feeds meanwhile are searched."""
    frames: dict[str, list[Mapping[str, Any]]] = {API: [], OF_POOL: []}
    viewers = {path: Viewer(server, VIEWER_TOKEN, path=path + "/feed") for path in frames}

    def read(path: str) -> None:
        with contextlib.suppress(OSError, Closed):
            while True:
                frames[path].append(viewers[path].frame())

    threads = [threading.Thread(target=read, args=(path,), daemon=True) for path in frames]
    for thread in threads:
        thread.start()
    try:
        yield
        eventually(lambda: all(len(seen) > 1 for seen in frames.values()), "frames of both")
        eventually(
            lambda: (
                {"imported", "acquired", "quarantined"}
                <= {event["event"] for frame in [*frames[OF_POOL]] for event in frame.get("events", ())}
            ),
            "the events of what was done",
        )
        for seen in frames.values():
            secrets.expect_none(json.dumps([*seen], ensure_ascii=False), "the feed")
    finally:
        for viewer in viewers.values():
            viewer.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        for viewer in viewers.values():
            viewer.close()


def test_no_secret_stands_anywhere(place: Place) -> None:
    """Through imports, leases, replacements, failures, a crash, a restart under another secrets key, and a rekey."""
    server = place.start(OLD)
    admin = server.client(ADMIN_TOKEN)
    place.searched(admin.put(f"{API}/pools/{POOL}", json={"keepalive_seconds": None}), 201)
    with watched(server, place.secrets):
        known = place.imported(admin)
        place.used(server, known)
        place.misused(admin, known[0])
        place.look(server)
    place.search(server)
    crash(server)
    place.search(server)

    server = place.start(NEW, OLD)
    with watched(server, place.secrets):
        admin = server.client(ADMIN_TOKEN)
        known += place.imported(admin)
        place.used(server, known)
        place.searched(admin.post(API + "/rekey"), 202)
        place.replaced(admin, some_id(admin), known)
        eventually(lambda: admin.get(API + "/rekey").expect(200)["state"] == "idle", "the rekey ends")
        place.look(server)
    place.search(server)
    server.finish()
    place.search(server)

    server = place.start(NEW)
    place.look(server)
    admin = server.client(ADMIN_TOKEN)
    revealed = admin.post(f"{OF_POOL}/keys/id:{some_id(admin)}/reveal").expect(200)
    assert revealed["key"] in known, "the wrong secrets were looked for"
    server.finish()
    place.search(server)
    assert all("debug" in each.log.lower() for each in place.servers), "the log isn't that of debug"


def test_commands_show_no_secret(tmp_path: Path) -> None:
    """`keypool import` prints none of a file; a command of `keypool run` has its key, and no other secret."""
    place = Place(Store(tmp_path))
    with place.start(OLD) as server:
        admin = server.client(ADMIN_TOKEN)
        admin.put(f"{API}/pools/{POOL}", json={"keepalive_seconds": None}).expect(201)
        made = [place.secrets.make("live") for _ in range(3)]
        data = place.secrets.make("data")
        lines = [{"secret": made[0], "data": {"user": data}}, {"secret": made[1], "nmae": made[2]}]
        lines += [{"secret": made[1], "name": 63 * "é" + "é"}, {"secret": [made[1]]}]
        text = "\n".join(map(json.dumps, lines)) + f'\n{{"secret": "{made[1]}\n{made[2]}\n'
        env: dict[str, Any] = {
            "KEYPOOL_TOKEN": ADMIN_TOKEN,
            "KEYPOOL_SECRETS_KEY": base64.b64encode(OLD).decode(),
        }
        for format in ("json", "csv", "lines"):
            content = text if format != "lines" else f"{made[0]}\n{made[1] * 200}\n"
            content = content if format != "csv" else f"name,{made[1]}\nx,{made[0]}\n"
            words = ("import", "--pool", POOL, "--format", format, "-")
            ran = keypool(server, *words, stdin=content, limit=60, **env)
            assert ran.returncode, ran
            place.secrets.expect_none(ran.stdout + ran.stderr, f"the output of {words}")
        show = (
            "cat /proc/self/environ; echo; tr '\\0' ' ' </proc/$PPID/cmdline; tr '\\0' ' ' </proc/$$/cmdline"
        )
        ran = keypool(server, "run", "--pool", POOL, "--", "sh", "-c", show, **env)
        assert ran.returncode == 0, ran
        shown = ran.stdout.encode()
        of_key = {f"KEYPOOL_KEY={made[0]}".encode(), f"KEYPOOL_DATA_USER={data}".encode()}
        variables = set(shown.partition(b"\n")[0].split(b"\0"))
        assert of_key <= variables
        place.secrets.expect_none(b"\0".join(variables - of_key), "the command's environment")
        place.secrets.expect_none(shown.partition(b"\n")[2] + ran.stderr.encode(), "the command lines")
        place.search(server)
        place.secrets.expect_none(server.log, "the log")
