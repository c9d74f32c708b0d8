"""The keypool server: `python server.py --help` lists its settings.

Settings, logs, engine, application, serving, shutting down: each step lives in the module that it is called
from in keypool/launch.py, which `keypool serve` calls as well; keypool/serving.py has the order.
"""

from __future__ import annotations

import os
import signal
import sys

for number in (signal.SIGINT, signal.SIGTERM):  # until serving.py takes them over: nothing is begun yet
    signal.signal(number, lambda *_: os._exit(0))

from keypool.launch import main  # noqa: E402 - takes some tenths of a second

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
