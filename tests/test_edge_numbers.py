"""Numbers that a device is told: none makes it hold much, and none ends it with an exit code that no restart mends."""

import asyncio
import tracemalloc
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from support.core_device import aggregator, connected, following, of, only, profile
from support.scripted_aggregator import FEDERATION
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.model_messages import Head, Snapshot, SnapshotRef
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import ZSTD
from ternbus.edge.core import events
from ternbus.edge.core.actions import Job, Log, StartEvaluation, StartFineTuning, StartTraining, Stop
from ternbus.edge.core.events import EvaluationFailed, TrainingFailed
from ternbus.edge.core.profile import MISFIT_BYTES, ModelSize
from ternbus.edge.shell.worker import Result, Worker, train

CLAIMED = 4_800_000_000
shapes = st.dictionaries(
    st.text(min_size=1, max_size=20), st.lists(st.integers(1, 40), max_size=4).map(tuple), min_size=1, max_size=6
)


def test_a_snapshot_far_larger_than_the_task_s_model_is_not_taken() -> None:
    """76 KB that state 4.8 GB: nothing of it is asked for, and a restart may find another head."""
    scripted, device = aggregator(), connected()
    device.arrive(scripted.status())
    named = SnapshotRef(version=0, parts=1, content_bytes=CLAIMED, place=0)
    tracemalloc.start()
    try:
        done = device.arrive(scripted.head(snapshot=named))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stop = only(done, Stop)
    assert stop.code == EXIT_FAILED
    assert f"its snapshot has {CLAIMED} bytes" in stop.reason
    assert peak < 2**20
    assert device.disk is None or device.disk.head_seq == 0  # it is not remembered as the highest


@given(shapes)
def test_whatever_fits_a_task_is_within_its_bounds(tensors: dict[str, tuple[int, ...]]) -> None:
    schema, size = Schema.of(tensors), ModelSize.of(tensors)
    assert len(schema.encoded) <= Schema.bytes_max(tensors) < size.schema
    assert len(schema.encoded) + 4 * schema.elements + MISFIT_BYTES // 2 < size.snapshot
    assert profile(tensors=tensors).size_fault(len(schema.encoded) + 4 * schema.elements) == ""


def test_without_tensors_the_protocol_s_bound_holds() -> None:
    assert ModelSize.of({}).snapshot >= 4 * 2**31
    assert profile(tensors={}).size_fault(2**40)


@pytest.mark.parametrize("schema_bytes", [2**21, 2**62])
def test_a_schema_far_longer_than_the_task_s_is_not_parsed(schema_bytes: int) -> None:
    """Ten million numbers in one byte each would take 80 MB as a list."""
    scripted, device = aggregator(), connected()
    content = zstandard.ZstdCompressor().compress(msgpack.packb([0] * 2**21) + bytes(2**20))
    size = zstandard.get_frame_parameters(content).content_size
    about = Snapshot(version=0, digest=bytes(32), schema_bytes=schema_bytes, content_bytes=size, encoding=ZSTD)
    (frame,) = scripted.cut(Snapshot.KIND, about.meta(), content)
    named = SnapshotRef(version=0, parts=1, content_bytes=size, place=0)
    device.arrive(scripted.status(), scripted.head(snapshot=named))
    done = device.arrive((topics.snapshot(FEDERATION, 0, 0), frame))
    assert f"a schema of {schema_bytes} bytes" in only(done, Log).text


def test_a_schema_that_only_claims_to_be_long_is_refused_before_there_is_room_made_for_it() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="bad-schema"):
            Schema.parse(b"\xdc\xff\xff" * 30_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_head_that_is_refused_for_its_numbers_leaves_the_counters_as_they_are() -> None:
    """Else a single one of 2**64 - 1 would keep every later head out."""
    scripted, device = following()
    meta = dict(Head.from_meta(parse(scripted.head()[1]).meta).meta())
    device.arrive((topics.head(FEDERATION), scripted.frame(Head.KIND, meta | {"version": 2**62 + 1})))
    scripted.advance()
    done = device.arrive(scripted.head(), *scripted.delta(1))
    assert device.core.state.head_version == 1
    assert not of(done, Stop)


class Unable:
    """A task's trainer without what the plan asks for."""

    samples = 10

    def train(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("not here")

    def evaluate(self, _: object) -> Any:
        raise ConfigError("not here either")


class Raising:
    """A task's trainer that raises what no `except Exception` catches; or it returns nothing at all."""

    samples = 10

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def train(self, *_: Any, **__: Any) -> Any:
        if self.error is not None:
            raise self.error

    evaluate = train_privately = train


class UnreadableError(RuntimeError):
    def __str__(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (asyncio.CancelledError(), "CancelledError"),
        (SystemExit(3), "sys.exit(3)"),
        (BaseException("a panic"), "BaseException: a panic"),
        (UnreadableError(), "UnreadableError: (str() of it failed)"),
        (None, "AttributeError: 'NoneType' object has no attribute"),
    ],
)
def test_the_thread_of_the_trainings_outlives_whatever_a_task_raises(error: BaseException | None, said: str) -> None:
    """Otherwise the device would say that it trains, and wait for good."""
    _, device = following()
    job = only(device.actions, StartTraining)
    results: SimpleQueue[Result] = SimpleQueue()
    worker = Worker(Raising(error), results.put)
    vector = np.zeros_like(job.vector)
    private: dict[str, Any] = {"dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 100.0}
    jobs: list[Job] = [
        job,
        StartEvaluation(version=0, schema=job.schema, vector=vector),
        StartFineTuning(version=0, schema=job.schema, vector=vector, plan=job.plan, seed=1),
        replace(job, plan=replace(job.plan, dp="device", **private)),
        replace(job, plan=replace(job.plan, dp="sample", **private)),
    ]
    for each in jobs:
        worker.start(each)
        result = results.get(timeout=30)
        reason = result.failure if isinstance(result, events.TrainingFinished) else getattr(result, "reason", "")
        assert said in reason
        assert "import" not in reason
    assert worker.stop()


def test_ctrl_c_during_a_training_in_the_main_thread_is_not_the_tasks() -> None:
    """As in a simulation."""
    _, device = following()
    with pytest.raises(KeyboardInterrupt):
        train(Raising(KeyboardInterrupt()), only(device.actions, StartTraining))


def test_a_plan_that_cannot_be_followed_is_a_training_that_failed() -> None:
    """The plan is the aggregator's: it must not end the device as if its owner had made a mistake."""
    _, device = following()
    job = only(device.actions, StartTraining)
    results: SimpleQueue[Result] = SimpleQueue()
    worker = Worker(Unable(), results.put)
    for plan in (job.plan, replace(job.plan, dp="sample", dp_clip=1.0, dp_noise=1.0, dp_epsilon=100.0)):
        worker.start(replace(job, plan=plan))
        assert isinstance(results.get(timeout=30), TrainingFailed)
    worker.start(StartEvaluation(version=0, schema=job.schema, vector=np.zeros_like(job.vector)))
    assert results.get(timeout=30) == EvaluationFailed(version=0, reason="not here either")
    assert worker.stop()
