"""The pool on Valkey or Redis, shared by any number of servers."""
