"""CA2FL and FADAS, each beside its published formula, written a second way: on plain matrices, a row a client."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import nn

from support.arrays import CLIENTS, TEST, linear
from ternbus.broker.errors import ConfigError
from ternbus.lab import Federation, Run, Update, ca2fl, fadas

Matrix = npt.NDArray[np.float64]
SHAPES = {"weight": (2, 3), "bias": (2,)}
ELEMENTS = 8
CLIENT_NAMES = tuple(f"device-{number}" for number in range(5))


def tensors(row: Matrix) -> dict[str, Any]:
    return {"weight": row[:6].reshape(2, 3).astype(np.float32), "bias": row[6:].astype(np.float32)}


def row_of(found: Mapping[str, Any]) -> Matrix:
    return np.concatenate([np.ravel(found[name]).astype(np.float64) for name in ("weight", "bias")])


def update(device: str, change: Mapping[str, Any], staleness: int = 0) -> Update:
    return Update(device=device, version=0, staleness=staleness, samples=7, discount=0.5, steps=1, change=change)


def buffers(count: int, seed: int = 0) -> list[list[tuple[int, Matrix, int]]]:
    """Buffers of three updates, (client, change, staleness); a client can be in one twice."""
    random = np.random.default_rng(seed)
    return [
        [(int(random.integers(5)), random.normal(size=ELEMENTS), int(random.integers(6))) for _ in range(3)]
        for _ in range(count)
    ]


class Calibrated:
    """CA2FL, algorithm 2: v = h + mean over S of (Delta_i - h_i); then h_i <- Delta_i, and h is the mean of all h_i."""

    def __init__(self, clients: int, elements: int) -> None:
        self.caches = np.zeros((clients, elements))

    def change(self, rows: Sequence[int], changes: Matrix) -> Matrix:
        found: Matrix = self.caches.mean(0) + (changes - self.caches[list(rows)]).mean(0)
        for row, change in zip(rows, changes, strict=True):
            self.caches[row] = change
        return found


class Adaptive:
    """FADAS, algorithm 1, with the delay-adaptive rate: the step of AMSGrad, smaller where an update is late."""

    def __init__(self, elements: int, rate: float, threshold: int) -> None:
        self.rate, self.threshold, self.seen = rate, threshold, list[Matrix]()
        self.largest = np.zeros(elements)

    def step(self, changes: Matrix, delays: Sequence[int], divided: bool) -> Matrix:
        # The moments as sums over all that was seen, not one from the last: m_t = (1 - b) sum_s b^(t - s) Delta_s.
        self.seen.append(changes.mean(0))
        ages = np.arange(len(self.seen))[::-1, None]
        seen = np.stack(self.seen)
        first: Matrix = (0.1 * 0.9**ages * seen).sum(0)
        second: Matrix = (0.01 * 0.99**ages * seen**2).sum(0)
        self.largest = np.maximum(self.largest, second)
        late = max(delays)
        rate = self.rate
        if late > self.threshold:
            rate = self.rate / late if divided else min(self.rate, 1 / late)
        found: Matrix = rate * first / (np.sqrt(self.largest) + 1e-8)
        return found


def test_ca2fl_is_its_formula() -> None:
    init, apply = ca2fl(5)
    reference, model = Calibrated(5, ELEMENTS), tensors(np.zeros(ELEMENTS))
    state = init(model)
    for buffer in buffers(20):
        updates = [update(CLIENT_NAMES[client], tensors(change)) for client, change, _ in buffer]
        state, change = apply(state, updates, model)
        expected = reference.change([client for client, _, _ in buffer], np.stack([each for _, each, _ in buffer]))
        assert np.allclose(row_of(change), expected, atol=1e-5)


def test_ca2fl_moves_by_the_mean_of_all_clients_when_they_repeat_themselves() -> None:
    """What calibration is for: a buffer of one client's updates moves the model as if all had been heard."""
    init, apply = ca2fl(5)
    own = np.random.default_rng(1).normal(size=(5, ELEMENTS))
    model = tensors(np.zeros(ELEMENTS))
    state, _ = apply(init(model), [update(CLIENT_NAMES[each], tensors(own[each])) for each in range(5)], model)
    _, change = apply(state, [update(CLIENT_NAMES[3], tensors(own[3]))], model)
    assert np.allclose(row_of(change), own.mean(0), atol=1e-6)


def test_ca2fl_changes_no_state_that_it_has_given_away() -> None:
    """A candidate that is not published leaves the state of before in use."""
    init, apply = ca2fl(5)
    model = tensors(np.zeros(ELEMENTS))
    updates = [update(CLIENT_NAMES[0], tensors(np.ones(ELEMENTS)))]
    state, _ = apply(init(model), updates, model)
    first = apply(state, updates, model)
    again = apply(state, updates, model)
    assert np.array_equal(row_of(first[1]), row_of(again[1]))


def test_ca2fl_says_that_there_are_more_clients_than_it_was_told() -> None:
    init, apply = ca2fl(1)
    model = tensors(np.zeros(ELEMENTS))
    updates = [update(name, model) for name in CLIENT_NAMES[:2]]
    with pytest.raises(ConfigError, match=r"ca2fl\(1\) has got updates of 2 clients: give it the number of all"):
        apply(init(model), updates, model)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(("rate", "threshold"), [(0.03, 1), (0.4, 2), (0.4, 9)])
def test_fadas_is_its_formula(rate: float, threshold: int, *, divided: bool) -> None:
    (rule_init, rule), (init, apply) = fadas(rate, threshold, divided=divided)
    reference, model = Adaptive(ELEMENTS, rate, threshold), np.zeros(ELEMENTS)
    state = init(tensors(model))
    for buffer in buffers(20):
        updates = [update(CLIENT_NAMES[client], tensors(change), late) for client, change, late in buffer]
        _, change = rule(rule_init(tensors(model)), updates, tensors(model))
        state, stepped = apply(state, tensors(model), change)
        model += reference.step(np.stack([each for _, each, _ in buffer]), [late for *_, late in buffer], divided)
        assert np.allclose(row_of(stepped), model, atol=1e-4)
        model = row_of(stepped)


def test_fadas_shrinks_its_rate_by_the_latest_update_as_the_paper_says_and_as_its_code_does() -> None:
    def length(late: int, **more: Any) -> float:
        (_, rule), (init, apply) = fadas(0.5, 2, **more)
        model, ones = tensors(np.zeros(ELEMENTS)), tensors(np.ones(ELEMENTS))
        _, change = rule(None, [update("a", ones), update("b", ones, late)], model)
        return float(row_of(apply(init(model), model, change)[1])[0])

    assert [length(late) for late in (0, 2, 3, 8)] == pytest.approx([0.5, 0.5, 1 / 3, 1 / 8], rel=1e-4)
    assert [length(late, divided=True) for late in (2, 3, 8)] == pytest.approx([0.5, 0.5 / 3, 0.5 / 8], rel=1e-4)


@pytest.mark.parametrize("clients", ["x", 0, 2.5, True])
def test_ca2fl_takes_a_number_of_clients(clients: Any) -> None:
    with pytest.raises(ConfigError, match="ca2fl"):
        ca2fl(clients)


@pytest.mark.parametrize(
    ("name", "given"),
    [("rate", -1), ("rate", 0), ("rate", "x"), ("epsilon", 0.0), ("beta1", 1), ("beta2", np.nan), ("threshold", "x")],
)
def test_fadas_refuses_what_its_formula_cannot_take(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"fadas\(.*{name}"):
        fadas(**{name: given})


def test_fadas_has_no_negative_threshold() -> None:
    with pytest.raises(ConfigError, match=r"fadas\(threshold=-1\)"):
        fadas(threshold=-1)


def simulated(**arguments: Any) -> Run:
    """Two clients, one four times slower, float32 both ways, a version from each update."""
    plan = {"learning_rate": 0.05, "momentum": 0.0, "batch_size": 10, "codec": "float32"}
    fed = Federation(arguments.pop("model", linear), loss="mse", clients=CLIENTS, test=TEST, plan=plan)
    return fed.simulate(
        versions=12, callbacks=[], speeds={"alice": 1.0, "bob": 4.0},
        merge={"buffer_size": 1, "influence_bound": "none"}, settings={"downlink.codec": "float32"}, **arguments,
    )  # fmt: skip


def watched(apply: Callable[..., Any], seen: list[tuple[Sequence[Update], Mapping[str, Any]]]) -> Callable[..., Any]:
    def watching(state: Any, updates: Any, model: Any) -> Any:
        seen.append((updates, {name: np.array(tensor) for name, tensor in model.items()}))
        return apply(state, updates, model)

    return watching


@pytest.mark.slow
def test_a_federation_with_ca2fl_comes_to_what_the_formula_makes_of_its_updates() -> None:
    seen: list[tuple[Sequence[Update], Mapping[str, Any]]] = []
    init, apply = ca2fl(2)
    run = simulated(merge_rule=(init, watched(apply, seen)))
    reference = Calibrated(2, 11)
    assert max(each.staleness for updates, _ in seen for each in updates) > 0
    model = row_of(seen[0][1])
    for updates, _ in seen:
        rows = [("alice", "bob").index(each.device) for each in updates]
        model = model + reference.change(rows, np.stack([row_of(each.change) for each in updates]))
    assert np.allclose(row_of(run.tensors), model, atol=1e-5)


@pytest.mark.slow
def test_a_federation_with_fadas_comes_to_what_the_formula_makes_of_its_updates() -> None:
    seen: list[tuple[Sequence[Update], Mapping[str, Any]]] = []
    (init, apply), server = fadas(0.3, 0)
    run = simulated(merge_rule=(init, watched(apply, seen)), server_optimizer=server)
    reference, model = Adaptive(11, 0.3, 0), row_of(seen[0][1])
    assert max(each.staleness for updates, _ in seen for each in updates) > 0
    for updates, _ in seen:
        delays = [each.staleness for each in updates]
        model = model + reference.step(np.stack([row_of(each.change) for each in updates]), delays, divided=False)
    assert np.allclose(row_of(run.tensors), model, atol=1e-4)


@pytest.mark.slow
def test_statistics_follow_the_mean_of_the_updates_whatever_the_step_of_fadas_is() -> None:
    merged: list[Any] = []
    (init, apply), server = fadas(0.3, 0)

    def normed() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 1))

    def noting(state: Any, updates: Any, model: Any) -> Any:
        state, change = apply(state, updates, model)
        merged.append(change["0.running_mean"])
        return state, change

    run = simulated(model=normed, merge_rule=(init, noting), server_optimizer=server)
    assert np.allclose(run.tensors["0.running_mean"], np.sum(merged, axis=0), atol=1e-5)
