"""The keypool server: `python server.py --help` lists its settings.

Settings, logs, engine, application, serving, shutting down: each step lives in the module that it is called
from in keypool/launch.py, which `keypool serve` calls as well; keypool/serving.py has the order.
"""

from __future__ import annotations

import sys

from keypool.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
