"""The states of the journal (journal.py), with their transitions."""

from __future__ import annotations

import enum


class Storage(enum.Enum):
    """The health of storage.

    | from           | to       | when                                                    |
    | -------------- | -------- | ------------------------------------------------------- |
    | UP             | SLOW     | a commit has taken _SLOW seconds                        |
    | SLOW           | UP       | that commit is done                                     |
    | any            | DOWN     | an error, the writer died, or a commit took _OUTAGE s   |
    | DOWN           | GRANTING | a batch is committed                                    |
    | GRANTING       | UP       | the grace is committed, within _OUTAGE seconds          |

    Expiry is suspended in all states but UP. In DOWN and GRANTING (`failing` is not None), calls that change something
    are refused.
    """

    UP = enum.auto()
    SLOW = enum.auto()
    DOWN = enum.auto()
    GRANTING = enum.auto()


class Activity(enum.Enum):
    """What the journal is doing with its writer.

    | from                      | to                | when                                                      |
    | ------------------------- | ----------------- | --------------------------------------------------------- |
    | IDLE                      | SCHEDULED         | a change: it is sent at the end of this turn              |
    | IDLE                      | LOOKING           | no commit for some seconds                                |
    | IDLE, SCHEDULED           | LOOKING           | a request that isn't a batch, such as the end of a rekey  |
    | SCHEDULED                 | IDLE              | no call waits yet, and a call in slices changes more      |
    | SCHEDULED                 | IN_FLIGHT         | the batch is sent, or its first part                      |
    | IN_FLIGHT, LOOKING        | IN_FLIGHT or IDLE | success, and there are or aren't other changes            |
    | IN_FLIGHT, LOOKING        | GRANTING          | success after an outage: each key gets the grace          |
    | GRANTING                  | IN_FLIGHT         | all keys have it: it is sent with all changes             |
    | any but RESTARTING        | BACKING_OFF       | the writer reports an error, or dies                      |
    | BACKING_OFF               | IN_FLIGHT         | the back-off is over: the batch is repeated               |
    | BACKING_OFF               | RESTARTING        | the back-off is over, and the writer is dead              |
    | RESTARTING                | IN_FLIGHT         | another writer was started: the batch is repeated         |
    | RESTARTING                | BACKING_OFF       | no writer could be started                                |

    A batch whose commit hangs stays IN_FLIGHT: the journal waits for its verdict, but calls don't. `close` waits while
    the activity is IN_FLIGHT, LOOKING, GRANTING or RESTARTING.
    """

    IDLE = enum.auto()
    SCHEDULED = enum.auto()
    IN_FLIGHT = enum.auto()
    LOOKING = enum.auto()
    GRANTING = enum.auto()
    BACKING_OFF = enum.auto()
    RESTARTING = enum.auto()


class Life(enum.Enum):
    """The life of the journal; each step happens once. In ENDED, the end of the writer is expected."""

    OPENING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    ENDED = enum.auto()
