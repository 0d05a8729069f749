"""Candidates on a device: evaluated once, named in the metrics, and never trained on."""

from typing import Any

import numpy as np
import pytest

from support.core_device import (
    DEVICE,
    VALUES,
    Device,
    aggregator,
    evaluated,
    following,
    logged,
    metrics_in,
    of,
    only,
    published,
    trained,
)
from support.scripted_aggregator import Message, ScriptedAggregator
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.model_messages import Candidate
from ternbus.broker.protocol.schema import Vector, vector_digest
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartEvaluation, StartTraining
from ternbus.edge.plan.sum_policy import SumPolicy

PRIVATE = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0}


def change(scripted: ScriptedAggregator, size: float = 1.0) -> Vector:
    return np.full(scripted.schema.elements, size, np.float32)


def digest_of(messages: list[Message]) -> bytes:
    return Candidate.from_meta(parse(messages[0][1]).meta).digest


def judging() -> tuple[ScriptedAggregator, Device]:
    """An evaluator that has evaluated version 0."""
    scripted, device = following("evaluate")
    device.handle(evaluated())
    return scripted, device


def test_an_evaluator_evaluates_a_candidate_and_names_it() -> None:
    scripted, device = judging()
    candidate = scripted.candidate(DEVICE, change(scripted))
    assert len(candidate) > 1  # it comes in parts
    assert of(device.arrive(*candidate[:-1]), StartEvaluation) == []
    job = only(device.arrive(candidate[-1]), StartEvaluation)
    assert (job.version, job.vector.tobytes()) == (1, (scripted.vectors[0] + 1).tobytes())
    done = device.handle(evaluated(1))
    found = Metrics(version=1, samples=9, split="test", values=VALUES, candidate=digest_of(candidate))
    assert (metrics_in(done), logged(done)) == (found, ["candidate"])
    assert device.core.state.evaluated == 0
    assert device.core.follower.version == 0


def test_a_candidate_that_is_published_is_evaluated_as_any_version() -> None:
    scripted, device = judging()
    device.arrive(*scripted.candidate(DEVICE, change(scripted)))
    device.handle(evaluated(1))
    scripted.advance(change(scripted))
    job = only(device.arrive(*scripted.delta(1), scripted.head()), StartEvaluation)
    assert job.version == 1
    assert metrics_in(device.handle(evaluated(1))).candidate == b""


def test_a_device_that_trains_evaluates_a_candidate_on_its_own_data_and_trains_on_versions_only() -> None:
    scripted, device = following(reports=True, classes={"cat": 3})
    device.handle(evaluated())
    assert of(device.arrive(*scripted.candidate(DEVICE, change(scripted))), StartEvaluation) == []  # it is training
    job = only(device.actions, StartTraining)
    assert job.base == 0
    assert only(device.handle(trained(job)), StartEvaluation).version == 1
    found = metrics_in(device.handle(evaluated(1)))
    assert (found.split, found.classes, bool(found.candidate)) == ("local", {}, True)
    assert [each.base for each in of(device.actions, StartTraining)] == [0]
    scripted.advance()  # another version than the candidate, which is withdrawn
    device.arrive(*scripted.delta(1), scripted.head())
    (frame,) = published(device.actions, "update")
    device.arrive(scripted.receipt(DEVICE, bytes(device.core.profile.key), frame.seq, "accepted"))
    device.handle(evaluated(1))
    bases = {each.base: each.vector for each in of(device.actions, StartTraining)}
    assert set(bases) == {0, 1}
    for base, vector in bases.items():
        assert vector_digest(vector) == vector_digest(scripted.vectors[base])


def test_a_candidate_waits_for_the_version_before_it_and_is_void_after_its_own() -> None:
    scripted, device = judging()
    scripted.advance()
    candidate = scripted.candidate(DEVICE, change(scripted))
    assert of(device.arrive(*candidate), StartEvaluation) == []
    device.arrive(*scripted.delta(1), scripted.head())
    assert only(device.handle(evaluated(1)), StartEvaluation).version == 2
    device.handle(evaluated(2))
    old = scripted.candidate(DEVICE, change(scripted, 2.0), version=1)
    assert of(device.arrive(*old), StartEvaluation) == []
    assert len(published(device.actions, "metrics")) == 3


def test_what_is_sent_again_is_answered_again_without_another_evaluation() -> None:
    scripted, device = judging()
    device.arrive(*scripted.candidate(DEVICE, change(scripted)))
    first = metrics_in(device.handle(evaluated(1)))
    (again,) = published(device.arrive(*scripted.candidate(DEVICE, change(scripted))), "metrics")
    assert Metrics.from_meta(again.meta) == first
    assert len(of(device.actions, StartEvaluation)) == 2


def test_a_candidate_that_cannot_be_evaluated_is_told_without_values_and_does_not_delay_others() -> None:
    scripted, device = judging()
    device.arrive(*scripted.candidate(DEVICE, change(scripted)))
    done = device.handle(events.EvaluationFailed(version=1, reason="out of memory"))
    assert (metrics_in(done).values, metrics_in(done).samples) == ({}, 0)
    assert "failing" not in published(device.actions, "status")[-1].meta
    scripted.advance()
    assert only(device.arrive(*scripted.delta(1), scripted.head()), StartEvaluation).version == 1


def test_a_replayed_or_a_false_candidate_is_dropped_and_few_are_evaluated_for_one_version() -> None:
    scripted, device = judging()
    first = scripted.candidate(DEVICE, change(scripted, 1.0))
    device.arrive(*scripted.candidate(DEVICE, change(scripted, 2.0)))
    device.handle(evaluated(1))
    assert of(device.arrive(*first), StartEvaluation) == []
    done = device.arrive(*scripted.candidate(DEVICE, change(scripted), digest=bytes(32)))
    assert (of(done, StartEvaluation), logged(done)) == ([], ["bad-candidate"])
    done = device.arrive(*scripted.candidate(DEVICE, change(scripted), codec="sign"))
    assert logged(done) == ["bad-candidate"]
    for size in range(3, 9):
        device.arrive(*scripted.candidate(DEVICE, change(scripted, size)))
        if device.core.evaluation._running:
            device.handle(evaluated(1))
    assert len(of(device.actions, StartEvaluation)) == 3


@pytest.mark.parametrize("plan", [{"seal": True}, PRIVATE])
def test_under_a_plan_that_hides_them_no_metrics_of_a_candidate_leave_a_device(plan: dict[str, Any]) -> None:
    scripted, device = following(scripted=aggregator(plan=plan), reports=True)
    device.handle(evaluated())
    device.handle(trained(only(device.actions, StartTraining)))
    device.arrive(*scripted.candidate(DEVICE, change(scripted)))
    assert len(of(device.actions, StartEvaluation)) == 1
    assert published(device.actions, "metrics") == []


def test_a_device_whose_owner_reports_nothing_evaluates_no_candidate() -> None:
    pins = SumPolicy.of([("ab" * 32)], 5, "aggregator", 0)
    for scripted, device in (following(), following(reports=True, sums=pins)):
        device.arrive(*scripted.candidate(DEVICE, change(scripted)))
        assert published(device.actions, "metrics") == []
        assert [job for job in of(device.actions, StartEvaluation) if job.version == 1] == []


def test_before_the_first_head_and_of_too_many_parts_nothing_is_kept() -> None:
    scripted = aggregator()
    _, device = following("evaluate", scripted)
    device.handle(evaluated())
    fresh = device.restarted()
    fresh.connect()
    fresh.arrive(*scripted.candidate(DEVICE, change(scripted)))
    fresh.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert of(fresh.actions, StartEvaluation) == []
    scripted.frame_bytes = 1800
    topic = scripted.candidate(DEVICE, change(scripted))[0][0]
    about = Candidate(version=1, digest=bytes(32), codec="float32", encoding="raw")
    scripted.frame_bytes = 1400
    long = scripted.cut(Candidate.KIND, about.meta(), bytes(40_000))
    assert logged(device.arrive((topic, long[0]))) == ["dropped"]
