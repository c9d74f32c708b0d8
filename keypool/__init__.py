"""keypool: a server that leases API keys, so that no two clients hold the same key at once.

This module holds the version and nothing else: the one place it is written down, read by ``--version``, by
``/api/v1/stats`` and by the package's metadata. Importing it imports no other module.
"""

__version__ = "0.2.0"
