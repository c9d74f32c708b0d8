"""The application: the one list of routes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NoReturn

from tornado.httputil import ParseBodyConfig, ParseMultipartConfig, set_parse_body_config
from tornado.routing import PathMatches, Rule
from tornado.web import Application

from keypool.api.auth import Access
from keypool.api.dispatch import Dispatcher
from keypool.api.first_version import LEGACY
from keypool.api.openapi import describing
from keypool.api.operations import ANYONE, BASE, OPERATIONS, Call, Operation
from keypool.config.limits import MAX_NAME
from keypool.config.settings import Settings
from keypool.core import errors
from keypool.engine import Engine, Loading
from keypool.http.api_call import InFlight
from keypool.http.fast_call import FastApi
from keypool.http.tornado_call import ApiRouter
from keypool.web.dashboard import Dashboard
from keypool.web.feed_handler import FeedHandler
from keypool.web.handlers import Calls, Events, Figures, KeyPanel, Keys, Overview, Static, System
from keypool.web.pages import Health, Nothing, Ready
from keypool.web.scrape import Metrics, MetricSources
from keypool.web.signin import SignIn, SignOut


class KeypoolApplication(Application):
    """Tornado's, which takes the calls of the API as bytes from a server that hands them over so (http1)."""

    def __init__(
        self, rules: list[Any], dispatcher: Dispatcher, in_flight: InFlight, **settings: Any
    ) -> None:
        super().__init__(
            rules,
            dispatcher=dispatcher,
            in_flight=in_flight,
            log=logging.getLogger("keypool.pages"),
            log_function=lambda handler: None,  # its line would hold the target, and so perhaps a key
            **settings,
        )
        self.forget_callers()

    def forget_callers(self) -> None:
        """Have each request's headers checked anew, as the tokens have changed. The server has to be told, too."""
        # What the server remembers of headers is noted by one FastApi, and worth nothing to another.
        dispatcher, in_flight = self.settings["dispatcher"], self.settings["in_flight"]
        self.start_raw_request = FastApi(dispatcher, in_flight).start


# Tornado remembers names of headers, those in the parts of a form as well, and has no use for such parts here.
set_parse_body_config(ParseBodyConfig(multipart=ParseMultipartConfig(max_part_header_size=2 * MAX_NAME)))


def make_app(engine: Engine, access: Access, settings: Settings | None = None) -> KeypoolApplication:
    """The Tornado application over an engine. Needs a running loop.

    Of its settings, `in_flight` counts the requests being answered, `dispatcher` has the calls, `dashboard` is
    to be drained at a stop, and `metric_sources` is what /metrics shows beside the engine's.
    """
    in_flight = InFlight()
    calls = OPERATIONS + LEGACY
    dispatcher = Dispatcher(engine, access, (*calls, describing(calls, access.open)))
    shared = {"engine": engine, "access": access, "dispatcher": dispatcher, "in_flight": in_flight}
    settings = settings or Settings()
    dashboard = Dashboard(engine, access, settings)
    sources = MetricSources({"loop_stall_seconds": dashboard.stall.histogram}, lambda: dashboard.feed.viewers)
    sources.limits |= {name: getattr(settings, name) for name in ("max_keys", "max_waiters", "max_viewers")}
    return KeypoolApplication(
        [
            (f"{BASE}/feed", FeedHandler, shared),
            Rule(PathMatches(r"/api(?:/.*)?"), ApiRouter(dispatcher, in_flight)),
            (r"/healthz", Health, shared),
            (r"/readyz", Ready, shared),
            (r"/metrics", Metrics, shared),
            (r"/", Overview, shared),
            (r"/keys", Keys, shared),
            (r"/keys/([0-9]+)", KeyPanel, shared),
            (r"/events", Events, shared),
            (r"/system", System, shared),
            (r"/calls", Calls, shared),
            (r"/figures", Figures, shared),
            (r"/login", SignIn, shared),
            (r"/logout", SignOut, shared),
            (r"/static/([0-9a-f]+)/(.+)", Static, shared),
            (r".*", Nothing, shared),
        ],
        in_flight=in_flight,
        dispatcher=dispatcher,
        dashboard=dashboard,
        metric_sources=sources,
        cross_origin_protection=True,
        websocket_ping_interval=60,  # a viewer that isn't there any more leaves within two minutes
        websocket_max_message_size=4096,  # viewers have nothing to say
    )


async def _refuse_loading(engine: Engine, call: Call) -> NoReturn:
    raise errors.Loading


def make_loading_app(access: Access) -> KeypoolApplication:
    """What stands in for the application while the keys are read: /healthz, /readyz, and 503 for the rest."""
    in_flight = InFlight()
    calls = OPERATIONS + LEGACY
    # The feed is refused like a call, and to anyone: there are no sessions yet to know a dashboard by.
    feed = Operation("feed", "GET", "/feed", ANYONE, "", _refuse_loading, None, changes=False)
    all_calls = (*calls, describing(calls, access.open), feed)
    loading = [replace(operation, run=_refuse_loading, head=None) for operation in all_calls]
    dispatcher = Dispatcher(Loading(), access, loading)
    shared = {"engine": Loading(), "access": access, "dispatcher": dispatcher, "in_flight": in_flight}
    return KeypoolApplication(
        [
            Rule(PathMatches(r"/api(?:/.*)?"), ApiRouter(dispatcher, in_flight)),
            (r"/healthz", Health, shared),
            (r".*", Ready, shared),
        ],
        in_flight=in_flight,
        dispatcher=dispatcher,
    )
