"""The application: the one list of routes."""

from __future__ import annotations

import logging

from tornado.routing import PathMatches, Rule
from tornado.web import Application

from keypool.auth import Access
from keypool.engine import Engine
from keypool.handlers.api import ApiRouter
from keypool.handlers.dispatch import Dispatcher
from keypool.handlers.inflight import InFlight
from keypool.handlers.legacy import LEGACY
from keypool.handlers.pages import Health, Nothing, Ready
from keypool.operations import OPERATIONS


def make_app(engine: Engine, access: Access) -> Application:
    """The Tornado application over an engine.

    Of its settings, `in_flight` counts the requests being answered, and `dispatcher` has the engine, which
    may be put in place later (engine/loading.py).
    """
    in_flight = InFlight()
    dispatcher = Dispatcher(engine, access, OPERATIONS + LEGACY)
    shared = {"access": access, "dispatcher": dispatcher, "in_flight": in_flight}
    return Application(
        [
            Rule(PathMatches(r"/api(?:/.*)?"), ApiRouter(dispatcher, in_flight)),
            (r"/healthz", Health, shared),
            (r"/readyz", Ready, shared),
            (r".*", Nothing, shared),
        ],
        in_flight=in_flight,
        dispatcher=dispatcher,
        log=logging.getLogger("keypool.pages"),
        log_function=lambda handler: None,  # its line would hold the target, and so perhaps a key
    )
