"""The application: all routes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from tornado.httputil import ParseBodyConfig, ParseMultipartConfig, set_parse_body_config
from tornado.routing import PathMatches, Rule
from tornado.web import Application

from keypool.api.auth import Access
from keypool.api.calls import BASE, Call
from keypool.api.dispatch import Dispatcher
from keypool.api.first_version import LEGACY
from keypool.api.openapi import describing
from keypool.api.operations import OPERATIONS, Operation
from keypool.config.limits import MAX_NAME
from keypool.config.settings import Settings
from keypool.core import errors
from keypool.engine import Engine, LoadingPools, Pools
from keypool.http.api_call import InFlight
from keypool.http.fast_call import FastApi
from keypool.http.tornado_call import ApiRouter
from keypool.web.dashboard import Dashboard
from keypool.web.feed_handler import FeedHandler
from keypool.web.handlers import (
    Calls,
    Events,
    Figures,
    KeyPanel,
    Keys,
    Overview,
    PoolList,
    Static,
    System,
)
from keypool.web.holders import OwnerList, TokenList, WaiterList
from keypool.web.pages import Health, PageHandler, Ready, UnknownPath
from keypool.web.scrape import Metrics, MetricSources
from keypool.web.signin import SignIn, SignOut

Pages = Sequence[tuple[str, type[PageHandler]]]
"""Patterns of paths with their handlers."""

_POOL = r"(/pools/[^/]+)?"  # of the paths of a pool other than `default`


class KeypoolApplication(Application):
    """A Tornado application that also takes API calls as bytes (`start_raw_request`), from the http1 server.

    `settings["in_flight"]` counts the requests being answered; `settings["dispatcher"]` has the calls.
    """

    def __init__(
        self,
        pools: Pools,
        access: Access,
        operations: Sequence[Operation],
        *,
        pages: Pages,
        before_api: Pages = (),
        **settings: Any,
    ) -> None:
        in_flight, dispatcher = InFlight(), Dispatcher(pools, access, operations)
        shared = {"pools": pools, "access": access, "dispatcher": dispatcher, "in_flight": in_flight}
        api = Rule(PathMatches(r"/api(?:/.*)?"), ApiRouter(dispatcher, in_flight))
        first, last = ([(path, handler, shared) for path, handler in some] for some in (before_api, pages))
        super().__init__(
            [*first, api, *last],
            dispatcher=dispatcher,
            in_flight=in_flight,
            log=logging.getLogger("keypool.pages"),
            log_function=lambda handler: None,  # Tornado's line has the target, which may hold a key
            **settings,
        )
        self.forget_callers()

    def forget_callers(self) -> None:
        """Invalidate cached header checks after a change of tokens. Call the server's `serve_app` afterwards."""
        # Entries of the server's cache belong to one FastApi, and another one ignores them.
        self.start_raw_request = FastApi(self.settings["dispatcher"], self.settings["in_flight"]).start


# Tornado caches header names, those of multipart forms as well; long ones are of no use there.
set_parse_body_config(ParseBodyConfig(multipart=ParseMultipartConfig(max_part_header_size=2 * MAX_NAME)))


def make_app(pools: Pools, access: Access, settings: Settings | None = None) -> KeypoolApplication:
    """The application over the pools of an engine. Needs a running loop.

    `settings["dashboard"]` has to be drained at a stop; `settings["metric_sources"]` feeds /metrics.
    """
    settings = settings or Settings()
    calls = OPERATIONS + LEGACY
    dashboard = Dashboard(pools, access, settings)
    sources = MetricSources(
        {"loop_stall_seconds": dashboard.stall.histogram}, lambda: dashboard.viewers.count
    )
    sources.limits |= {
        name: getattr(settings, name) for name in ("max_keys", "max_pools", "max_waiters", "max_viewers")
    }
    app = KeypoolApplication(
        pools,
        access,
        (*calls, describing(calls, access.open)),
        before_api=[(rf"{BASE}{_POOL}/feed", FeedHandler)],
        pages=[
            (r"/healthz", Health),
            (r"/readyz", Ready),
            (r"/metrics", Metrics),
            (r"/()", Overview),
            (r"(/pools/[^/]+)", Overview),
            (r"/pools", PoolList),
            (rf"{_POOL}/keys", Keys),
            (rf"{_POOL}/keys/([0-9]+)", KeyPanel),
            (rf"{_POOL}/owners", OwnerList),
            (rf"{_POOL}/waiters", WaiterList),
            (rf"{_POOL}/events", Events),
            (r"/tokens", TokenList),
            (r"/system", System),
            (r"/calls", Calls),
            (rf"{_POOL}/figures", Figures),
            (r"/login", SignIn),
            (r"/logout", SignOut),
            (r"/static/([0-9a-f]+)/(.+)", Static),
            (r".*", UnknownPath),
        ],
        dashboard=dashboard,
        metric_sources=sources,
        cross_origin_protection=True,
        websocket_ping_interval=60,  # a viewer that vanished without closing is dropped within two minutes
        websocket_max_message_size=4096,  # messages from viewers are ignored
    )
    dashboard.calls = app.settings["dispatcher"].calls
    return app


async def _refuse_loading(engine: Engine, call: Call) -> NoReturn:
    raise errors.Loading


def make_loading_app(access: Access) -> KeypoolApplication:
    """The application while the keys are loaded: /healthz, /readyz, and 503 for the rest."""
    calls = OPERATIONS + LEGACY
    all_calls = (*calls, describing(calls, access.open))
    return KeypoolApplication(
        LoadingPools(),
        access,
        [replace(operation, run=_refuse_loading, head=None) for operation in all_calls],
        # Sessions don't exist yet, so the feed can't check a role: it is refused like a page.
        before_api=[(rf"{BASE}{_POOL}/feed", Ready)],
        pages=[(r"/healthz", Health), (r".*", Ready)],
    )
