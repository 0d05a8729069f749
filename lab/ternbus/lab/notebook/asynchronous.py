"""Algorithms from the literature for asynchronous buffers, as pairs for `Federation.simulate`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.notebook.algorithms import Pair, Update
from ternbus.lab.notebook.simulated import whole

_Caches = Mapping[str, Tensors]  # the newest update of each client


def ca2fl(clients: int) -> Pair:
    """A merge rule: CA2FL, calibration by cached updates (Wang, Cao, Wu, Chen & Chen, ICLR 2024, algorithm 2).

    With the buffer S of version t and the newest update h_i of each of N clients, 0 before its first:

        v_t = h_t + 1/|S| sum_(i in S) (Delta_i - h_i)
        h_i <- Delta_i for each i in S
        h_(t+1) = 1/N sum_i h_i

    v_t is the change. The server optimizer applies it with the paper's global rate eta, `optimizer.learning_rate`.
    `clients` is N. Neither samples nor staleness weigh; of two updates of a client in S the later is kept. The server
    holds a model for each client. Raises `ConfigError` for what is no number of clients, and for updates of more.
    """
    if whole("ca2fl(): clients", clients) < 1:
        raise ConfigError(f"ca2fl({clients}): it is the number of all clients, 1 or more")

    def init(model: Tensors) -> tuple[_Caches, Tensors]:
        return {}, {name: np.zeros_like(tensor) for name, tensor in model.items()}

    def apply(
        state: tuple[_Caches, Tensors], updates: Sequence[Update], model: Tensors
    ) -> tuple[tuple[_Caches, Tensors], Tensors]:
        caches, mean = state
        newest = {update.device: update.change for update in updates}
        if (found := len({*caches, *newest})) > clients:
            raise ConfigError(f"ca2fl({clients}) has got updates of {found} clients: give it the number of all clients")
        changes = [update.change for update in updates]
        known = [caches[update.device] for update in updates if update.device in caches]
        replaced = [caches[device] for device in newest if device in caches]
        change, after = {}, {}
        for name in model:
            change[name] = mean[name] + (_sum(changes, name) - _sum(known, name)) / len(updates)
            after[name] = mean[name] + (_sum([*newest.values()], name) - _sum(replaced, name)) / clients
        return ({**caches, **newest}, after), change

    return init, apply


def fadas(
    rate: float = 0.01,
    threshold: int = 1,
    *,
    divided: bool = False,
    beta1: float = 0.9,
    beta2: float = 0.99,
    epsilon: float = 1e-8,
) -> tuple[Pair, Pair]:
    """A merge rule and its server optimizer: FADAS (Wang, Wang, Lu & Chen, ICML 2024, algorithm 1).

    With the buffer S of version t, and tau the largest staleness in it:

        Delta = 1/|S| sum_(i in S) Delta_i
        m <- beta1 m + (1 - beta1) Delta;  v <- beta2 v + (1 - beta2) Delta^2;  u <- max(u, v)
        w <- w + eta_t m / (sqrt(u) + epsilon)
        eta_t = eta if tau <= tau_c, else min(eta, 1 / tau)        (its delay-adaptive learning rate)

    m, v and u begin at 0. `rate` is eta, `threshold` tau_c. A rate below 1 / tau is never shrunk by that formula; with
    `divided` eta_t is eta / tau there, as in the code that the authors released. Statistics, such as those of batch
    norm, follow Delta itself. Use both pairs in one run: the optimizer learns tau from the rule. Raises `ConfigError`
    for a negative `threshold`, for a `rate` or an `epsilon` that is not above 0, and for a beta outside [0, 1).
    """
    numbers: dict[str, Any] = {"rate": rate, "beta1": beta1, "beta2": beta2, "epsilon": epsilon}
    for name, given in numbers.items():
        if isinstance(given, bool) or not isinstance(given, int | float | np.number) or not np.isfinite(given):
            raise ConfigError(f"fadas({name}={given!r}): it must be a number")
        if name in ("rate", "epsilon") and given <= 0:
            raise ConfigError(f"fadas({name}={given:g}): it must be above 0")
        if name.startswith("beta") and not 0 <= given < 1:
            raise ConfigError(f"fadas({name}={given:g}): it must be from 0 to below 1")
    if whole("fadas(): threshold", threshold) < 0:
        raise ConfigError(f"fadas(threshold={threshold}): it is a number of versions, 0 or more")
    delay = 0

    def merge(_: None, updates: Sequence[Update], model: Tensors) -> tuple[None, Tensors]:
        nonlocal delay
        delay = max(update.staleness for update in updates)
        changes = [update.change for update in updates]
        return None, {name: _sum(changes, name) / len(changes) for name in model}

    def begin(model: Tensors) -> tuple[Any, Any, Any]:
        m, v, u = ({name: np.zeros_like(tensor) for name, tensor in model.items()} for _ in range(3))
        return m, v, u

    def step(state: tuple[Any, Any, Any], model: Tensors, change: Tensors) -> tuple[tuple[Any, Any, Any], Any]:
        shrunk = (rate / delay if divided else min(rate, 1 / delay)) if delay > threshold else rate
        m = {name: beta1 * state[0][name] + (1 - beta1) * change[name] for name in model}
        v = {name: beta2 * state[1][name] + (1 - beta2) * np.square(change[name]) for name in model}
        u = {name: np.maximum(state[2][name], v[name]) for name in model}
        return (m, v, u), {name: model[name] + shrunk * m[name] / (np.sqrt(u[name]) + epsilon) for name in model}

    return (_nothing, merge), (begin, step)


def _nothing(_: Tensors) -> None:
    return None


def _sum(changes: Sequence[Tensors], name: str) -> Any:
    return np.sum([change[name] for change in changes], axis=0, dtype=np.float32)
