"""Algorithms of the user's own in a simulation, checked against their formulas."""

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.arrays import CLIENTS, TEST, linear
from ternbus.broker.errors import ConfigError
from ternbus.lab import Federation, Job, Run, Update

pytestmark = pytest.mark.slow
EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "own_algorithms.py"))
fednova, scaffold = EXAMPLE["fednova"], EXAMPLE["scaffold"]
EXACT = {"settings": {"downlink.codec": "float32"}, "merge": {"influence_bound": "none"}, "sync": True}
PLAN = {"learning_rate": 0.05, "momentum": 0.0, "batch_size": 10, "codec": "float32"}


def simulated(**arguments: Any) -> Run:
    fed = Federation(linear, loss="mse", clients=CLIENTS, test=TEST, plan={**PLAN, **arguments.pop("plan", {})})
    return fed.simulate(**{"versions": 3, "callbacks": [], **EXACT, **arguments})


def close(one: Run, other: Run) -> bool:
    return all(np.allclose(one.tensors[name], other.tensors[name], atol=1e-6) for name in one.tensors)


def test_a_merge_rule_of_ones_own_is_the_built_in_one_by_the_same_formula() -> None:
    seen: list[Sequence[Update]] = []

    def apply(count: int, updates: Sequence[Update], model: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        seen.append(updates)
        total = sum(update.samples for update in updates)
        change = {n: sum(u.samples * u.discount * u.change[n] for u in updates) / total for n in model}
        return count + 1, change

    built_in = simulated(sync=False, versions=6)
    own = simulated(sync=False, versions=6, merge_rule=(lambda _: 0, apply))
    assert close(own, built_in)
    assert {update.device for updates in seen for update in updates} == {"alice", "bob"}
    assert {update.steps for updates in seen for update in updates} == {3, 5}
    assert [sum(update.staleness for update in updates) / len(updates) for updates in seen] == pytest.approx(
        own.versions["staleness"].iloc[1:].tolist()
    )


def test_a_server_optimizer_of_ones_own_is_the_built_in_one_by_the_same_formula() -> None:
    def init(model: Mapping[str, Any]) -> dict[str, Any]:
        return {name: np.zeros_like(each) for name, each in model.items()}

    def apply(state: Any, model: Any, change: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        momenta = {name: 0.9 * state[name] + change[name] for name in model}
        return momenta, {name: model[name] + 0.5 * momenta[name] for name in model}

    settings = {**EXACT["settings"], "optimizer.name": "fedavgm", "optimizer.learning_rate": 0.5}  # type: ignore[dict-item]
    assert close(simulated(server_optimizer=(init, apply)), simulated(settings=settings))


def test_fednova_is_its_formula() -> None:
    """Wang et al. 2020: x' - x = tau_eff sum p_i Delta_i / |a_i|, with |a_i| the sum of a_i."""
    for momentum in (0.0, 0.9):
        init, apply = fednova(momentum)
        seen: list[tuple[Sequence[Update], Mapping[str, Any], Mapping[str, Any]]] = []

        def watched(state: Any, updates: Any, model: Any) -> Any:
            state, change = apply(state, updates, model)  # noqa: B023 - called within this turn
            seen.append((updates, model, change))  # noqa: B023 - likewise
            return state, change

        simulated(versions=1, merge_rule=(init, watched), plan={"momentum": momentum})
        ((updates, _, change),) = seen
        shares = {"alice": 30 / 80, "bob": 50 / 80}
        # a_i = [1 - rho^tau, ..., 1 - rho] / (1 - rho), of which the formula in the example is the sum.
        lengths = {
            name: sum((1 - momentum**left) / (1 - momentum) for left in range(1, steps + 1))
            for name, steps in {"alice": 3, "bob": 5}.items()
        }
        effective = sum(shares[name] * lengths[name] for name in shares)
        for name, found in change.items():
            expected = effective * sum(shares[u.device] / lengths[u.device] * u.change[name] for u in updates)
            assert np.allclose(found, expected, atol=1e-6)


def test_scaffold_is_its_algorithm() -> None:
    """Karimireddy et al. 2020, algorithm 1 with option II, by hand: both clients, whole batches, 3 steps, 3 rounds."""
    client, merge_rule = scaffold(2)
    run = simulated(client=client, merge_rule=merge_rule, plan={"local_steps": 3, "batch_size": 100})
    names = ["weight", "bias"]
    start = Federation(linear, loss="mse", clients=CLIENTS, test=TEST).task.initial(0)
    x = [torch.from_numpy(start[name]) for name in names]
    c = [torch.zeros_like(each) for each in x]
    own = {name: [torch.zeros_like(each) for each in x] for name in CLIENTS}
    for _ in range(3):
        moved, changes = [], []
        for name, (inputs, targets) in CLIENTS.items():
            y = [each.clone() for each in x]
            for _ in range(3):
                leaves = [each.requires_grad_() for each in y]
                outputs = nn.functional.linear(torch.from_numpy(inputs), *leaves).squeeze(1)
                gradients = torch.autograd.grad(nn.functional.mse_loss(outputs, torch.from_numpy(targets)), leaves)
                y = [
                    (w - 0.05 * (g - ci + cs)).detach()
                    for w, g, ci, cs in zip(leaves, gradients, own[name], c, strict=True)
                ]
            new = [ci - cs + (a - b) / (3 * 0.05) for ci, cs, a, b in zip(own[name], c, x, y, strict=True)]
            changes.append([n - o for n, o in zip(new, own[name], strict=True)])
            moved.append([b - a for a, b in zip(x, y, strict=True)])
            own[name] = new
        x = [a + (one + two) / 2 for a, one, two in zip(x, *moved, strict=True)]
        c = [a + (one + two) / 2 for a, one, two in zip(c, *changes, strict=True)]
    assert np.allclose(run.tensors["weight"], x[0].numpy(), atol=1e-5)
    assert np.allclose(run.tensors["bias"], x[1].numpy(), atol=1e-5)
    assert not close(run, simulated(plan={"local_steps": 3, "batch_size": 100}))


def test_a_client_algorithm_of_stale_updates_sees_the_state_of_its_own_version() -> None:
    seen: list[tuple[int, int]] = []

    def train(state: int, job: Job) -> tuple[int, Any, str]:
        seen.append((job.version, job.shared))
        return state + 1, job.train(), f"{job.device} {job.version}"

    extras: list[tuple[str, str]] = []

    def merge(count: int, updates: Sequence[Update], model: Any) -> tuple[int, Any]:
        extras.extend((update.extra, f"{update.device} {update.version}") for update in updates)
        return count + 1, {name: sum(u.change[name] for u in updates) / len(updates) for name in model}

    run = simulated(
        sync=False, versions=12, merge={"buffer_size": 1}, speeds={"alice": 1.0, "bob": 4.0},
        client=(lambda _: 0, train), merge_rule=(lambda _: 0, merge),
    )  # fmt: skip
    assert run.versions["staleness"].max() > 0
    assert all(version == shared for version, shared in seen)
    assert len(extras) >= 12
    assert all(extra == expected for extra, expected in extras)


def test_what_is_not_covered_is_said() -> None:
    rule = (lambda _: None, lambda state, updates, _: (state, updates[0].change))
    (line,) = simulated(versions=1, merge_rule=rule).lines
    assert "robust" in line
    assert "exactly once" in line
    client = (lambda _: None, lambda state, job: (state, job.train(), None))
    lines = simulated(versions=1, client=client).lines
    assert "no byte of it is counted" in lines[-1]
    assert simulated(versions=1).lines == ()


def nan(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.full_like(each, np.nan) for name, each in model.items()}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"merge_rule": (lambda _: 0, lambda *_: 3)}, r"merge_rule: apply\(\) returned int: it must return \(state, ten"),
    ({"merge_rule": (lambda _: 0, lambda s, *_: (s, {}))}, r"merge_rule: apply\(\) returned no 'weight'"),
    ({"merge_rule": (lambda _: 0, lambda s, u, m: (s, nan(m)))}, "returned a NaN or an infinity"),
    (
        {"server_optimizer": (lambda _: 0, lambda s, m, c: (s, {**m, "bias": c["weight"]}))},
        "'bias': it must have shape",
    ),
    ({"client": (lambda _: 0, lambda s, _: (s, [], 0))}, "returned list as tensors"),
    (
        {"client": (lambda _: 0, lambda s, j: (s, j.train(correction={"weigth": 0}), 0))},
        r"'weigth' \(do you mean weight",
    ),
    ({"client": (lambda _: 0, lambda s, _: (s, {}, 0)), "plan": {"dp": "device"}}, "dp in the plan does not cover"),
    (
        {
            "client": (lambda _: 0, lambda s, _: (s, {}, 0)),
            "settings": {"search.arms": [{"width": 0.5}, {"width": 1.0}]},
        },
        "trains no sub-network",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[f"{n}-{next(iter(a))}" for n, (a, _) in enumerate(BAD)])
def test_what_an_algorithm_may_not_return_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulated(versions=1, **arguments)
