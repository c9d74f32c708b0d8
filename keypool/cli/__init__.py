"""The `keypool` command: what its modules are.

    main.py         words to a command, errors to an exit status
    words.py        every subcommand and flag, once; help and completion derive from it
    status.py       the exit statuses
    connect.py      where the server is, and the token: environment and files, never arguments
    output.py       tables on a terminal, plain lines in a pipe, JSON if asked; keys masked unless asked
    progress.py     the bar of long batches
    keys.py         generate, acquire, unblock, keepalive, delete, list, show
    watching.py     stats --watch, keepalive --watch
    running.py      run -- COMMAND
    following.py    events
    completing.py   completion for bash, zsh and fish

A command that talks to a server needs the standard library only; `serve`, `events` and `migrate` (which is
keypool/server/migrate_command.py) import what they need when they are asked for.
"""
