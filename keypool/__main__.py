"""`python -m keypool` is the `keypool` command."""

from __future__ import annotations

import sys

from keypool.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
