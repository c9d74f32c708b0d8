"""What the dashboard counts with: history, throttle, keys that expire soon. No server, no clock."""

from __future__ import annotations

import json

import pytest

from keypool.api.throttle import ADDRESSES, OF_ALL, TokenBuckets
from keypool.core.answers import Stats
from keypool.core.pool import Pool
from keypool.core.rules import PoolRules
from keypool.web.history import MINUTES, SECONDS, History

NOON = 1_800_000_000.0  # a whole minute


def stats(acquired: int = 0, available: int = 0, cooling: int = 0, cooled: int = 0) -> Stats:
    """Numbers of which these matter."""
    numbers = dict.fromkeys(Stats.__struct_fields__[:-3], 0)
    given = {"acquired": acquired, "available": available, "cooling": cooling, "cooled": cooled}
    return Stats(**(numbers | given), uptime=1.0, engine="test", version="0")


def column(history: History, name: str) -> list[int]:
    """One series, by the second."""
    return history.seconds.columns()[name]


def test_each_second_has_what_happened_in_it() -> None:
    """The first one only says where counting starts."""
    history = History()
    for second, acquired in enumerate([100, 103, 103, 110]):
        history.add(NOON + second + 0.01, stats(acquired, available=second))
    assert column(history, "acquired") == [3, 0, 7]
    assert column(history, "available") == [1, 2, 3]


def test_cooldowns_are_in_the_history() -> None:
    """How many keys cool, and how many cooldowns began in each second."""
    history = History()
    for second, (cooling, cooled) in enumerate([(1, 1), (3, 4), (2, 4)]):
        history.add(NOON + second, stats(cooling=cooling, cooled=cooled))
    assert column(history, "cooling") == [3, 2]
    assert column(history, "cooled") == [3, 0]
    assert column(history, "quarantined") == [0, 0]


def test_a_second_that_was_missed_gets_its_share() -> None:
    """Nothing is lost from the sum, and the axis stays right."""
    history = History()
    history.add(NOON, stats(0))
    history.add(NOON + 4.3, stats(10))
    assert column(history, "acquired") == [2, 2, 3, 3]
    assert history.seconds.end == NOON + 4


def test_a_second_that_is_asked_twice_is_taken_once() -> None:
    """What happened in between belongs to the next."""
    history = History()
    history.add(NOON, stats(0))
    history.add(NOON + 1.1, stats(1))
    history.add(NOON + 1.9, stats(5))
    history.add(NOON + 2.1, stats(6))
    assert column(history, "acquired") == [1, 5]


def test_minutes_are_sums_of_seconds() -> None:
    """They begin and end on the clock's own minutes."""
    history = History()
    for second in range(200):
        history.add(NOON + second, stats(acquired=2 * second, available=second))
    minutes = history.minutes.columns()
    assert minutes["acquired"] == [120, 120, 120]
    assert minutes["available"] == [60, 120, 180]
    assert history.minutes.end % 60 == 0


def test_memory_is_bounded_and_a_long_sleep_is_cheap() -> None:
    """A laptop that slept for a week."""
    history = History()
    history.add(NOON, stats(0))
    history.add(NOON + 7 * 86_400, stats(9_000))
    assert len(history.seconds.samples) == SECONDS
    assert sum(column(history, "acquired")) == 9_000
    assert history.minutes.samples.maxlen == MINUTES


def test_counters_that_fall_count_nothing() -> None:
    """Another pool behind the same dashboard is no negative number of calls."""
    history = History()
    for second, acquired in enumerate([50, 10, 12]):
        history.add(NOON + second, stats(acquired))
    assert column(history, "acquired") == [0, 2]


def restarted(earlier: History) -> History:
    """The history of the next run of the server."""
    later = History()
    later.restore(*earlier.kept())
    return later


def test_a_history_goes_on_after_a_restart() -> None:
    """With zeros for the stop, also in the sums of minutes. What the counters grew by in it counts nowhere."""
    history = History()
    for second in range(71):  # until ten seconds after the minute
        history.add(NOON + second, stats(acquired=second, available=5))
    history = restarted(history)
    history.add(NOON + 90, stats(acquired=1_000, available=6))
    for second in range(91, 301):
        history.add(NOON + second, stats(acquired=1_000 + second - 90, available=6))
    assert column(history, "acquired") == [1] * 70 + [0] * 20 + [1] * 210
    assert column(history, "available") == [5] * 70 + [0] * 20 + [6] * 210
    minutes = history.minutes.columns()
    assert minutes["acquired"] == [60, 10 + 30, 60, 60, 60]
    assert minutes["available"] == [5, 6, 6, 6, 6]
    assert (history.seconds.end, history.minutes.end) == (NOON + 300, NOON + 300)


@pytest.mark.parametrize("stop", [60, 61, 119, 120])
@pytest.mark.parametrize("start", [121, 122, 179, 180, 181, 500, 3_600, 90_000, 1_000_000])
def test_minutes_are_sums_of_seconds_over_a_stop(stop: int, start: int) -> None:
    """However long it was, and wherever in their minutes its ends are."""
    history = History()
    for second in range(stop + 1):
        history.add(NOON + second, stats(acquired=second))
    history = restarted(history)
    for second in range(start, start + 130):
        history.add(NOON + second, stats(acquired=second))
    end = (start + 129) // 60
    assert history.minutes.end == NOON + 60 * end
    expected = dict.fromkeys(range(1, end + 1), 0)
    for second in [*range(1, stop + 1), *range(start + 1, start + 130)]:
        if (minute := -(-second // 60)) <= end:
            expected[minute] += 1
    assert history.minutes.columns()["acquired"] == list(expected.values())[-MINUTES:]
    seconds = column(history, "acquired")
    assert seconds[-130:] == [0] + [1] * 129
    assert len(seconds) == min(SECONDS, start + 129)
    assert sum(seconds[:-130]) == min(stop, max(0, stop + SECONDS - (start + 129)))


def test_samples_from_the_future_are_dropped() -> None:
    """The clock was set back while the server was stopped."""
    history = History()
    for second in range(301):
        history.add(NOON + second, stats(acquired=second))
    history = restarted(history)
    history.add(NOON + 130, stats(acquired=400))
    history.add(NOON + 131, stats(acquired=402))
    assert column(history, "acquired") == [1] * 130 + [2]
    assert history.minutes.columns()["acquired"] == [60, 60]
    for second in range(132, 181):
        history.add(NOON + second, stats(acquired=402))
    assert history.minutes.columns()["acquired"] == [60, 60, 12]
    assert history.seconds.end == NOON + 180


def test_a_clock_that_was_years_ahead_leaves_nothing() -> None:
    """A machine without a battery, whose clock was wrong at first."""
    history = History()
    for second in range(301):
        history.add(NOON + 1e8 + second, stats(acquired=second))
    history = restarted(history)
    for second in range(61):
        history.add(NOON + second, stats(acquired=second))
    assert column(history, "acquired") == [1] * 60
    assert history.minutes.columns()["acquired"] == [60]
    assert history.minutes.end == NOON + 60


def test_a_sleep_leaves_no_gap_in_the_minutes() -> None:
    """Those of the sleep have zeros, until the last 15 of them."""
    history = History()
    for second in range(121):
        history.add(NOON + second, stats(acquired=second))
    history.add(NOON + 7_200, stats(acquired=120 + SECONDS))
    assert history.minutes.columns()["acquired"] == [60, 60] + [0] * 103 + [60] * 15


def test_the_last_minutes_of_one_number() -> None:
    """As the tile of refused acquires has it."""
    history = History()
    for second in range(400):
        history.add(NOON + second, stats(acquired=second))
    assert history.within(300, "acquired") == 300


def test_its_json_is_made_once_a_second() -> None:
    """Columns of the same length, and the moment of the latest sample."""
    history = History()
    history.add(NOON, stats(0))
    history.add(NOON + 1, stats(2))
    told = json.loads(bytes(history.encoded()))
    assert told["seconds"]["end"] == "2027-01-15T08:00:01.000Z"
    assert told["seconds"]["acquired"] == [2]
    assert told["seconds"]["counted"]["acquired"] == 2
    assert told["minutes"]["acquired"] == []
    assert bytes(history.encoded()) == bytes(history.encoded())


# ------------------------------------------------------------------------------------------------- throttle


def test_a_burst_and_then_one_turn_each_twelve_seconds() -> None:
    """An empty bucket says how long until there is a turn again; what is taken in vain does not make it longer."""
    buckets = TokenBuckets(5, 12.0)
    assert [buckets.take("192.0.2.1", 100) for _ in range(5)] == [0] * 5
    for _ in range(100):
        assert buckets.take("192.0.2.1", 100) == pytest.approx(12)
    assert buckets.take("192.0.2.2", 100) == 0
    assert buckets.take("192.0.2.1", 112.1) == 0
    assert buckets.take("192.0.2.1", 112.2) > 11
    assert [buckets.take("192.0.2.1", 300) for _ in range(5)] == [0] * 5


def test_turns_on_credit_make_the_wait_longer_up_to_the_debt() -> None:
    """A caller that goes on waits longer each time, a second at most, and owes no more than that."""
    buckets = TokenBuckets(30, 1 / 3, debt=1.0)
    waits = [buckets.take("192.0.2.1", 0) for _ in range(40)]
    assert waits[:30] == [0] * 30
    assert waits[30:33] == pytest.approx([1 / 3, 2 / 3, 1])
    assert waits[33:] == pytest.approx([4 / 3] * 7)
    assert buckets.take("192.0.2.1", 12) == 0


def test_one_network_of_ipv6_is_one_address() -> None:
    """One person has 2**64 of them; an IPv4 address written as IPv6 is itself."""
    buckets = TokenBuckets(1, 12.0)
    assert buckets.take("2001:db8::1", 0) == 0
    assert buckets.take("2001:db8::ffff", 0) > 0
    assert buckets.take("2001:db8:0:1::1", 0) == 0
    assert buckets.take("::ffff:192.0.2.1", 0) == 0
    assert buckets.take("::ffff:192.0.2.2", 0) == 0
    assert buckets.take("192.0.2.1", 0) > 0


def test_a_botnet_is_slowed_down_and_costs_little() -> None:
    """Many addresses share a rate, and a bounded memory."""
    buckets = TokenBuckets(5, 12.0)
    assert not any(buckets.take(f"host-{number}", 0) for number in range(5 * OF_ALL))
    assert buckets.take("another-host", 0) > 0
    for number in range(ADDRESSES + 10):
        buckets.take(f"host-{number}", 0)
    assert len(buckets._full_at) <= ADDRESSES


# -------------------------------------------------------------------------------------------- expiring soon


def test_keys_that_expire_soon_are_counted() -> None:
    """By their deadline, to a 64th of a second; a keepalive takes one out."""
    texts = iter(f"key-text-number-{n:05}" for n in range(100))
    pool = Pool(
        PoolRules(max_keys=100),
        new_text=lambda: next(texts),
        random=lambda: 0.0,
    )
    first = pool.generate(1000.0)
    pool.generate(1100.0)
    assert pool.expiring(1299.9) == 0
    assert pool.expiring(1300.1) == 1
    assert pool.expiring(2000.0) == 2
    pool.keepalive(first, 1200.0)
    assert pool.expiring(1450.0) == 1
