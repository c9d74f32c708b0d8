"""Starting a server: what `python server.py` and `keypool serve` both do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from keypool import in_force, logs, runtime
from keypool.errors import SettingsError, StartError
from keypool.serving import serve
from keypool.settings import load


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop. Exit status 0 after a stop, 1 if it can't start, 2 for a wrong setting."""
    try:
        settings = load([word for word in argv if word != in_force.FLAG], os.environ)
        if in_force.FLAG in argv:
            print(in_force.in_force(settings))
            return 0
        logs.configure(settings.log_level, settings.log_format)
        runtime.spare_the_old_generation()
        runtime.run(serve(settings))
    except SettingsError as error:
        print(f"keypool: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"keypool: {error}", file=sys.stderr)
        return 1
