"""Devices that answer at once, and one that takes its time: with versions spaced out, it has a part in them."""

from collections.abc import Callable
from typing import Final

import pytest

from support.small_world import Bench, Device, ternary_block

Make = Callable[..., Bench]
TRAINS_S: Final = 60.0  # the slow device, from a head to its update
STALE_ABOVE: Final = 4  # versions


def flood(bench: Bench, devices: list[Device]) -> None:
    """All of these send an update on each version at once, while the slow device trains."""
    ends = bench.now + TRAINS_S
    while bench.now < ends:
        base = bench.version
        for number, device in enumerate(devices):
            bench.send(device, ternary_block(bench.schema, number), base)
        bench.tick(1.0)


def outcomes(bench: Bench, turns: int) -> tuple[list[str], int]:
    """What the slow device is answered, and how many of its updates are in versions."""
    fast, slow = [bench.join(f"fast-{number}") for number in range(3)], bench.join("slow")
    answers = []
    for _ in range(turns):
        base = bench.version
        flood(bench, fast)
        answers += [receipt.outcome for receipt in bench.send(slow, ternary_block(bench.schema, 9), base)]
    flood(bench, fast)
    query = "SELECT count(*) FROM updates WHERE device = 'slow' AND merged > 0"
    ((merged,),) = bench.ledger.db.execute(query).fetchall()
    return answers, int(merged)


def test_devices_that_answer_at_once_fill_every_version(make: Make) -> None:
    """A known limit of asynchronous merging with a bound on staleness; the settings below are the remedy."""
    bench = make(merge__buffer_size=2, staleness__max=STALE_ABOVE)
    assert outcomes(bench, turns=2) == (["stale"] * 2, 0)


@pytest.mark.parametrize("extra_s", [0.5, 10.0])
def test_an_interval_above_a_devices_time_by_the_bound_on_staleness_gives_it_a_part(make: Make, extra_s: float) -> None:
    interval_s = TRAINS_S / STALE_ABOVE + extra_s
    bench = make(
        merge__buffer_size=2,
        staleness__max=STALE_ABOVE,
        downlink__min_interval_s=interval_s,
        merge__max_wait_s=interval_s + 1.0,
    )
    assert outcomes(bench, turns=4) == (["accepted"] * 4, 4)


def test_a_longest_wait_below_the_interval_makes_it_void(make: Make) -> None:
    """A version is made at the latest after it, as the protocol wants."""
    bench = make(
        merge__buffer_size=2,
        staleness__max=STALE_ABOVE,
        downlink__min_interval_s=TRAINS_S,
        merge__max_wait_s=5.0,
    )
    assert outcomes(bench, turns=2) == (["stale"] * 2, 0)
