"""The `keypool` command.

    main.py               entry point: dispatches a command, turns errors into an exit status
    arguments.py          the table of commands and flags; parser, help and completion derive from it
    status.py             exit statuses
    connection.py         the server's URL and the token, from environment and files
    output.py             tables on a terminal, tab-separated lines in a pipe, JSON, masked keys; notes and progress
    keys.py               generate, acquire, unblock, extend, keepalive, delete, quarantine, restore, list, show, find,
                          history, update, replace, stats
    imports.py            import FILE
    pools.py              pools, and the encryption of all
    input.py              files to be read, or standard input
    run.py                run -- COMMAND
    signal_forwarding.py  signals that `run` passes on; signals that wait until a call is answered
    events.py             follows the server's feed
    holders.py            owners, waiters, and rare events
    completion.py         completion scripts for bash, zsh and fish

The package imports the client and nothing of the server. `serve`, `token`, `migrate`, `backup` and `verify` live
in keypool/server/ and are imported when they are called, as is Tornado, which `events` needs.
"""
