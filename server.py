"""The keypool server: `python server.py --help` lists its settings.

Settings, logs, engine, application, serving, shutting down: each step lives in the module that it is called
from in keypool/server/launch.py, which `keypool serve` calls as well; keypool/server/serving.py has the order.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from keypool.early_exit import end_quietly

    end_quietly()

    from keypool.server.launch import main  # takes some tenths of a second

    sys.exit(main(sys.argv[1:]))
