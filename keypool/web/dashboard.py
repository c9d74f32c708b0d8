"""What the dashboard's handlers share, and its one-second ticker.

    Dashboard = views of pools (charts and feed) + sessions + loop stall + templates and assets

Once a second it takes a sample of each pool that has a view; everything else happens at a request. Pages are rendered
here; their scripts keep them live from the feed, and poll `/figures` for what the feed doesn't have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import BytecodeCache, Environment, FileSystemLoader, StrictUndefined

from keypool import __version__
from keypool.api.auth import Access
from keypool.config.limits import Limits, allowed_viewers
from keypool.config.secrets_keys import SECRETS_VARIABLE
from keypool.config.settings import OPTIONS, Settings
from keypool.config.tokens import ROLES, token_variables
from keypool.core.answers import HistoryRow, RareEventRow, Row, Stats
from keypool.core.errors import KeypoolError, UnknownPool
from keypool.core.events import By, Event
from keypool.core.history import How
from keypool.core.keys import State
from keypool.engine import Engine, Pools
from keypool.engine.valkey.url import without_password
from keypool.ops.advice import ADVICE
from keypool.ops.histogram import CallMetrics, Histogram
from keypool.web.assets import Assets, folder
from keypool.web.feed import ViewerLimit
from keypool.web.health import Facts, sentence, tiles_warned, verdicts
from keypool.web.kept_charts import ChartsKeeper
from keypool.web.latency import LATELY, Latency
from keypool.web.loop_lag import LoopStall
from keypool.web.pool_view import PoolView
from keypool.web.session import Sessions

HTML = "text/html; charset=UTF-8"
PAGE_HEADERS = (
    (
        "Content-Security-Policy",
        (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        ),
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    # Not no-referrer: a browser would then send a form's Origin as null, which is refused.
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)

FIGURE_NAMES = {
    "commits": "Commits",
    "commit_seconds": "Latest commit took",
    "commit_rows": "Keys in the latest commit",
    "pipelines": "Pipelines to Valkey",
    "pipeline_seconds": "Latest pipeline took",
    "pipeline_commands": "Commands in the latest pipeline",
}
"""What the System page calls an engine's figures."""
_RESTORE_PAUSE = 0.01  # seconds
_log = logging.getLogger("keypool.dashboard")


class Dashboard:
    """The state behind the dashboard's pages. Needs a running loop; `drain` stops its timers."""

    def __init__(self, pools: Pools, access: Access, settings: Settings) -> None:
        self.pools = pools
        self.access = access
        self.settings = settings
        self.viewers = ViewerLimit(allowed_viewers(settings.max_viewers, Limits()))
        self._charts = ChartsKeeper(pools)
        self._views: dict[str, PoolView] = {}
        self.sessions = Sessions(access)
        self.stall = LoopStall()
        self.calls: CallMetrics | None = None
        """The calls of this server, once there are any."""
        self.latencies = {
            "calls": Latency(lambda: self.calls.seconds.values() if self.calls else ()),
            "commits": Latency(lambda: _commits(pools.default)),
            "stalls": Latency(lambda: [self.stall.histogram]),
        }
        self.assets = Assets()
        self._templates = make_templates()
        self._templates.globals.update(
            asset=self.assets.url,
            version=__version__,
            settings=settings,
            states=list(State),
            advice={each.code: each for each in ADVICE},
            lately=LATELY // 60,
            figure_names=FIGURE_NAMES,
        )
        for name in self._templates.list_templates():
            self._templates.get_template(name)  # compiled now, as it would stall the first request for 40 ms
        self.counting = asyncio.Event()
        """Set after the first sample; calls before it are missing from the charts."""
        self._task = asyncio.create_task(self._count_seconds())

    def drain(self) -> None:
        """Close the feeds and stop the timers."""
        for view in self._views.values():
            view.feed.drain()
        self.stall.close()
        self._task.cancel()

    def view(self, engine: Engine) -> PoolView:
        """The view of a pool, a new one if nobody has looked at it yet. O(1)."""
        name = engine.pool_name
        found = self._views.get(name)
        if found is None or found.engine is not engine:  # a pool of this name was deleted, and made again
            if found is not None:
                found.feed.drain()
            found = self._views[name] = PoolView(engine, self.viewers)
            self._charts.restore(found)
        return found

    def render(self, template: str, **facts: Any) -> bytes:
        """The page of a template."""
        return self._templates.get_template(template).render(facts).encode()

    def error_page(self, error: KeypoolError, status: int, request_id: str) -> bytes:
        """The page for an error."""
        return self.render("error.html", error=error, status=status, request_id=request_id, theme="")

    def figures(self, view: PoolView, base: str, stats: Stats) -> dict[str, Any]:
        """The members of /figures: verdicts, and numbers that the feed of a pool doesn't send. O(1)."""
        facts = self._facts(view, stats)
        found = verdicts(facts, base)
        return {
            "ready": facts.not_ready,
            "health": found,
            "warned": tiles_warned(found, facts),
            "expiring": view.expiring,
            "window": view.window,
            **view.recent,
            "latency": {name: each.both() for name, each in (*self.latencies.items(), ("waits", view.waits))},
            "viewers": self.viewers.count,
            "max_viewers": self.settings.max_viewers,
            "loop_stall_seconds": round(self.stall.worst, 4),
            "engine": self.pools.default.figures(),
        }

    def health(self, view: PoolView, base: str) -> list[dict[str, Any]]:
        """The verdicts as of the latest sample of a pool, the most urgent first. O(1)."""
        return [] if view.stats is None else verdicts(self._facts(view, view.stats), base)

    def _facts(self, view: PoolView, stats: Stats) -> Facts:
        return Facts(
            stats=stats,
            not_ready=self.readiness(),
            degraded=view.engine.degraded,
            pool_draining=view.engine.pool_draining,
            expiring=view.expiring,
            window=view.window,
            recent=view.recent,
            recent_seconds=LATELY,
            commit_p99=self.latencies["commits"].p99_of(100),
            stall_p99=self.latencies["stalls"].p99_of(1000),
            in_clear=in_clear(self.settings),
        )

    def readiness(self) -> dict[str, str] | None:
        """Why calls aren't served; None if they are."""
        try:
            self.pools.default.ready()
        except KeypoolError as error:
            return {"code": error.code, "title": error.title, "detail": error.detail}
        return None

    async def keep_charts(self, seconds: float) -> None:
        """Keep the charts at a stop, within these `seconds`. After `drain`."""
        await self._charts.keep_last(self._views.values(), seconds)

    async def _count_seconds(self) -> None:
        kept = await self._charts.read()
        self.view(self.pools.default)
        while True:
            for view in list(self._views.values()):
                await self._sample(view)
            for latency in self.latencies.values():
                latency.sample()
            await self._share_sign_outs()
            self.counting.set()
            # The start doesn't wait for the charts of other pools, and calls are served between two of them.
            while kept:
                with contextlib.suppress(UnknownPool):
                    self.view(self.pools.get(kept.pop()))
                await asyncio.sleep(_RESTORE_PAUSE)
            self._charts.keep_soon(self._views.values())
            await asyncio.sleep(1.005 - time.time() % 1)  # just after the second has begun

    async def _sample(self, view: PoolView) -> None:
        try:
            if self.pools.get(view.engine.pool_name) is view.engine:
                await view.sample()
            else:
                self._forget(view)
        except UnknownPool:
            self._forget(view)
        except KeypoolError as error:
            _log.debug("no sample this second: %s", error.detail)
        except Exception:
            _log.exception("no sample this second")

    def _forget(self, view: PoolView) -> None:
        """Drop the view of a pool that is gone."""
        name = view.engine.pool_name
        if self._views.get(name) is view:
            del self._views[name]
        view.feed.drain()

    async def _share_sign_outs(self) -> None:
        try:
            await self.sessions.share(self.pools.default)
        except KeypoolError as error:
            _log.debug("sign-outs could not be shared: %s", error.detail)
        except Exception:
            _log.exception("sign-outs could not be shared")


def settings_in_force(settings: Settings, access: Access) -> list[dict[str, str]]:
    """Every setting with its value and origin; for tokens, their number and how the audit log names them.

    Of secrets keys only their number.
    """
    callers = access.callers().values()
    rows = [
        {
            "flag": option.flag,
            "value": without_password(option.text(getattr(settings, option.name))),
            "origin": settings.origins.get(option.name, "default"),
            "about": option.about,
        }
        for option in OPTIONS
    ]
    names = sorted(caller.name for caller in callers if caller.name is not None)
    if names:
        row = next(row for row in rows if row["flag"] == "--tokens")
        row["value"] += f": {len(names)} set: {', '.join(names)}"
    for role in ROLES:
        marks = sorted(each.token for each in callers if each.role.value == role and each.name is None)
        rows.append(
            {
                "flag": token_variables(role)[0],
                "value": f"{len(marks)} set: {', '.join(f'{mark}…' for mark in marks)}" if marks else "none",
                "origin": settings.origins.get(f"{role}_tokens", "default"),
                "about": f"tokens of the role {role}, by the start of their digests as in the audit log",
            }
        )
    count = len(settings.secrets_keys)
    rows.append(
        {
            "flag": SECRETS_VARIABLE,
            "value": f"{count} set" if count else "none",
            "origin": settings.origins.get("secrets_keys", "default"),
            "about": "keys that encrypt the pool's keys at rest",
        }
    )
    return rows


def at_rest(settings: Settings) -> str:
    """How keys are protected where they are stored, in words."""
    if settings.secrets_keys:
        return "encrypted (AES-256-GCM)"
    if settings.engine != "embedded":
        return "not encrypted: everybody who can read this Valkey can read them; set KEYPOOL_SECRETS_KEY"
    if settings.data == ":memory:":
        return "not stored: this pool is in memory only"
    return "not encrypted: protected by the file's mode 0600 only; set KEYPOOL_SECRETS_KEY to encrypt them"


def in_clear(settings: Settings) -> bool:
    """Whether keys are written to the disk as they are."""
    return settings.engine == "embedded" and settings.data != ":memory:" and not settings.secrets_keys


def _commits(engine: Engine) -> list[Histogram]:
    return [each for name, each in engine.histograms().items() if name == "commit_seconds"]


def make_templates(compiled: BytecodeCache | None = None) -> Environment:
    """The templates, without what their pages take for granted; those `compiled` already needn't be again."""
    templates = Environment(
        loader=FileSystemLoader(folder("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        bytecode_cache=compiled,
    )
    templates.filters.update(
        number=number,
        length_of=length,
        span=span,
        report=report,
        origin=origin,
        ending=ending,
        duration=duration,
        alarm=alarm,
        attention=attention,
        sentence=sentence,
        utc=utc,
        elapsed=elapsed,
        whom=whom,
    )
    return templates


def number(value: float) -> str:
    """A count with thousands separators."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def length(seconds: float | None) -> str:
    """A length of time as a countdown shows it, 4:07 or 6 d 23 h; static/js/clock.js counts on from there."""
    if seconds is None:
        return ""
    whole = max(0, math.ceil(seconds))
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 60}:{whole % 60:02}"


def duration(seconds: float | None) -> str:
    """A short length of time with its unit. The same as in static/js/clock.js."""
    if seconds is None:
        return "none"
    if seconds < 1:
        return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f} ms"
    return f"{seconds:.1f} s"


def alarm(health: Sequence[Mapping[str, Any]]) -> str:
    """What the title of a tab begins with. The same as in static/js/alarm.js."""
    short = next((verdict["short"] for verdict in health if verdict["short"]), "")
    return f"(!) {short} · " if short else ""


def attention(count: int) -> str:
    """The headline of the verdicts. The same as in static/js/pages/overview.js."""
    if not count:
        return "All is well"
    return "One thing needs attention" if count == 1 else f"{count} things need attention"


def utc(at: str) -> str:
    """A moment of an answer in full, as a title has it. The same as utc() in static/js/lists.js."""
    return f"{at[:10]} {at[11:19]} UTC"


def elapsed(at: str) -> str:
    """How long it is since a moment of an answer; static/js/lists.js counts on from there."""
    return length(math.floor(max(0.0, time.time() - datetime.fromisoformat(at).timestamp())))


def span(seconds: float) -> str:
    """How long something lasted: 0.4 s, 42 s, 4:07."""
    return length(seconds) if seconds >= 60 else f"{seconds:.{1 if seconds < 10 else 0}f} s"


def report(row: Row) -> str:
    """The latest report on a key in words, and its failures in a row. The same as report() in static/js/rows.js."""
    words = [row.outcome.replace("_", " ")] if row.outcome is not None else []
    if row.failures:
        words.append(f"{row.failures} failure{'s' if row.failures > 1 else ''}")
    return ", ".join(words)


def origin(event: Event) -> str:
    """Who or what brought an event about, in words. The same as origin() in static/js/rows.js."""
    if event.by is By.HOLDER:
        return f"by {event.owner or 'holder'}"
    by = f"by {event.by} {event.actor}" if event.actor is not None else f"by {event.by}"
    return f"{by}, held by {event.owner}" if event.owner else by


def whom(event: Event | RareEventRow) -> str:
    """Who or what brought an event about, without whose lease it was. The same as whom() in static/js/rows.js."""
    return event.by if event.actor is None else f"{event.by} {event.actor}"


_ENDINGS = {
    How.UNBLOCKED: "unblocked",
    How.RELEASED: "released by deadline",
    How.REVOKED: "ended by an operator",
    How.EXPIRED: "expired with the key",
    How.DELETED: "deleted with the key",
}


def ending(past: HistoryRow) -> str:
    """How a lease ended, its report, and how often it was extended, in words."""
    words = [_ENDINGS[past.how]]
    if past.outcome is not None:
        words.append(past.outcome.replace("_", " "))
    if past.extended:
        words.append(f"extended {past.extended} time{'s' if past.extended > 1 else ''}")
    return ", ".join(words)
