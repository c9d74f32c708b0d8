"""Under load, behind the proxies that deploy/ has configurations for, nobody's bytes become a request of somebody else.

Strangers without a token send what smuggles requests past some servers. Meanwhile clients with tokens do what they
can check: each answer is that of their own request, and in the end the counters are what they did. It needs the real
proxies, and load: how bytes are cut into segments is what has made such holes exploitable.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client_support import ports_in_a_row
from http1.in_process import WORDS, mutated
from support import ADMIN_TOKEN, API, CLIENT_TOKEN, VIEWER_TOKEN, Answer, Client, ServerProcess, eventually

DEPLOY = Path(__file__).parents[1] / "deploy"
SECONDS = float(os.environ.get("KEYPOOL_PROXY_SECONDS", "4"))
SMUGGLED = "smuggled"

HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 75s
    http-reuse safe
frontend web
    bind 127.0.0.1:{port}
    default_backend keypool
backend keypool
    server keypool 127.0.0.1:{upstream}
"""
NGINX = """
daemon off;
{user}
worker_processes 2;
pid {folder}/nginx.pid;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {site}
}}
"""


def program(name: str, *, needed: bool) -> str:
    """The path of a proxy. Where it isn't installed the test is skipped, or fails with CI=true if it is needed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        if needed and os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI=true means that it has to be")
        pytest.skip(f"{name} is not installed")
    return found


def nginx(folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    """nginx with the site of deploy/, without TLS."""
    site = (DEPLOY / "nginx" / "keypool.conf").read_text().replace("127.0.0.1:8888", f"127.0.0.1:{upstream}")
    site = re.sub(r"server \{\s+listen 80;.*?\n\}\n", "", site, flags=re.DOTALL)
    site = re.sub(r"\n *ssl_[^;]*;|\n *listen \[::\]:443[^;]*;", "", site)
    site = re.sub(r"listen 443[^;]*;", f"listen 127.0.0.1:{port};", site).replace(
        "/var/log/nginx", str(folder)
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, site=site, user=user))
    return [
        program("nginx", needed=True),
        "-e",
        str(folder / "error.log"),
        "-c",
        str(folder / "nginx.conf"),
    ], {}


def haproxy(folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    """HAProxy that uses idle connections of one client for others, once they have proved to be reliable."""
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port, upstream=upstream))
    return [program("haproxy", needed=True), "-db", "-f", str(folder / "haproxy.cfg")], {}


def caddy(folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    """Caddy with the Caddyfile of deploy/."""
    text = (DEPLOY / "caddy" / "Caddyfile").read_text()
    text = re.sub(r"\n\s*stream_close_delay .*", "", text)  # not known before 2.7
    (folder / "Caddyfile").write_text(text.replace("{\n\tservers {", "{\n\tadmin off\n\tservers {", 1))
    command = [
        program("caddy", needed=False),
        "run",
        "--adapter",
        "caddyfile",
        "--config",
        str(folder / "Caddyfile"),
    ]
    return command, {
        "KEYPOOL_SITE": f"http://127.0.0.1:{port}",
        "KEYPOOL_UPSTREAM": f"127.0.0.1:{upstream}",
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }


PROXIES = {"nginx": nginx, "haproxy": haproxy, "caddy": caddy}


@contextlib.contextmanager
def proxied(name: str, server: ServerProcess, folder: Path) -> Iterator[int]:
    """A proxy in front of a server; its port."""
    port = ports_in_a_row(1)
    command, environment = PROXIES[name](folder, port, server.port)
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:

        def serves() -> bool:
            assert process.poll() is None, (folder / "proxy.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        eventually(serves, f"{name} accepts connections", within=30)
        yield port
    finally:
        process.terminate()
        process.wait(30)


class Crowd:
    """Threads that work until they are stopped; the first that fails fails the test."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def start(self, work: Callable[[], None]) -> None:
        """Have a thread do this again and again."""

        def run() -> None:
            try:
                while not self.stopping.is_set():
                    work()
            except BaseException as error:
                self._failures.append(error)
                self.stopping.set()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def stop(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Let them work for so long, and until they have done enough, or until one fails."""
        self.stopping.wait(seconds)
        with contextlib.suppress(AssertionError):  # what they have done is judged later
            eventually(lambda: enough() or self.stopping.is_set(), "enough work", within=60)
        self.stopping.set()
        for thread in self._threads:
            thread.join(60)
        if self._failures:
            raise self._failures[0]


class Good:
    """A client that does known things through the proxy, and counts them."""

    def __init__(self, name: str, server: ServerProcess, port: int) -> None:
        self._name = name
        self.counted = Counter[str]()
        self._sent = 0
        self._client = Client(server)
        self._client._connection.port = port

    def ask(self, method: str, path: str, token: str, status: int, **body: object) -> Answer:
        """One request; its answer, which must be its own."""
        self._sent += 1
        request_id = f"{self._name}-{self._sent}"
        sent = json.dumps(body).encode() if body else None
        answer = self._client.request(
            method, path, token=token, body=sent, headers={"X-Request-Id": request_id}
        )
        assert answer.headers["X-Request-Id"] == request_id, f"the answer of another request: {answer}"
        assert answer.status == status, f"wanted {status}: {answer}"
        return answer

    def count(self, name: str) -> None:
        """Count a change that was made, under a name of the stats."""
        self.counted[name] += 1

    def serve(self) -> tuple[str, int]:
        """A key that this client holds: its path and its lease. Until it is freed nobody else works with it."""
        served = self.ask("POST", f"{API}/keys/acquire", CLIENT_TOKEN, 200, owner=self._name).json
        self.count("acquired")
        path = f"{API}/keys/{served['key']}"
        row = self.ask("GET", path, VIEWER_TOKEN, 200).json
        assert (row["id"], row["owner"]) == (served["id"], self._name), "the key is somebody else's"
        return path, served["lease"]

    def work(self) -> None:
        """One key made, one served and freed, one served and deleted."""
        self.ask("POST", f"{API}/keys", ADMIN_TOKEN, 201)
        self.count("generated")
        path, lease = self.serve()
        self.ask("POST", f"{path}/keepalive", CLIENT_TOKEN, 200)
        self.count("kept_alive")
        freed = self.ask("POST", f"{path}/unblock", CLIENT_TOKEN, 200, lease=lease).json
        assert freed["changed"], "somebody else has freed the key"
        self.count("unblocked")
        path, _ = self.serve()
        self.ask("DELETE", path, ADMIN_TOKEN, 204)
        self.count("deleted")

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def smuggling(rng: random.Random, host: str) -> list[bytes]:
    """Bytes in segments: a request whose body holds others, and one with an unknown method behind it.

    The requests inside carry an id by which the server's access log would name them. The last of them is open at
    its end: it would take in the head of the request that comes next on the proxy's connection.
    """
    lines = f"Host: {host}\r\nX-Request-Id: {SMUGGLED}\r\n"
    inside = [f"{method} {API}/keys{tail} HTTP/1.1\r\n{lines}" for method, tail in
              (("POST", ""), ("GET", "?limit=500"), ("DELETE", f"/id:{rng.randint(1, 200)}"))]  # fmt: skip
    start = f"{rng.choice(['A', 'X-Y', 'POSTS', 'get'])} / HTTP/1.1\r\nHost: {host}\r\n\r\n"
    unit = (start + rng.choice(["", rng.choice(inside) + "\r\n"]) + rng.choice(inside) + "X: ").encode()
    # A body is read in pieces of 8 KiB, behind the head if that came alone: each begins like a request.
    body = unit.ljust(8192, b"a") * rng.choice([0, 0, 1, 2, 3, 8, 20]) + unit
    target = rng.choice([f"{API}/batch", f"{API}/keys/acquire", "/healthz", "/login"])
    head = f"POST {target} HTTP/1.1\r\nHost: {host}\r\n"
    method = rng.choice(["FOO", "A", "BREW", "get"])
    end = f"{method} / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    if rng.random() < 0.7:
        return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode(), body + end]
    return [
        f"{head}Transfer-Encoding: chunked\r\n\r\n%x\r\n".encode() % len(body),
        body + b"\r\n0\r\n\r\n" + end,
    ]


def stranger(rng: random.Random, port: int) -> Callable[[], None]:
    """A caller without a token, who sends one thing a connection."""
    host = f"127.0.0.1:{port}"
    known = [b"".join(smuggling(rng, host)) for _ in range(20)]

    def attack() -> None:
        if rng.random() < 0.8:
            segments = smuggling(rng, host)
        else:
            segments = [
                mutated(rng.choice(known)[:5000], rng, known[:3], WORDS).replace(
                    SMUGGLED.encode(), b"mutated"
                )
            ]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.settimeout(rng.choice([0.01, 0.05, 0.2]))
            for segment in segments:
                wire.sendall(segment)
                time.sleep(rng.choice([0, 0.002, 0.01]))
            while wire.recv(65536):
                pass

    return attack


@pytest.mark.thorough
@pytest.mark.parametrize("name", PROXIES)
def test_strangers_cannot_reach_into_the_requests_of_others(name: str, tmp_path: Path) -> None:
    """Every good answer is one's own, the counters are what good clients did, and nothing smuggled was served."""
    tokens = {
        "KEYPOOL_CLIENT_TOKEN": CLIENT_TOKEN,
        "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN,
        "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    flags = ["--port=0", "--data=:memory:", "--log-level=debug"]
    with ServerProcess(flags, cwd=tmp_path, env=tokens, admin_token=ADMIN_TOKEN) as server:
        with proxied(name, server, tmp_path) as port:
            crowd = Crowd()
            for good in (goods := [Good(f"good-{number}", server, port) for number in range(3)]):
                crowd.start(good.work)
            for seed in range(4):
                crowd.start(stranger(random.Random(seed), port))
            crowd.stop(SECONDS, lambda: sum(good.counted["generated"] for good in goods) > 10)
            for good in goods:
                good.close()
        stats = server.client(VIEWER_TOKEN).stats()
        for counter in ("generated", "acquired", "kept_alive", "unblocked", "deleted"):
            assert stats[counter] == sum(good.counted[counter] for good in goods), counter
        assert stats["generated"] > 10, "hardly anything was done"
        served = [line for line in server.log_since(0) if SMUGGLED in line]
        assert not served, f"{len(served)} smuggled requests were answered: {served[:3]}"
