"""Who may do what: tokens and roles, the loopback rule of an open server,
and what browsers send for other sites.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from support import (
    ACQUIRE,
    ADMIN_TOKEN,
    API,
    CLIENT_TOKEN,
    OTHER_CLIENT_TOKEN,
    TOKENS,
    VIEWER_TOKEN,
    Answer,
    Client,
    ServerProcess,
    run_server,
)

LEGACY = API + "/random_api_key/"


# ------------------------------------------------------------------------------------------------------ roles


@dataclass
class Call:
    """A call, who may make it, and what it answers to them; {key} and {id} are those of a blocked key."""

    name: str
    method: str
    path: str
    roles: set[str]
    status: int
    json: Any = None

    def make(self, client: Client, made: dict[str, Any], **how: Any) -> Answer:
        """Make the call about this key."""

        def fill(text: str) -> str:
            return text.replace("{key}", made["key"]).replace("{id}", str(made["id"]))

        if self.json is not None:
            how["json"] = {
                name: [fill(item) if isinstance(item, str) else item for item in value]
                if isinstance(value, list)
                else value
                for name, value in self.json.items()
            }
        return client.request(self.method, API + fill(self.path), **how)


CLIENTS, VIEWERS, ADMINS = {"client", "admin"}, {"viewer", "admin"}, {"admin"}
CALLS = [
    Call("generate", "POST", "/keys", ADMINS, 201),
    Call("acquire", "POST", "/keys/acquire", CLIENTS, 200),
    Call("acquire with a body", "POST", "/keys/acquire", CLIENTS, 200, {"owner": "me"}),
    Call("unblock", "POST", "/keys/{key}/unblock", CLIENTS, 200),
    Call("unblock by id", "POST", "/keys/id:{id}/unblock", ADMINS, 200),
    Call("unblock by encoded id", "POST", "/keys/id%3A{id}/unblock", ADMINS, 200),
    Call("keepalive", "POST", "/keys/{key}/keepalive", CLIENTS, 200),
    Call("keepalive by id", "POST", "/keys/id:{id}/keepalive", ADMINS, 200),
    Call("delete", "DELETE", "/keys/{key}", ADMINS, 204),
    Call("delete by id", "DELETE", "/keys/id:{id}", ADMINS, 204),
    Call("get", "GET", "/keys/{key}", CLIENTS | VIEWERS, 200),
    Call("get by id", "GET", "/keys/id:{id}", VIEWERS, 200),
    Call("get by encoded id", "GET", "/keys/%69d%3a{id}", VIEWERS, 200),
    Call("head", "HEAD", "/keys/{key}", CLIENTS | VIEWERS, 200),
    Call("head by id", "HEAD", "/keys/id:{id}", VIEWERS, 200),
    Call("reveal", "POST", "/keys/{key}/reveal", ADMINS, 200),
    Call("reveal by id", "POST", "/keys/id:{id}/reveal", ADMINS, 200),
    Call("list", "GET", "/keys", VIEWERS, 200),
    Call("stats", "GET", "/stats", VIEWERS, 200),
    Call("batch generate", "POST", "/batch", ADMINS, 201, {"op": "generate", "count": 1}),
    Call("batch acquire", "POST", "/batch", CLIENTS, 200, {"op": "acquire", "count": 1}),
    Call("batch keepalive", "POST", "/batch", CLIENTS, 200, {"op": "keepalive", "keys": ["{key}"]}),
    Call("batch keepalive by id", "POST", "/batch", ADMINS, 200, {"op": "keepalive", "keys": ["id:{id}"]}),
    Call("batch unblock", "POST", "/batch", CLIENTS, 200, {"op": "unblock", "keys": ["{key}"]}),
    Call("batch unblock by id", "POST", "/batch", ADMINS, 200, {"op": "unblock", "keys": ["id:{id}"]}),
    Call("quarantine", "POST", "/keys/{key}/quarantine", ADMINS, 200),
    Call("quarantine by id", "POST", "/keys/id:{id}/quarantine", ADMINS, 200, {"now": True}),
    Call("history", "GET", "/keys/{key}/history", VIEWERS, 200),
    Call("history by id", "GET", "/keys/id:{id}/history", VIEWERS, 200),
    Call("restore", "POST", "/keys/{key}/restore", ADMINS, 200),
    Call("extend", "POST", "/keys/{key}/extend", CLIENTS, 409, {"lease": 0}),
    Call(
        "batch extend by id",
        "POST",
        "/batch",
        ADMINS,
        200,
        {"op": "extend", "keys": [{"key": "id:1", "lease": 1}]},
    ),
    Call("batch quarantine", "POST", "/batch", ADMINS, 200, {"op": "quarantine", "keys": ["{key}"]}),
    Call("batch restore", "POST", "/batch", ADMINS, 200, {"op": "restore", "keys": ["{key}"]}),
    Call("batch delete", "POST", "/batch", ADMINS, 200, {"op": "delete", "keys": ["{key}"]}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_is_for_its_roles_only(guarded_server: ServerProcess, call: Call) -> None:
    """200 for the roles that the contract names, 403 forbidden for the others and 401 without a right token."""
    admin = guarded_server.client(ADMIN_TOKEN)
    for role, token in TOKENS.items():
        made = admin.make()
        held = admin.batch(op="acquire", count=1000).expect(200)["keys"]
        assert made["key"] in [one["key"] for one in held]
        admin.make()
        client = guarded_server.client(token)
        if role in call.roles:
            answer = call.make(client, made)
            assert answer.status == call.status, f"a {role} was answered {answer}"
        else:
            with admin.expect_moved():
                expect_refused(call.make(client, made), 403, "forbidden")
        admin.batch(op="acquire", count=1000)
    made = admin.make()
    with admin.expect_moved():
        for headers in ({}, {"Authorization": "Bearer wrong-token-of-good-length"}):
            answer = call.make(guarded_server.client(), made, headers=headers)
            expect_refused(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer"), str(answer.headers)


def expect_refused(answer: Answer, status: int, code: str) -> None:
    """Fails unless the answer is this problem, of which HEAD has only the headers."""
    assert answer.status == status, str(answer)
    if answer.method != "HEAD":
        answer.expect_problem(status, code)


@pytest.mark.parametrize("call", [CALLS[1], CALLS[12], CALLS[18]], ids=lambda call: call.name)
def test_anything_but_a_right_token_is_401(guarded_server: ServerProcess, call: Call) -> None:
    """unauthorized with WWW-Authenticate: Bearer, and nothing changes."""
    admin = guarded_server.client(ADMIN_TOKEN)
    made = admin.make()
    with admin.expect_moved():
        for authorization in (
            "", "Bearer", "Bearer ", f"Bearer {ADMIN_TOKEN[:-1]}", f"Bearer {ADMIN_TOKEN}x",
            f"Bearer {ADMIN_TOKEN.upper()}", f"Bearer {CLIENT_TOKEN},{OTHER_CLIENT_TOKEN}", f"Basic {ADMIN_TOKEN}",
            ADMIN_TOKEN, "Bearer t\xf6ken-m\xeft-\xfcmlauten", f"Bearer {ADMIN_TOKEN} {ADMIN_TOKEN}",
        ):  # fmt: skip
            answer = call.make(guarded_server.client(), made, headers={"Authorization": authorization})
            answer.expect_problem(401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer"), str(answer.headers)


def test_a_token_in_the_query_does_not_count(guarded_server: ServerProcess) -> None:
    """It would get into logs and browser histories, so it isn't read there: 401."""
    for name in ("access_token", "token"):
        answer = guarded_server.client().get(f"{API}/stats?{name}={ADMIN_TOKEN}")
        answer.expect_problem(401, "unauthorized")


def test_several_tokens_of_a_role_all_work(guarded_server: ServerProcess) -> None:
    """Those between the commas, each by itself."""
    guarded_server.client(ADMIN_TOKEN).make_many(2)
    for token in (CLIENT_TOKEN, OTHER_CLIENT_TOKEN):
        guarded_server.client(token).post(ACQUIRE).expect(200)


def test_tokens_may_come_from_files(start_server: Start, tmp_path: Path) -> None:
    """KEYPOOL_…_TOKEN_FILE names a file with the tokens, as an editor leaves it: a newline ends it."""
    (tmp_path / "admin").write_text(f"{ADMIN_TOKEN}\n")
    (tmp_path / "client").write_text(f"{CLIENT_TOKEN},{OTHER_CLIENT_TOKEN}\n")
    server = start_server(
        env={
            "KEYPOOL_ADMIN_TOKEN_FILE": str(tmp_path / "admin"),
            "KEYPOOL_CLIENT_TOKEN_FILE": str(tmp_path / "client"),
        }
    )
    server.secrets.update([ADMIN_TOKEN, CLIENT_TOKEN, OTHER_CLIENT_TOKEN])
    server.client(ADMIN_TOKEN).make_many(2)
    for token in (CLIENT_TOKEN, OTHER_CLIENT_TOKEN):
        server.client(token).post(ACQUIRE).expect(200)
        server.client(token).post(API + "/keys").expect_problem(403, "forbidden")
    server.client(VIEWER_TOKEN).get(API + "/stats").expect_problem(401, "unauthorized")


def test_one_token_of_one_role_closes_the_server(start_server: Start) -> None:
    """With a client token alone, no caller is admin, and calls without a token are refused."""
    server = start_server(env={"KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN, "KEYPOOL_ADMIN_TOKEN": ""})
    server.client().post(ACQUIRE).expect_problem(401, "unauthorized")
    server.client().post(API + "/keys").expect_problem(401, "unauthorized")
    server.client(CLIENT_TOKEN).post(API + "/keys").expect_problem(403, "forbidden")
    server.client(CLIENT_TOKEN).post(ACQUIRE).expect_problem(404, "no-key-available")


def test_empty_token_variables_leave_the_server_open(start_server: Start) -> None:
    """Variables that are set and empty leave the server open."""
    server = start_server(
        env={"KEYPOOL_CLIENT_TOKEN": "", "KEYPOOL_VIEWER_TOKEN": "", "KEYPOOL_ADMIN_TOKEN": ""}
    )
    server.client().post(API + "/keys").expect(201)


WRONG_SETTINGS: dict[str, tuple[dict[str, str], list[str], str]] = {
    # Environment, flags, and what the line names.
    "short token": ({"KEYPOOL_CLIENT_TOKEN": f"{'a' * 16},quite-short"}, [], "KEYPOOL_CLIENT_TOKEN"),
    "two roles": (
        {"KEYPOOL_CLIENT_TOKEN": f"{CLIENT_TOKEN},{ADMIN_TOKEN}", "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN}, [], "KEYPOOL_"
    ),
    "missing file": ({"KEYPOOL_ADMIN_TOKEN_FILE": "/nothing/here"}, [], "KEYPOOL_ADMIN_TOKEN_FILE"),
    "open on IPv4": ({}, ["--address=0.0.0.0"], "_TOKEN"),
    "open on IPv6": ({}, ["--address=::"], "_TOKEN"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_unsafe_tokens_and_addresses_are_refused_at_the_start(case: str) -> None:
    """Exit status 2 and one line that names the variable, not the token. test_settings.py has each rule."""
    env, flags, named = WRONG_SETTINGS[case]
    status, output = run_server(["--data=:memory:", "--port=0", *flags], env)
    assert status == 2, f"exit status {status}: {output}"
    assert len(output.strip().splitlines()) == 1, f"not one line: {output}"
    assert named in output, f"{named} is not named: {output}"
    for secret in (ADMIN_TOKEN, CLIENT_TOKEN, "quite-short"):
        assert secret not in output, f"a token is shown: {output}"


# ----------------------------------------------------------------------------------------------- open servers


def test_a_guarded_server_serves_on_every_address(start_server: Start) -> None:
    """With a token it starts on 0.0.0.0, and any Host is right."""
    server = start_server("--address=0.0.0.0", env={"KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN})
    server.address = "127.0.0.1"  # where 0.0.0.0 can be reached
    for host in ("keys.example", "127.0.0.1", "10.1.2.3:80"):
        server.client(VIEWER_TOKEN).get(API + "/stats", headers={"Host": host}).expect(200)


def has_ipv6() -> bool:
    """Whether this machine has the loopback address of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_open_server_serves_on_the_loopback_of_ipv6(start_server: Start) -> None:
    """The line that announces readiness shows the address in brackets, as in a URL."""
    server = start_server("--address=::1")
    assert server.host == f"[::1]:{server.port}"
    server.client().make()


GOOD_HOSTS = [
    "localhost", "LocalHost", "localhost:{port}", "localhost:1", "127.0.0.1", "127.0.0.1:80", "127.255.1.2",
    "127.5.6.7:8888", "[::1]", "[::1]:{port}",
]  # fmt: skip
BAD_HOSTS = [
    "keys.example", "keys.example:{port}", "127.0.0.1.example", "localhost.example", "example.localhost.com",
    "xlocalhost", "128.0.0.1", "126.255.255.255", "0.0.0.0", "10.0.0.1:{port}", "192.168.0.1", "[::2]", "[::]",
    "127.0.0.256", "127.0.0.1.1", "evil127.0.0.1",
]  # fmt: skip


def test_an_open_server_answers_to_its_own_names(server: ServerProcess, client: Client) -> None:
    """localhost, 127.0.0.0/8 and [::1], with any port or none."""
    for host in GOOD_HOSTS:
        client.get(API + "/stats", headers={"Host": host.format(port=server.port)}).expect(200)


def test_an_open_server_refuses_every_other_host(server: ServerProcess, client: Client) -> None:
    """421 wrong-host on every path, or a web page could reach it by a name of its own; nothing moves."""
    key = client.make()["key"]
    calls = [
        ("GET", API + "/stats"), ("POST", API + "/keys"), ("POST", ACQUIRE), ("DELETE", f"{API}/keys/{key}"),
        ("GET", LEGACY), ("OPTIONS", API + "/keys"), ("PUT", API + "/stats"), ("GET", API + "/nope"),
        ("GET", "/nope"), ("GET", "/healthz"),
    ]  # fmt: skip
    with client.expect_moved():
        for host in BAD_HOSTS:
            headers = {"Host": host.format(port=server.port)}
            for method, path in calls if host == BAD_HOSTS[0] else calls[:4]:
                client.request(method, path, headers=headers).expect_problem(421, "wrong-host")


@pytest.mark.parametrize(
    "hosts", [[], [""], ["localhost", "keys.example"], ["keys.example", "localhost"], ["a b"]]
)
def test_no_host_or_two_are_not_taken_for_a_good_one(
    server: ServerProcess, client: Client, hosts: list[str]
) -> None:
    """No answer but a refusal, or a closed connection, to a request whose Host is missing, empty,
    doubled or broken.
    """
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    with client.expect_moved():
        text = f"POST {API}/keys HTTP/1.1\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n"
        received = server.raw(text.encode())
    assert received == b"" or received.split(b" ")[1] in (b"400", b"421"), received


# ------------------------------------------------------------------------------------------------ other sites

CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", API + "/keys", {}),
    ("POST", ACQUIRE, {}),
    ("POST", API + "/keys/{key}/unblock", {}),
    ("POST", API + "/keys/{key}/keepalive", {}),
    ("DELETE", API + "/keys/{key}", {}),
    ("POST", API + "/batch", {"json": {"op": "generate", "count": 1}}),
    ("POST", LEGACY, {}),
    ("GET", LEGACY, {}),
    ("GET", LEGACY[:-1], {}),
    ("PUT", LEGACY + "?api_key={key}", {}),
    ("DELETE", LEGACY + "?api_key={key}", {}),
]
READS = {"get": "/keys/{key}", "list": "/keys", "stats": "/stats"}


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "guarded"])
def test_a_change_for_another_site_is_refused(lend: Start, request: Any, guarded: bool) -> None:
    """403 cross-site by foreign Origin, Origin null and Sec-Fetch-Site, with or without a good token."""
    server: ServerProcess = request.getfixturevalue("guarded_server") if guarded else lend()
    client = server.client(ADMIN_TOKEN if guarded else None)
    client.make()
    key = client.acquire()["key"]
    client.make()
    foreign = [
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{server.port + 1 if server.port < 65535 else 1}"},
        {"Origin": f"http://127.0.0.1.example:{server.port}"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "nonsense"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": f"http://127.0.0.1:{server.port}"},
    ]
    with client.expect_moved():
        for method, path, how in CHANGES:
            for headers in foreign:
                answer = client.request(method, path.format(key=key), headers=headers, **how)
                answer.expect_problem(403, "cross-site")


def test_a_change_for_the_own_site_is_made(server: ServerProcess, client: Client) -> None:
    """An Origin of the same host and port, by http or https, and any other Sec-Fetch-Site."""
    own = [
        {"Origin": f"http://127.0.0.1:{server.port}"},
        {"Origin": f"https://127.0.0.1:{server.port}"},
        {"Origin": "http://localhost:4321", "Host": "localhost:4321"},
        {"Origin": "https://[::1]:99", "Host": "[::1]:99"},
        {"Origin": "http://localhost", "Host": "localhost"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ]
    for method, path, how in CHANGES:
        for headers in own:
            client.batch(op="acquire", count=1000)
            key = client.make()["key"]
            answer = client.request(method, path.format(key=key), headers=headers, **how)
            assert answer.status in (200, 201, 204), f"{headers}: {answer}"


@pytest.mark.parametrize("path", READS.values(), ids=list(READS))
def test_reads_for_another_site(client: Client, path: str) -> None:
    """A foreign Origin is refused always; Sec-Fetch-Site alone doesn't matter where nothing changes."""
    path = API + path.format(key=client.make()["key"])
    for origin in ("http://elsewhere.example", "null"):
        client.get(path, headers={"Origin": origin}).expect_problem(403, "cross-site")
    client.get(path, headers={"Sec-Fetch-Site": "cross-site"}).expect(200)


def test_the_dashboards_own_host_counts_on_a_guarded_server(guarded_server: ServerProcess) -> None:
    """Behind a proxy Host and Origin are the public name's, whatever the scheme."""
    admin = guarded_server.client(ADMIN_TOKEN)
    headers = {"Host": "keys.example", "Origin": "https://keys.example"}
    admin.post(API + "/keys", headers=headers).expect(201)
    headers["Origin"] = "https://keys.example.org"
    admin.post(API + "/keys", headers=headers).expect_problem(403, "cross-site")
