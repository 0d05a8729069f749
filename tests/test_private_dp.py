"""`dp = "sum"` at the aggregator: its terms follow the plan, and a set comes to the mean that the devices drew."""

from typing import Any

import numpy as np
import pytest

from support.set_world import World
from ternbus.aggregator.settings import Settings, from_table
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import Terms
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.poisson_binomial import content, deviation, release

THETA, NORM = 0.2, 30.0
PLAN: dict[str, Any] = {
    "plan__dp": "sum", "plan__dp_theta": THETA, "plan__dp_norm": NORM, "plan__dp_epsilon": 1000.0
}  # fmt: skip
HELPERS = {"h-1": "11" * 32}


def drawn(terms: Terms, schema: Schema, change: Any, seed: int) -> tuple[Any, Any]:
    source = RandomSource(np.random.default_rng(seed).bytes)
    start = np.zeros(schema.elements, np.float32)
    words = content(terms, release(schema, terms, start, change, random_source=source), source).words
    return terms.layout.unpack(terms.layout.read(words))


def test_terms_have_the_theta_and_norm_of_the_plan() -> None:
    world = World(**PLAN)
    world.begin(3)
    terms = world.terms_of[world.version]
    assert (terms.dp, terms.theta, terms.norm) == ("sum", THETA, NORM)
    plain = World()
    plain.begin(3)
    terms = plain.terms_of[plain.version]
    assert (terms.dp, terms.theta, terms.norm) == ("none", 0.0, 0.0)


def test_a_dense_tensor_has_the_range_of_a_ternary_one_since_a_wider_one_is_more_noise() -> None:
    worlds = World(**PLAN), World()
    for world in worlds:
        world.begin(3)
    names = [segment.tensor.name for segment in worlds[0].schema.segments]
    private, plain = (dict(zip(names, world.terms_of[world.version].scales, strict=True)) for world in worlds)
    assert private == pytest.approx({**plain, "b": plain["b"] / 8})


def test_a_merge_moves_the_model_by_the_mean_of_what_devices_drew_and_no_scale() -> None:
    world = World(**PLAN)
    devices = world.begin(6)
    before, terms = world.core.model.published.copy(), world.terms_of[world.version]
    schema = world.schema
    change = np.concatenate(
        [np.full(each.tensor.elements, scale / 2) for each, scale in zip(schema.segments, terms.scales, strict=True)]
    ).astype(np.float32)
    for seed, device in enumerate(devices):
        receipt = world.give(device, None, drawn(terms, schema, change, seed))
        assert receipt.outcome == "accepted"
    world.settle()
    assert world.merged()
    assert world.dropped() == {}
    moved = world.core.model.published - before
    share = min(0.5, NORM / np.sqrt(schema.elements))
    for segment, scale in zip(schema.segments, terms.scales, strict=True):
        mean = float(moved[segment.start : segment.stop].mean()) / scale
        noise = deviation(terms.levels, THETA, 6) / np.sqrt(segment.tensor.elements)
        assert mean == pytest.approx(share, abs=4.5 * noise)
    assert world.terms_of[world.version].scales == terms.scales


def settings(plan: dict[str, Any], **more: Any) -> Settings:
    return from_table({"federation": "fed", "broker": "mqtt://localhost", "plan": plan, **more})


def test_a_federation_without_helpers_cannot_have_this_kind() -> None:
    with pytest.raises(ConfigError, match=r'plan.dp = "sum" needs private sums'):
        settings({"dp": "sum", "dp_theta": 0.1, "dp_norm": 1.0, "dp_epsilon": 1.0})


def test_the_noise_is_the_plans_or_the_tasks() -> None:
    about: dict[str, Any] = {
        "private": {"helpers": HELPERS},
        "merge": {"buffer_size": 6, "influence_bound": "none"},
    }
    kind = {"dp": "sum", "dp_theta": 0.1, "dp_norm": 2, "dp_epsilon": 1.0}
    assert settings(kind, **about).sum_noise == (0.1, 2.0)
    assert settings({}, **about).sum_noise == (0.0, 0.0)
    task = settings({"dp_theta": 0.2}, **about, plan_check={"default_plan": kind})
    assert task.sum_noise == (0.2, 2.0)
    assert task.plan["codec"] == "private"
    with pytest.raises(ConfigError, match="must be above 0; set dp_norm"):
        settings({"dp": "sum", "dp_theta": 0.1, "dp_epsilon": 1.0}, **about, plan_check={})
