"""keypool: a server that leases API keys, so that no two clients hold the same key at once.

This module holds the version and nothing else: ``--version``, ``/api/v1/stats`` and the package's metadata read it.
Importing it imports no other module.
"""

__version__ = "0.2.0"
