"""The rules of the pool, pure: no clock, no event loop, no I/O."""
