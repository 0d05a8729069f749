"""Two algorithms from the literature as pairs of functions: python examples/own_algorithms.py.

They run in a simulation only. What Ternbus promises of robust merging, of exactly-once merging and of differential
privacy does not cover them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from ternbus.edge import Tensors
from ternbus.edge.tasks.digits_data import load
from ternbus.lab import Federation, Job, Update, dirichlet

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def fednova(momentum: float = 0.0) -> Pair:
    """A merge rule: FedNova, normalised averaging (Wang et al. 2020): each change is divided by its local steps.

    Delta = tau_eff sum_i p_i Delta_i / |a_i|,  tau_eff = sum_i p_i |a_i|,  p_i the share of samples. |a_i| is the
    number of steps tau_i, or with momentum rho: (tau_i - rho (1 - rho^tau_i) / (1 - rho)) / (1 - rho).
    """

    def length(steps: int) -> float:
        return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)

    def init(_: Tensors) -> None:
        return None

    def apply(_: None, updates: Sequence[Update], model: Tensors) -> tuple[None, Tensors]:
        total = sum(update.samples for update in updates)
        effective = sum(update.samples / total * length(update.steps) for update in updates)
        factors = [effective * update.samples / total / length(update.steps) for update in updates]
        pairs = list(zip(factors, updates, strict=True))
        return None, {name: sum_of([factor * update.change[name] for factor, update in pairs]) for name in model}

    return init, apply


def scaffold(clients: int) -> tuple[Pair, Pair]:
    """A client algorithm and its merge rule: SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II).

    y <- y - eta (g(y) - c_i + c)                 (eq. 3), K steps from y = x; the plan has momentum 0
    c_i <- c_i - c + (x - y) / (K eta)            (eq. 4)
    x <- x + 1/|S| sum_i (y_i - x),  c <- c + 1/N sum_i (change of c_i)     (eq. 5, with a global rate of 1)
    """

    def zeros(model: Tensors) -> Tensors:
        return {name: np.zeros_like(tensor) for name, tensor in model.items()}

    def train(own: Tensors, job: Job) -> tuple[Tensors, Tensors, Tensors]:
        shared, start = job.shared, job.start
        trained = job.train(correction={name: shared[name] - own[name] for name in start})
        new = {
            name: own[name] - shared[name] + (start[name] - trained[name]) / (job.steps * job.rate) for name in start
        }
        return new, trained, {name: new[name] - own[name] for name in start}

    def merge(shared: Tensors, updates: Sequence[Update], model: Tensors) -> tuple[Tensors, Tensors]:
        change = {name: sum_of([update.change[name] for update in updates]) / len(updates) for name in model}
        moved = {name: sum_of([update.extra[name] for update in updates]) / clients for name in model}
        return {name: shared[name] + moved[name] for name in model}, change

    return (zeros, train), (zeros, merge)


def sum_of(arrays: Sequence[Any]) -> Any:
    return np.sum(arrays, axis=0, dtype=np.float32)


def main(versions: int = 20) -> None:
    fed = Federation(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        data=load("train"),
        partition=dirichlet(0.3, 8),  # from 93 to 311 samples, so from 15 to 50 steps: what FedNova is for
        test=load("test"),
        plan={"local_epochs": 5, "learning_rate": 0.05, "momentum": 0.0, "codec": "float32"},
    )
    client, merge_rule = scaffold(len(fed.devices))
    runs = {
        "fedavg": fed.simulate(versions=versions, sync=True),
        "fednova": fed.simulate(versions=versions, sync=True, merge_rule=fednova()),
        "scaffold": fed.simulate(versions=versions, sync=True, client=client, merge_rule=merge_rule),
    }
    for name, run in runs.items():
        print(f"{name:<9} accuracy {run.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
