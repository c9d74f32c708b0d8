"""The keypool server: `python server.py --help` lists its settings.

Settings, logs, engine, application, serving, shutting down: each step lives in the module that it is called
from here; keypool/serving.py has the order.
"""

from __future__ import annotations

import os
import sys

from keypool import logs, runtime
from keypool.errors import SettingsError, StartError
from keypool.serving import serve
from keypool.settings import load


def main() -> int:
    """Serve until told to stop. Exit status 0 after a stop, 1 if it can't start, 2 for a wrong setting."""
    try:
        settings = load(sys.argv[1:], os.environ)
        logs.configure(settings.log_level, settings.log_format)
        runtime.spare_the_old_generation()
        runtime.run(serve(settings))
    except SettingsError as error:
        print(f"keypool: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"keypool: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
