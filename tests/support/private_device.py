"""A device of private sums as a test drives it, and the scripted aggregator's terms and heads for it."""

from typing import Any

import numpy as np

from support.core_device import AGGREGATOR_KEY, DEVICE_KEY, Device, connected, of, only, update_in
from support.private_sums import helper_key, opened, seeds_in, terms_for
from support.scripted_aggregator import FEDERATION, Message, ScriptedAggregator
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.parts import whole
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.sums.terms import Terms, digest_of
from ternbus.broker.sums.words import Words
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Log, StartTraining
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.private_sum import encode
from ternbus.edge.plan.sum_policy import SumPolicy

PINS = SumPolicy(helpers=(helper_key(1).public,))
SEALED = b"sealed:"  # what the devices of tests write before what they seal


def aggregator(of: Terms | None = None, **settings: Any) -> ScriptedAggregator:
    """An aggregator whose head names terms; by default those that `terms_of` makes."""
    scripted = ScriptedAggregator(identity=AGGREGATOR_KEY, **settings)
    scripted.plan = {"codec": "private", "error_feedback": True, **scripted.plan}
    scripted.plan["terms"] = digest_of((of or terms_for(scripted.schema)).content())
    scripted.plan["schema"] = scripted.schema.digest
    return scripted


def terms_messages(scripted: ScriptedAggregator, content: bytes | None = None) -> list[Message]:
    """The parts of terms, by default of those that the aggregator names unless a test has named others."""
    body = terms_for(scripted.schema).content() if content is None else content
    frames = scripted.cut("terms", {}, body)
    return [(topics.terms(FEDERATION, part), frame) for part, frame in enumerate(frames)]


def named(scripted: ScriptedAggregator, of: Terms) -> list[Message]:
    """The parts of these terms, which the aggregator names from now on."""
    scripted.plan["terms"] = digest_of(of.content())
    return terms_messages(scripted, of.content())


def private(**changes: Any) -> Device:
    """A private device that has started and is connected."""
    return connected(**{"sums": PINS, **changes})


def training(of: Terms | None = None, **changes: Any) -> tuple[ScriptedAggregator, Device, StartTraining]:
    """A private device that trains on version 0."""
    settings = {name: changes.pop(name) for name in ("max_staleness", "direct_parts", "plan") if name in changes}
    scripted, device = aggregator(of, **settings), private(**changes)
    content = None if of is None else of.content()
    messages = [*terms_messages(scripted, content), scripted.status(), scripted.head(), *scripted.snapshot()]
    return scripted, device, only(device.arrive(*messages), StartTraining)


def finished(job: StartTraining, change: float = 0.25, **about: Any) -> events.TrainingFinished:
    """What the worker makes of a change, the same of each element, on a machine whose random numbers repeat."""
    assert job.sums is not None
    vector: Vector = np.full(job.schema.elements, change, np.float32)
    random_source = RandomSource(np.random.default_rng(about.pop("draw", 1)).bytes)
    content = encode(job.schema, job.sums.terms, job.plan, vector, samples=10, random_source=random_source)
    fields: dict[str, Any] = {"samples": 10, "metrics": {"loss": 0.5, "epsilon": 1.0, "delta": 1e-5}, **about}
    return events.TrainingFinished(base=job.base, content=content, residual=None, **fields)


def sending(**changes: Any) -> tuple[ScriptedAggregator, Device, Frame]:
    """A private device whose first update, on version 0, is outstanding, and its frame."""
    scripted, device, job = training(**changes)
    return scripted, device, update_in(device.handle(finished(job)))


def words_of(frame: Frame, terms: Terms, device: Identity = DEVICE_KEY) -> Words:
    """The words of an update in one frame, by what the boxes in it say."""
    assert frame.body.startswith(SEALED)
    seeds = seeds_in(frame, device.public, range(1, len(terms.helpers) + 1))
    return opened(terms, whole(frame), device, frame.body.removeprefix(SEALED), seeds)


def refusals(actions: list[Action]) -> list[str]:
    """Why the device says that it does not train."""
    return [str(each.fields["reason"]) for each in of(actions, Log) if each.event == "bad-plan"]
