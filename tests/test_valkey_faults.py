"""Failures of Valkey: calls get 503, and the engine recovers by itself when Valkey does.

Every fault is made in a real Valkey: killed, stopped, filled up, made a replica, or taken the slot away from.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support import ACQUIRE, API, ROOT, ServerProcess, run_server
from support import eventually as eventually_blocking
from valkey_support import age, check, engine_on, eventually, on_loop, serves
from valkeys import Cluster, Valkey

from keypool.core.answers import Unblock
from keypool.core.cursor import ListQuery
from keypool.core.errors import KeypoolError, StartError, StorageUnavailable
from keypool.engine.valkey import link as valkey_link
from keypool.engine.valkey.engine import ValkeyEngine
from keypool.engine.valkey.link import Link
from keypool.engine.valkey.scripts import keys_of, slot_of


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """One that a test may break."""
    with Valkey("--appendonly", "yes", "--appendfsync", "always") as one:
        yield one


async def unready(engine: ValkeyEngine) -> str:
    """Why it isn't ready, as soon as it isn't."""

    def why() -> str:
        try:
            engine.ready()
        except StorageUnavailable as error:
            assert not engine.storage_up()
            return error.detail
        return ""

    found: str = await eventually(why, "the engine says that it isn't ready")
    return found


def _is_down(link: Link) -> bool:
    return not link.up


# ------------------------------------------------------------------------------------------------- connection


@on_loop
async def test_it_serves_again_when_a_killed_valkey_is_back(valkey: Valkey) -> None:
    """Calls meanwhile get 503 and are not known to be done; keys that Valkey kept are there."""
    async with engine_on(valkey.url) as engine:
        key = (await engine.generate(1))[0].key
        valkey.kill()
        with pytest.raises(StorageUnavailable):
            await engine.keepalive(key)
        await unready(engine)
        with pytest.raises(StorageUnavailable):
            await engine.acquire(None, 0)
        valkey.start()
        await serves(engine)
        assert (await engine.acquire(None, 0)).key == key


@on_loop
async def test_a_call_that_could_not_be_sent_waits_for_the_connection(valkey: Valkey) -> None:
    """A connection that Valkey closes while nothing is under way costs no call an error."""
    async with engine_on(valkey.url) as engine:
        key = (await engine.generate(1))[0].key
        for _ in range(5):
            await eventually(lambda: not engine._nodes.recovering, "no further connection is being made")
            before = list(engine._nodes._links.values())
            with valkey.commands() as commands:
                commands.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            for link in before:
                await eventually(partial(_is_down, link), "it was told")
            assert (await engine.keepalive(key)).id


@on_loop
async def test_a_silent_valkey_is_dropped_and_reconnected_to(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valkey is stopped with its connections open: calls end within seconds, and are served when it continues."""
    async with engine_on(valkey.url) as engine:
        key = (await engine.generate(1))[0].key
        with valkey.paused(), monkeypatch.context() as patch:
            patch.setattr(valkey_link, "SILENCE", 0.8)
            with pytest.raises(StorageUnavailable):
                await engine.keepalive(key)
            await unready(engine)
        await serves(engine)
        await engine.keepalive(key)


@on_loop
async def test_writes_that_are_held_up_for_a_moment_are_only_late(valkey: Valkey) -> None:
    """CLIENT PAUSE, as a planned failover has it: no call fails that is answered in time."""
    async with engine_on(valkey.url) as engine:
        key = (await engine.generate(1))[0].key
        valkey.ask("CLIENT", "PAUSE", 300, "WRITE")
        await engine.keepalive(key)
        lease = await engine.acquire(None, 0)
        assert lease.key == key
        engine.ready()


# --------------------------------------------------------------------------------------------------- refusals


@on_loop
async def test_scripts_that_were_forgotten_are_loaded_again(valkey: Valkey) -> None:
    """NOSCRIPT: nothing ran, so no call notices."""
    async with engine_on(valkey.url) as engine:
        await engine.generate(3)
        for _ in range(10):
            valkey.ask("SCRIPT", "FLUSH")
            leases = await asyncio.gather(*(engine.acquire(None, 0) for _ in range(3)))
            await engine.unblock_many([Unblock(lease.key, lease.lease) for lease in leases])
        engine.ready()
        assert (await engine.stats()).acquired == 30


@on_loop
async def test_a_full_valkey_refuses_changes_and_keeps_what_there_is(valkey: Valkey) -> None:
    """OOM: no call is half executed, deletes free memory, and then all calls are served."""
    async with engine_on(valkey.url, 4) as engine:
        keys = [key.key for key in await engine.generate(50)]
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        for call in (engine.generate(1), engine.acquire("w", 0), engine.keepalive(keys[0])):
            with pytest.raises(StorageUnavailable, match="OOM"):
                await call
        assert "OOM" in await unready(engine)
        assert (await engine.get(keys[0])).lease is None
        await engine.delete(keys[0])
        check(valkey, "keypool", 4)
        valkey.ask("CONFIG", "SET", "maxmemory", 0)
        await serves(engine)
        assert len(await engine.acquire_many(None, 100)) == 49
        check(valkey, "keypool", 4)


@on_loop
async def test_a_full_valkey_with_blocks_that_ran_out_can_be_emptied(valkey: Valkey) -> None:
    """Every call deals with what is overdue first, which needs no memory: reads, unblocks and deletes go on, while
    what would need memory is refused.
    """
    async with engine_on(valkey.url, 1, block_seconds=60) as engine:
        engine._poller.stop()  # whatever is dealt with is by the calls
        keys = [key.key for key in await engine.generate(400)]
        leases = await engine.acquire_many("w", 300)
        age(valkey, "keypool", 1, 55)
        held = await engine.acquire_many("w", 50)
        age(valkey, "keypool", 1, 6)
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        assert (await engine.get(leases[0].key)).owner is None
        assert (await engine.unblock(held[0].key, held[0].lease)).changed
        await engine.delete(keys[0])
        assert len((await engine.page(ListQuery(limit=5))).keys) == 5
        assert (await engine.stats()).total == 399
        with pytest.raises(StorageUnavailable, match="OOM"):
            await engine.generate(1)
        check(valkey, "keypool", 1)


@on_loop
async def test_a_primary_that_became_a_replica_is_left_until_it_is_one_again(valkey: Valkey) -> None:
    """READONLY: 503, and nothing was done."""
    with Valkey() as other:
        async with engine_on(valkey.url) as engine:
            await engine.generate(1)
            valkey.ask("REPLICAOF", "127.0.0.1", other.port)
            with pytest.raises(StorageUnavailable):
                await engine.acquire(None, 0)
            await unready(engine)
            valkey.ask("REPLICAOF", "NO", "ONE")
            await serves(engine)
            assert (await engine.stats()).acquired == 0


@on_loop
async def test_too_few_replicas_refuse_changes(valkey: Valkey) -> None:
    """NOREPLICAS, which narrows what a failover may lose."""
    async with engine_on(valkey.url) as engine:
        await engine.generate(1)
        valkey.ask("CONFIG", "SET", "min-replicas-to-write", 1)
        with pytest.raises(StorageUnavailable, match="NOREPLICAS"):
            await engine.acquire(None, 0)
        assert "NOREPLICAS" in await unready(engine)
        valkey.ask("CONFIG", "SET", "min-replicas-to-write", 0)
        await serves(engine)
        await engine.acquire(None, 0)


@on_loop
async def test_waiters_are_served_when_valkey_is_back(valkey: Valkey) -> None:
    """An outage does not end a wait."""
    async with engine_on(valkey.url) as engine:
        waiting = asyncio.ensure_future(engine.acquire("w", 30))
        await eventually(lambda: len(engine._waiters), "somebody waits")
        valkey.kill()
        await unready(engine)
        valkey.start()
        await serves(engine)
        made = (await engine.generate(1))[0]
        assert (await waiting).key == made.key


@on_loop
async def test_a_promoted_replica_is_used_as_the_primary(valkey: Valkey) -> None:
    """Of several addresses, the one whose role is primary; none while two have it."""
    with Valkey() as other:
        other.ask("REPLICAOF", "127.0.0.1", valkey.port)
        url = f"valkey://127.0.0.1:{other.port},127.0.0.1:{valkey.port}"
        async with engine_on(url) as engine:
            key = (await engine.generate(1))[0].key
            assert valkey.replicated()
            valkey.kill()
            await unready(engine)
            other.ask("REPLICAOF", "NO", "ONE")
            await serves(engine)
            assert (await engine.acquire(None, 0)).key == key
            valkey.start()
            with pytest.raises(StartError, match="all primaries"):
                async with engine_on(url):
                    pass


# ---------------------------------------------------------------------------------------------------- cluster


@on_loop
async def test_slots_that_move_are_followed() -> None:
    """MOVED, ASK and TRYAGAIN: a slot is taken from one node to the other under load, and no call fails."""
    with Cluster(node_timeout=5000) as cluster:  # no node is given up because the machine is busy
        async with engine_on(cluster.url, 4) as engine:
            texts = [key.key for key in await engine.generate(40)]
            slot = slot_of(keys_of("keypool", 2, 4)[0])
            source = cluster.primary_of(slot)
            target = next(node for node in cluster.nodes if node is not source)
            stop = False
            failed: list[KeypoolError] = []
            done = 0

            async def load(text: str) -> None:
                nonlocal done
                while not stop:
                    try:
                        await engine.keepalive(text)
                        done += 1
                    except KeypoolError as error:
                        failed.append(error)
                    await asyncio.sleep(0)

            async def more(count: int) -> None:
                least = done + count
                await eventually(lambda: done > least, "calls go on meanwhile")

            loads = [asyncio.ensure_future(load(text)) for text in texts]
            names = {node: node.ask("CLUSTER", "MYID").decode() for node in cluster.nodes}
            target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
            source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
            while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 2):
                source.ask(
                    "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *(key.decode() for key in keys)
                )
                await more(40)
            await more(100)  # asked for at the other node
            for node in (target, source, *cluster.nodes):
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target])
            await more(200)
            stop = True
            await asyncio.gather(*loads)
            assert not failed, failed[:3]
            await serves(engine)
            assert engine._client.node_of(2) == ("127.0.0.1", target.port)
            assert (await engine.stats()).total == 40


@on_loop
async def test_a_promoted_replica_is_found_when_its_primary_dies() -> None:
    """Without help, and with calls for the other nodes going on where the cluster lets them."""
    with Cluster(3, 1) as cluster:
        async with engine_on(cluster.url) as engine:
            texts = [key.key for key in await engine.generate(200)]
            assert all(node.replicated() for node in cluster.nodes[:3])
            cluster.nodes[1].kill()

            async def all_kept() -> bool:
                return set(await engine.keepalive_many(texts)) == {"done"}

            await eventually(all_kept, "all keys are reached again", within=40)
            await serves(engine)


# ------------------------------------------------------------------------------------------------------ start


def test_a_valkey_that_does_not_answer_is_one_line_and_status_1() -> None:
    """And the password isn't in it."""
    with Valkey() as valkey:
        port = valkey.port
    status, output = run_server([f"--engine=valkey://user:hunter2@127.0.0.1:{port}", "--port=0"])
    assert status == 1, output
    assert output.count("\n") == 1, output
    assert f"127.0.0.1:{port}" in output
    assert "hunter2" not in output


def test_another_number_of_partitions_is_refused() -> None:
    """It is stored with the pool: one line, status 1."""
    with Valkey() as valkey:
        with ServerProcess([f"--engine={valkey.url}", "--partitions=4", "--port=0"], cwd=Path("/")):
            pass
        status, output = run_server([f"--engine={valkey.url}", "--partitions=8", "--port=0"])
        assert status == 1, output
        assert output.count("\n") == 1, output
        assert "--partitions=4" in output


def test_a_password_is_used_and_never_shown() -> None:
    """Not in the log, --print-config, a page or an error; a wrong one is one line, status 1."""
    with Valkey("--requirepass", "s3cret-Pass") as valkey:
        url = f"valkey://:s3cret-Pass@127.0.0.1:{valkey.port}"
        status, output = run_server([f"--engine={url}", "--print-config"])
        assert status == 0
        assert "s3cret-Pass" not in output
        status, output = run_server([f"--engine={url.replace('Pass', 'Wrong')}", "--port=0"])
        assert status == 1, output
        assert output.count("\n") == 1, output
        assert "s3cret" not in output
        status, output = run_server([f"--engine={url}:no-port", "--port=0"])
        assert status == 2, output
        assert "s3cret" not in output
        with ServerProcess([f"--engine={url}", "--port=0", "--log-level=debug"], cwd=Path("/")) as server:
            with server.client() as client:
                client.make()
                for path in ("/system", "/metrics", "/readyz", "/figures"):
                    answer = client.request("GET", path)
                    assert b"s3cret" not in answer.body, path
            valkey.kill()
            with server.client() as client:
                client.request("POST", API + "/keys/acquire").expect_problem(503, "storage-unavailable")
            server.allow("")
        assert "s3cret" not in server.log


def test_readyz_and_retry_after_while_valkey_is_down(valkey: Valkey, tmp_path: Path) -> None:
    """The server keeps running, reports why it isn't ready, and is ready again when Valkey is back."""
    with ServerProcess([f"--engine={valkey.url}", "--port=0"], cwd=tmp_path) as server:
        client = server.client()
        key = client.make()["key"]
        client.request("GET", "/readyz").expect(200)
        valkey.kill()
        refused = client.request("POST", f"{API}/keys/{key}/keepalive")
        refused.expect_problem(503, "storage-unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        client.request("GET", "/healthz").expect(200)
        away = client.request("GET", "/readyz")
        assert away.status == 503
        assert b"Valkey" in away.body
        valkey.start()
        eventually_blocking(lambda: client.request("GET", "/readyz").status == 200, "ready again", within=40)
        client.request("POST", f"{API}/keys/{key}/keepalive").expect(200)


# -------------------------------------------------------------------------------------------------------- TLS


@contextlib.contextmanager
def tls_before(port: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """A port that speaks TLS and passes all on to another; and the certificate to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out",
            str(certificate), "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    started: queue.Queue[int] = queue.Queue()
    stop = threading.Event()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, outer), pass_on(inner, writer))

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        started.put(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(stop.wait)
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield started.get(timeout=20), certificate
    finally:
        stop.set()
        thread.join()


def test_tls_connects_only_to_certificates_that_the_system_trusts(valkey: Valkey, tmp_path: Path) -> None:
    """SSL_CERT_FILE names another authority, as for other programs."""
    with tls_before(valkey.port, tmp_path) as (port, certificate):
        url = f"valkeys://127.0.0.1:{port}"
        status, output = run_server([f"--engine={url}", "--port=0"])
        assert status == 1, output
        assert output.count("\n") == 1, output
        flags = [f"--engine={url}", "--port=0"]
        with ServerProcess(flags, cwd=tmp_path, env={"SSL_CERT_FILE": str(certificate)}) as server:
            client = server.client()
            key = client.make()["key"]
            client.request("POST", f"{API}/keys/{key}/keepalive").expect(200)


@on_loop
async def test_without_a_right_to_channels_keys_are_freed_and_waiters_served(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiters get keys by polling, and a warning gives the reason for the delay."""
    valkey.ask("ACL", "SETUSER", "mute", "reset", "on", ">pass", "+@all", "~*", "resetchannels")
    url = f"valkey://mute:pass@127.0.0.1:{valkey.port}"
    async with engine_on(url) as engine, engine_on(url) as other:
        key = (await engine.generate(1))[0].key
        lease = await engine.acquire(None, 0)
        waiting = asyncio.ensure_future(other.acquire("w", 30))
        await eventually(lambda: other._waiters.announced, "the pool knows")
        assert (await engine.unblock(key, lease.lease)).changed
        assert (await waiting).key == key
        await eventually(lambda: "refuses the channels" in caplog.text, "it is logged")


def test_the_rights_that_the_docs_name_are_enough(valkey: Valkey, tmp_path: Path) -> None:
    """A user who may do that, and nothing else, serves: waiting, moving time and stopping included."""
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    found = re.search(
        r"A dedicated Valkey user needs `([^`]+)`, the keys `([^`]+)` and the channels `([^`]+)`", page
    )
    assert found is not None
    rights = [word.replace("POOL", "keypool") for part in found.groups() for word in part.split()]
    valkey.ask("ACL", "SETUSER", "keypool", "reset", "on", ">pass", *rights)
    flags = [f"--engine=valkey://keypool:pass@127.0.0.1:{valkey.port}", "--block-seconds=0.3", "--port=0"]
    with ServerProcess([*flags, "--restart-grace=1"], cwd=tmp_path) as server:
        client = server.client()
        key = client.make()["key"]
        client.acquire()
        assert client.request("POST", ACQUIRE, json={"wait": 30}).expect(200)["key"] == key
        client.request("GET", "/readyz").expect(200)
    assert valkey.ask("ACL", "LOG") == []
