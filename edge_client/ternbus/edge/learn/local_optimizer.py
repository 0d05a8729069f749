"""SGD, Adam and RMSprop for local training, on numpy arrays and PyTorch tensors alike.

With torch they must be called under `torch.no_grad()`. torch.optim is not used: its first step loads the compiler,
which takes 80 MB and a second on every device. An optimizer's momenta last for one training.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, Protocol

from ternbus.edge.plan.plan import Plan

EPSILON: Final = 1e-8  # of Adam and RMSprop

Array = Any  # a numpy array or a tensor


class Optimizer(Protocol):
    """Changes the parameters of its constructor in place."""

    def step(self, gradients: Sequence[Array], rate: float | Sequence[Array]) -> None:
        """Make one step by the gradients of the loss, at a rate of `Plan.rates`. The plan's `grad_clip` is applied.

        Of stacked models the rates may differ: then there is an array for each parameter, which broadcasts with it.
        """
        ...

    def keep_first(self, count: int) -> None:
        """Go on with the first `count` of stacked models."""
        ...


def begin(plan: Plan, parameters: Sequence[Array]) -> Optimizer:
    """The plan's optimizer for these parameters. Their present values are FedProx's w0."""
    return {"sgd": Sgd, "rmsprop": RmsProp}.get(plan.optimizer, Adam)(plan, parameters)


class _Stepper:
    """The same for all: the objective's gradient and its clipping."""

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        self._plan = plan
        self._parameters = list(parameters)
        self._began = [w * 1 for w in parameters] if plan.proximal_mu else []
        self._steps = 0

    def keep_first(self, count: int) -> None:
        """Go on with the first `count` rows of each parameter, of models that are stacked along a new dimension."""
        for name, value in vars(self).items():
            if isinstance(value, list):  # parameters, and what there is for each: momenta, squares
                setattr(self, name, [each[:count] for each in value])

    def step(self, gradients: Sequence[Array], rate: float | Sequence[Array]) -> None:
        self._steps += 1
        if self._plan.proximal_mu:
            gradients = self._objective(gradients)
        if self._plan.grad_clip:
            gradients = _clipped(gradients, self._plan.grad_clip)
        for number, g in enumerate(gradients):
            self._move(number, g, rate if isinstance(rate, int | float) else rate[number])

    def _objective(self, gradients: Sequence[Array]) -> list[Array]:
        """The gradients of FedProx's objective: loss + mu/2·|w - w0|² (Li et al. 2020, eq. 2)."""
        mu = self._plan.proximal_mu
        return [g + mu * (w - w0) for g, w, w0 in zip(gradients, self._parameters, self._began, strict=True)]

    def _move(self, number: int, g: Array, rate: Array) -> None:
        raise NotImplementedError


class Sgd(_Stepper):
    """g = grad(loss) + mu·(w - w0) + wd·w;  m = beta·m + g;  w = w - lr·m, as in `torch.optim.SGD`.

    With `nesterov`, w = w - lr·(g + beta·m) (Sutskever et al. 2013, in the form of torch).
    """

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        super().__init__(plan, parameters)
        self._momenta = [w * 0 for w in parameters]

    def _move(self, number: int, g: Array, rate: Array) -> None:
        plan, w, m = self._plan, self._parameters[number], self._momenta[number]
        if plan.weight_decay:
            g = g + plan.weight_decay * w
        m *= plan.momentum
        m += g
        w -= rate * (g + plan.momentum * m if plan.nesterov else m)


class Adam(_Stepper):
    """Kingma & Ba 2015, algorithm 1; `adamw` decouples the weight decay (Loshchilov & Hutter 2019, algorithm 2).

    g = grad(loss) + mu·(w - w0);  adam: g += wd·w, adamw: w -= lr·wd·w;
    m = b1·m + (1 - b1)·g;  v = b2·v + (1 - b2)·g²;
    w -= lr·(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)
    """

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        super().__init__(plan, parameters)
        self._means = [w * 0 for w in parameters]
        self._squares = [w * 0 for w in parameters]

    def _move(self, number: int, g: Array, rate: Array) -> None:
        plan, w, m, v = self._plan, self._parameters[number], self._means[number], self._squares[number]
        if plan.weight_decay and plan.optimizer == "adam":
            g = g + plan.weight_decay * w
        elif plan.weight_decay:
            w *= 1 - rate * plan.weight_decay
        m *= plan.beta1
        m += (1 - plan.beta1) * g
        v *= plan.beta2
        v += (1 - plan.beta2) * g * g
        root = (v / (1 - plan.beta2**self._steps)) ** 0.5
        w -= (rate / (1 - plan.beta1**self._steps)) * m / (root + EPSILON)


class RmsProp(_Stepper):
    """Tieleman & Hinton 2012 (lecture 6.5), as in `torch.optim.RMSprop` without momentum.

    g = grad(loss) + mu·(w - w0) + wd·w;  v = alpha·v + (1 - alpha)·g²;  w -= lr·g / (sqrt(v) + epsilon)
    """

    def __init__(self, plan: Plan, parameters: Sequence[Array]) -> None:
        super().__init__(plan, parameters)
        self._squares = [w * 0 for w in parameters]

    def _move(self, number: int, g: Array, rate: Array) -> None:
        plan, w, v, alpha = self._plan, self._parameters[number], self._squares[number], self._plan.rmsprop_alpha
        if plan.weight_decay:
            g = g + plan.weight_decay * w
        v *= alpha
        v += (1 - alpha) * g * g
        w -= rate * g / (v**0.5 + EPSILON)


def _clipped(gradients: Sequence[Array], clip: float) -> Sequence[Array]:
    norm = _norm(gradients)
    return [g * (clip / norm) for g in gradients] if norm > clip else gradients


def _norm(gradients: Sequence[Array]) -> float:
    """The L2 norm over all gradients, also where squares overflow; NaN or infinity if an element is one."""
    wide = [g.float() if hasattr(g, "float") else g for g in gradients]  # half precision of torch
    norm = math.sqrt(float(sum((g * g).sum() for g in wide)))
    if math.isfinite(norm):
        return norm
    largest = max(float(abs(g).max()) for g in wide)
    return largest * math.sqrt(float(sum(((g / largest) ** 2).sum() for g in wide)))
