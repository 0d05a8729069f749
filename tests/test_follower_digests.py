"""A follower compares its vector with a digest before anyone uses it, and drops a wrong one."""

import numpy as np
import pytest

from support.following import a_head, deliver, has, started
from support.scripted_aggregator import FEDERATION
from ternbus.broker.protocol.schema import vector_digest


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("fault", ["digest", "length"])
def test_a_delta_that_gives_another_digest_gives_way_to_a_snapshot(fault: str, checksum: bool) -> None:
    aggregator, follower, broker = started(checksum=checksum)
    aggregator.advance()
    true = aggregator.vectors[1]
    if fault == "digest":
        aggregator.vectors[1] = true + 1
        deliver(follower, aggregator.delta(1))
        aggregator.vectors[1] = true
    else:
        aggregator.delta_frames[1] = []
        meta = {"version": 1, "digest": bytes(32), "codec": "float32", "encoding": "raw"}
        frame = aggregator.cut("delta", meta, b"short")[0]
        deliver(follower, [(f"ternbus/1/{FEDERATION}/all/delta/1/0", frame)])
    broker.publish(aggregator.new_snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    assert has(follower, aggregator, 1)
    assert broker.logs == ["snapshot", "resync", "snapshot"]


@pytest.mark.parametrize("wrong", [1, 2, 3])
@pytest.mark.parametrize("fault", ["digest", "change"])
def test_of_deltas_applied_together_only_the_last_ones_digest_is_compared(fault: str, wrong: int) -> None:
    """A wrong change of any of them makes it differ."""
    aggregator, follower, broker = started()
    for _ in range(3):
        aggregator.advance()
    true = aggregator.vectors[wrong]
    if fault == "digest":
        aggregator.vectors[wrong] = true + 1
        deliver(follower, aggregator.delta(wrong))
        aggregator.vectors[wrong] = true
    else:
        meta = {"version": wrong, "digest": vector_digest(true), "codec": "float32", "encoding": "raw"}
        frames = aggregator.cut("delta", meta, np.ones(aggregator.schema.elements, "<f4").tobytes())
        deliver(
            follower, [(f"ternbus/1/{FEDERATION}/all/delta/{wrong}/{part}", each) for part, each in enumerate(frames)]
        )
    deliver(follower, [message for version in {1, 2, 3} - {wrong} for message in aggregator.delta(version)])
    broker.publish(aggregator.new_snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    assert has(follower, aggregator, 3)
    assert broker.logs == (["snapshot"] if fault == "digest" and wrong < 3 else ["snapshot", "resync", "snapshot"])


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_vector_that_nobody_needs_yet_is_compared_with_its_digest_before_it_is_used(is_wrong: bool) -> None:
    """One digest is computed for all versions that came meanwhile; a wrong change of any of them makes it differ."""
    aggregator, follower, broker = started()
    follower.postpones = True
    for version in (1, 2):
        aggregator.advance()
        if is_wrong and version == 1:
            meta = {"version": 1, "digest": aggregator.digest(1), "codec": "float32", "encoding": "raw"}
            frames = aggregator.cut("delta", meta, np.ones(aggregator.schema.elements, "<f4").tobytes())
            deliver(
                follower, [(f"ternbus/1/{FEDERATION}/all/delta/1/{part}", each) for part, each in enumerate(frames)]
            )
        else:
            deliver(follower, aggregator.delta(version))
        broker.perform(follower, follower.head_accepted(a_head(aggregator), 1.0), 1.0)
    assert (follower.version, broker.logs) == (2, ["snapshot"])
    assert has(follower, aggregator, 2) is not is_wrong
    broker.publish(aggregator.new_snapshot())
    broker.perform(follower, follower.head_accepted(a_head(aggregator), 2.0), 2.0)
    broker.perform(follower, follower.check(2.0), 2.0)
    assert broker.logs == (["snapshot", "resync", "snapshot"] if is_wrong else ["snapshot"])
    assert has(follower, aggregator, 2)
    assert follower.check(3.0) == []
