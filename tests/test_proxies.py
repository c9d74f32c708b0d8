"""The shipped configurations of nginx and Caddy, in front of a real server: what passes, and what they never do."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import requests
from support import ACQUIRE, API, ServerProcess, clean_environment, eventually
from valkeys import held_port
from viewing import Viewer

DEPLOY = Path(__file__).parents[1] / "deploy"


class Proxy:
    """A running proxy. It has what `Viewer` asks of a server: where it listens, and what belongs into Host."""

    address = "127.0.0.1"

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.host = f"localhost:{port}"
        self.folder = folder
        self.session = requests.Session()
        self.session.trust_env = False

    def send(self, method: str, path: str, **more: Any) -> requests.Response:
        """One request through the proxy."""
        return self.session.request(method, f"http://{self.host}{path}", timeout=30, **more)

    def problem(self, method: str, path: str, status: int, code: str, **more: Any) -> None:
        """One request that the proxy refuses by itself; fails unless that is a problem with this code."""
        answer = self.send(method, path, **more)
        assert answer.status_code == status, answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Cache-Control"] == "no-store"
        problem = answer.json()
        assert (problem["code"], problem["status"]) == (code, status)
        assert problem["type"] == f"urn:keypool:problem:{code}"
        assert problem.keys() == {"type", "code", "title", "status", "detail", "request_id"}

    def logs(self) -> str:
        """All that it has logged."""
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


def tool(name: str) -> str:
    """The path of a program; skips where there is none."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextmanager
def running(command: list[str], port: int, folder: Path, **env: str) -> Iterator[Proxy]:
    """A proxy, once it listens; ended afterwards."""
    environment = clean_environment({"HOME": str(folder), "PATH": os.environ["PATH"], **env})
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    proxy = Proxy(port, folder)

    def listens() -> bool:
        assert process.poll() is None, proxy.logs()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(listens, f"{command[0]} listens")
        yield proxy
    finally:
        process.terminate()
        process.wait(60)
        proxy.session.close()


@contextmanager
def nginx(folder: Path, *upstreams: int) -> Iterator[Proxy]:
    """The shipped file, but for TLS, addresses and paths."""
    program = tool("nginx")
    text = (DEPLOY / "nginx" / "keypool.conf").read_text().replace("/var/log/nginx", str(folder))
    text = re.sub(r"\n *(listen \[::\].*|ssl_\w+ .*)", "", text)
    text = text.replace("keys.example.com", "localhost")
    servers = " ".join(f"server 127.0.0.1:{upstream};" for upstream in upstreams)
    text = text.replace("server 127.0.0.1:8888;", servers)
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; {user} pid {folder}/pid; error_log {folder}/main.log; events {{}}\n"
        f"http {{ {temporary} include {folder}/keypool.conf; }}\n"
    )
    command = [program, "-e", f"{folder}/start.log", "-c", f"{folder}/nginx.conf"]
    with held_port() as port, held_port() as redirect:
        text = text.replace("listen 80;", f"listen 127.0.0.1:{redirect};")
        text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
        (folder / "keypool.conf").write_text(text)
        with running(command, port, folder) as proxy:
            yield proxy


@contextmanager
def caddy(folder: Path, *upstreams: int) -> Iterator[Proxy]:
    """The shipped file as it is, but without the port on which Caddy takes orders."""
    program = tool("caddy")
    text = (DEPLOY / "caddy" / "Caddyfile").read_text()
    (folder / "Caddyfile").write_text(re.sub(r"(?m)^\{$", "{\n\tadmin off", text, count=1))
    command = [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    upstream = " ".join(f"127.0.0.1:{each}" for each in upstreams)
    with held_port() as port:
        site = f"http://localhost:{port}"
        with running(command, port, folder, KEYPOOL_SITE=site, KEYPOOL_UPSTREAM=upstream) as proxy:
            yield proxy


PROXIES = {"nginx": nginx, "caddy": caddy}


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_passes_calls_and_the_feed_and_logs_no_key(name: str, tmp_path: Path) -> None:
    """Calls, a wait, a websocket; and when the server is gone, a problem to the caller and no key in any log."""
    with ServerProcess(["--port=0", "--data=:memory:"], cwd=tmp_path) as server:
        with PROXIES[name](tmp_path, server.port) as proxy:
            made = proxy.send("POST", f"{API}/keys").json()["key"]
            with Viewer(cast("ServerProcess", proxy), headers={"Origin": f"https://{proxy.host}"}) as viewer:
                assert viewer.status == 101, viewer.head
                assert viewer.frame()["type"] == "hello"
                assert proxy.send("POST", ACQUIRE, json={"owner": "me"}).json()["key"] == made
                while viewer.until("delta")["stats"]["blocked"] != 1:  # one of before the acquire
                    pass
            assert proxy.send("POST", ACQUIRE, json={"wait": 0.2}).json()["code"] == "no-key-available"
            assert proxy.send("POST", f"{API}/keys/{made}/keepalive").status_code == 200
            assert proxy.send("GET", "/metrics").status_code == 404, "metrics are for inside"
            too_large = {"data": b"x" * 300_000, "headers": {"Content-Type": "application/json"}}
            proxy.problem("POST", f"{API}/batch", 413, "payload-too-large", **too_large)
            server.finish()
            proxy.problem("POST", f"{API}/keys/{made}/keepalive", 502, "bad-gateway")
            proxy.problem("DELETE", f"{API}/random_api_key/?api_key={made}", 502, "bad-gateway")
        assert made not in proxy.logs(), proxy.logs()


def test_nginx_refuses_large_heads_as_problems(tmp_path: Path) -> None:
    """Before keypool sees them: a header, a target."""
    with held_port() as down, nginx(tmp_path, down) as proxy:
        proxy.problem("GET", f"{API}/stats", 431, "headers-too-large", headers={"X-Large": "x" * 40_000})
        proxy.problem("GET", f"{API}/keys?after={'x' * 40_000}", 414, "uri-too-long")


class Broken:
    """A server that takes every request and hangs up."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.requests: list[bytes] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(65536))

    def close(self) -> None:
        """Listen no more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_sets_address_and_scheme_of_the_caller(name: str, tmp_path: Path) -> None:
    """Whatever the caller wrote into these headers: the limit of sign-ins and the audit log go by them."""
    server = Broken()
    made_up = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "gopher"}
    try:
        with PROXIES[name](tmp_path, server.port) as proxy:
            proxy.problem("POST", ACQUIRE, 502, "bad-gateway", headers=made_up)
        head = server.requests[0].decode().lower()
        assert "\r\nx-forwarded-for: 127.0.0.1\r\n" in head or "\r\nx-forwarded-for: ::1\r\n" in head, head
        assert "\r\nx-forwarded-proto: http\r\n" in head
        assert f"\r\nhost: {proxy.host}\r\n" in head
    finally:
        server.close()


@pytest.mark.parametrize(
    ("method", "path"), [("POST", ACQUIRE), ("POST", f"{API}/keys"), ("GET", f"{API}/random_api_key/")]
)
def test_nginx_sends_no_call_twice_that_was_sent(method: str, path: str, tmp_path: Path) -> None:
    """A server that hung up may have done it: with two of them, one gets the request, once."""
    broken = [Broken(), Broken()]
    try:
        with nginx(tmp_path, *(each.port for each in broken)) as proxy:
            proxy.problem(method, path, 502, "bad-gateway")
        assert sum(len(each.requests) for each in broken) == 1
    finally:
        for each in broken:
            each.close()


def test_nginx_goes_round_a_server_that_is_down(tmp_path: Path) -> None:
    """Of two servers one can't be reached: no call is answered 502 for it."""
    with ServerProcess(["--port=0", "--data=:memory:"], cwd=tmp_path) as server:
        with held_port() as down, nginx(tmp_path, server.port, down) as proxy:
            statuses = {proxy.send("POST", f"{API}/keys").status_code for _ in range(8)}
            shown = json.loads(proxy.send("GET", f"{API}/stats").text)
        assert statuses == {201}
        assert shown["total"] == 8
