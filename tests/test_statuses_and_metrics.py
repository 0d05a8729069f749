"""Statuses and metrics of devices, as the aggregator takes them in."""

from collections.abc import Callable

from support.small_world import (
    Bench,
    refusals,
    saved,
)
from ternbus.aggregator.core import records

Make = Callable[..., Bench]


def test_statuses_are_taken_in_order_and_offline_is_final(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    member = bench.core.registry.members["pi"]

    def after(state: str, session: int, seq: int) -> str:
        bench.receive(pi.topic("status"), pi.status(state, session, seq=seq))
        assert member.status is not None
        return member.status.state

    assert after("idle", 2, 10) == "idle"
    assert after("training", 2, 12) == "training"
    assert after("idle", 2, 11) == "training"  # a lower seq
    assert after("offline", 1, 13) == "training"  # a lower session
    assert after("offline", 2, 1) == "offline"  # the last will was made before connecting
    assert after("idle", 2, 14) == "offline"  # final within its session
    assert after("idle", 3, 15) == "idle"


def test_a_status_that_was_heard_before_is_no_news(make: Make) -> None:
    """As the broker delivers the retained ones again after each connect."""
    bench = make()
    pi = bench.join("pi")
    for state in ("training", "offline"):
        frame = pi.status(state)
        bench.receive(pi.topic("status"), frame)
        assert bench.core.deadline == bench.now + 1.0
        bench.tick(1.0)
        assert bench.receive(pi.topic("status"), frame) == []
        assert bench.core.deadline is None


def test_a_status_reaches_the_ledger_a_second_later(make: Make) -> None:
    bench = make()
    pi = bench.join("pi")
    assert bench.receive(pi.topic("status"), pi.status("training", base=0)) == []
    assert bench.core.deadline == bench.now + 1.0
    (record,) = saved(bench.tick(1.0), records.Observed)
    assert record.statuses["pi"].state == "training"
    assert bench.core.deadline is None


def test_metrics_are_saved_once(make: Make) -> None:
    bench = make()
    pi = bench.join("pi", evaluator=True)
    frame = pi.metrics(0, accuracy=0.5)
    (record,) = saved(bench.receive(pi.topic("metrics"), frame), records.MetricsReceived)
    assert (record.device, record.metrics.values) == ("pi", {"accuracy": 0.5})
    bench.receive(pi.topic("metrics"), frame)
    bench.receive(pi.topic("metrics"), pi.metrics(1, accuracy=1.0))
    assert refusals(bench.tick(1.0)) == {"replayed-metrics": 1, "bad-meta": 1}
    bench.restart()
    bench.start()
    bench.receive(pi.topic("metrics"), frame)
    assert refusals(bench.tick(1.0)) == {"replayed-metrics": 1}
