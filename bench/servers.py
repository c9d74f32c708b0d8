"""Servers as their users start them: `server.py` of this checkout, or of another one, in a process of its own."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path

from bench.load import Address
from bench.process import rss

ROOT = Path(__file__).resolve().parents[1]
_READY = re.compile(r"ready on http://\S+:(\d+)/")


def without_settings() -> dict[str, str]:
    """The environment without settings of a keypool server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KEYPOOL_")}


def add_old(parser: ArgumentParser) -> None:
    """Add the option `--old PATH`: another checkout, measured in turns with this one."""
    parser.add_argument(
        "--old",
        type=Path,
        metavar="PATH",
        help="another checkout, whose server is measured in turns with this one's",
    )


class Server:
    """A running server.py with these flags, in a folder of its own, where its log is.

    `tree` is the checkout it runs from. `files` limits how many files it may have open. `env` are further variables.
    """

    def __init__(
        self,
        *flags: str,
        tree: Path | None = None,
        files: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="keypool-bench-")
        self.log = Path(self._folder.name) / "log"
        limited = [] if files is None else ["prlimit", f"--nofile={files}:{files}", "--"]
        program = (tree or ROOT).resolve() / "server.py"
        self._command = [*limited, sys.executable, str(program), *flags]
        self._environment = without_settings() | dict(env or {})
        self._port = 0
        self.start()
        self.wait_until_ready()

    def start(self) -> None:
        """Start the process, on the port it had before, if any. Doesn't wait until it is ready."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command, f"--port={self._port}"],
                cwd=self._folder.name, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Raises ChildProcessError with the log if the server ends instead."""
        while self._process.poll() is None:
            found = _READY.search(self.log.read_text())
            if found:
                self._port = int(found[1])
                return
            time.sleep(0.02)
        raise ChildProcessError(self.log.read_text())

    @property
    def address(self) -> Address:
        """Its port and process."""
        return Address(self._port, self._process.pid)

    def status_of(self, path: str) -> int:
        """The status of a GET; 0 while the server doesn't listen."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            assert self._process.poll() is None, self.log.read_text()
            return 0
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name, labels included."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics") as page:
            lines = page.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    def rss(self) -> int:
        """Resident memory of the server and of its writer process, in bytes."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        writers = children.read_text().split() if children.exists() else []
        return rss(pid) + sum(rss(int(writer)) for writer in writers)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self._folder.cleanup()
