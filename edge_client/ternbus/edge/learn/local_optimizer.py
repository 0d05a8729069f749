"""SGD and Adam for local training, on numpy arrays and PyTorch tensors alike.

With torch they must be called under `torch.no_grad()`. torch.optim is not used: its first step loads the compiler,
which takes 80 MB and a second on every device. An optimizer's momenta last for one training.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

from ternbus.edge.plan.plan import Plan

EPSILON: Final = 1e-8  # of Adam

Array = Any  # a numpy array or a tensor


class Optimizer(Protocol):
    """Changes the parameters of its constructor in place."""

    def step(self, gradients: Sequence[Array], rate: float) -> None: ...


def begin(plan: Plan, parameters: Sequence[Array]) -> Optimizer:
    """The plan's optimizer for these parameters. Their present values are FedProx's w0."""
    return Sgd(plan, parameters) if plan.optimizer == "sgd" else Adam(plan, parameters)


class _Proximal:
    """The gradient of FedProx's objective: loss + mu/2·|w - w0|² (Li et al. 2020, eq. 2)."""

    def __init__(self, mu: float, parameters: Sequence[Array]) -> None:
        self._mu = mu
        self._began = [w * 1 for w in parameters] if mu else [None] * len(parameters)

    def gradient(self, number: int, w: Array, g: Array) -> Array:
        return g + self._mu * (w - self._began[number]) if self._mu else g


class Sgd:
    """g = grad(loss) + mu·(w - w0) + wd·w;  m = beta·m + g;  w = w - lr·m, as in `torch.optim.SGD`."""

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        self._plan = plan
        self._proximal = _Proximal(plan.proximal_mu, parameters)
        self._parameters = list(parameters)
        self._momenta = [w * 0 for w in parameters]

    def step(self, gradients: Sequence[Array], rate: float) -> None:
        for number, (w, m, loss_g) in enumerate(zip(self._parameters, self._momenta, gradients, strict=True)):
            g = self._proximal.gradient(number, w, loss_g)
            m *= self._plan.momentum  # noqa: PLW2901 - in place
            m += g + self._plan.weight_decay * w if self._plan.weight_decay else g  # noqa: PLW2901 - in place
            w -= rate * m  # noqa: PLW2901 - in place


class Adam:
    """Kingma & Ba 2015, algorithm 1; `adamw` decouples the weight decay (Loshchilov & Hutter 2019, algorithm 2).

    g = grad(loss) + mu·(w - w0);  adam: g += wd·w, adamw: w -= lr·wd·w;
    m = b1·m + (1 - b1)·g;  v = b2·v + (1 - b2)·g²;
    w -= lr·(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)
    """

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        self._plan = plan
        self._proximal = _Proximal(plan.proximal_mu, parameters)
        self._parameters = list(parameters)
        self._means = [w * 0 for w in parameters]
        self._squares = [w * 0 for w in parameters]
        self._steps = 0

    def step(self, gradients: Sequence[Array], rate: float) -> None:
        self._steps += 1
        for number, gradient in enumerate(gradients):
            self._move(number, gradient, rate)

    def _move(self, number: int, gradient: Array, rate: float) -> None:
        plan, w, m, v = self._plan, self._parameters[number], self._means[number], self._squares[number]
        g = self._proximal.gradient(number, w, gradient)
        if plan.weight_decay and plan.optimizer == "adam":
            g = g + plan.weight_decay * w
        if plan.weight_decay and plan.optimizer == "adamw":
            w *= 1 - rate * plan.weight_decay
        m *= plan.beta1
        m += (1 - plan.beta1) * g
        v *= plan.beta2
        v += (1 - plan.beta2) * g * g
        root = (v / (1 - plan.beta2**self._steps)) ** 0.5
        w -= (rate / (1 - plan.beta1**self._steps)) * m / (root + EPSILON)
