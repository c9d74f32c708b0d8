"""The server as its users start it, `server.py` in a process of its own: for what only the whole of it can show."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.load import Address
from bench.process import rss

_ROOT = Path(__file__).parents[1]
_READY = re.compile(r"ready on http://[^:]+:(\d+)/")


def without_settings() -> dict[str, str]:
    """The environment, but for what it sets for a keypool server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KEYPOOL_")}


class RealServer:
    """A running server.py with these flags, in a folder of its own; its log is in `log`.

    `files` is how many files it may have open, if that is fewer than usual.
    """

    def __init__(self, *flags: str, files: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="keypool-bench-")
        self.log = Path(self._folder.name) / "log"
        limited = [] if files is None else ["prlimit", f"--nofile={files}:{files}", "--"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*limited, sys.executable, str(_ROOT / "server.py"), "--port=0", *flags],
                cwd=self._folder.name, env=without_settings(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.address = Address(self._wait_for_port(), self._process.pid)

    def _wait_for_port(self) -> int:
        while self._process.poll() is None:
            found = _READY.search(self.log.read_text())
            if found:
                return int(found[1])
            time.sleep(0.05)
        raise ChildProcessError(self.log.read_text())

    def rss(self) -> int:
        """Bytes of memory of the server and of the writer that it started."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        writers = children.read_text().split() if children.exists() else []
        return rss(pid) + sum(rss(int(writer)) for writer in writers)

    def warnings(self) -> list[str]:
        """What it has logged of level warning and above."""
        return [
            line
            for line in self.log.read_text().splitlines()
            if re.search(r" (WARNING|ERROR|CRITICAL) ", line)
        ]

    def stop(self) -> int:
        """End it; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(30)
        self._folder.cleanup()
        return status

    def __enter__(self) -> RealServer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
