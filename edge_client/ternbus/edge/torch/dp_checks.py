"""What a model must be for DP-SGD: one gradient for each sample, which depends on no other sample.

The checks need no data, and no weights of the aggregator's: what they find tells nothing, and no weights hide it.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import code_errors

PROBES: Final = (2, 3)  # numbers of samples: one alone could be the size of another dimension by chance
OUTPUTS: Final = "outputs"  # among the names of parameters
ROUNDING: Final = 16  # times the dtype's epsilon, of the largest value; a sum in another order differs by less

Rows = Mapping[str, Tensor]  # by name; the first dimension is the sample


def check_layers(model: nn.Module) -> None:
    """Raises `ConfigError` for a layer whose forward pass writes to its weights."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise ConfigError(
                f'dp = "sample" cannot train this model: the layer {name or "Embedding"} has max_norm, which changes '
                "the weights of what it looks up, without noise; leave max_norm out"
            )


def check_unit(name: str, gradients: object, count: int) -> None:
    """Raises `ConfigError` if the parameter of this name does not have `count` gradients, one for each sample."""
    layer = name.rpartition(".")[0] or name
    if gradients is None:
        raise ConfigError(
            'dp = "sample" cannot train this model: its output does not depend on one of its parameters, '
            f"{name}; freeze it"
        )
    if not isinstance(gradients, Tensor) or len(gradients) != count:
        raise ConfigError(
            f'dp = "sample" cannot train this model: in the layer {layer} the rows are not the samples, of which each '
            "has its own gradient; let each layer take the samples as its first dimension, without x.flatten(0, 1) or "
            "x.transpose(0, 1) before it"
        )


def check_alone(compute: Callable[[Tensor], Rows], zeros: Tensor) -> None:
    """Raises `ConfigError` if a sample changes the outputs or the gradients of another, as in x - x.mean(0).

    `compute` returns both for inputs of the shape and dtype of `zeros`, one row for each sample. Each sample in turn is
    replaced; the rows of the others must stay as they are, with the same random numbers. What is not finite, or differs
    without a reason, and inputs for which `compute` raises an exception decide nothing.
    """
    for inputs, others in _inputs(zeros):
        try:
            name = _mixed(compute, inputs, others)
        except code_errors():
            continue
        if name is None:
            continue
        if name:
            what = "outputs" if name == OUTPUTS else f"gradients of the parameter {name}"
            raise ConfigError(
                f'dp = "sample" cannot train this model: the {what} of one sample depend on the other samples of its '
                "batch, as in x - x.mean(0), so that one sample would change the gradients of all; let model, loss and "
                "augment treat each sample alone, without sums or statistics over the first dimension"
            )
        return


def _mixed(compute: Callable[[Tensor], Rows], inputs: Tensor, others: Tensor) -> str | None:
    """The name of what depends on other samples; empty if nothing does; None if nothing can be compared."""
    every = torch.ones(len(inputs), dtype=torch.bool)
    found, again = (_computed(compute, inputs) for _ in range(2))
    before = {
        name: rows
        for name, rows in found.items()
        if rows.isfinite().all() and not _different({name: rows}, again, every)
    }
    for changed in range(len(inputs)):
        replaced, kept = inputs.clone(), every.clone()
        replaced[changed], kept[changed] = others[changed], False
        if name := _different(before, _computed(compute, replaced), kept):
            return name
    return "" if before else None


def drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights that keep the size of what they are applied to; of one dimension, between 0.5 and 1.5."""
    if parameter.dim() < 2:
        return (torch.rand(parameter.shape, generator=generator) + 0.5).to(parameter.dtype)
    normal = torch.randn(parameter.shape, generator=generator)
    return (normal / math.sqrt(max(1, parameter.numel() // max(1, len(parameter))))).to(parameter.dtype)


def _inputs(zeros: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples, and others in their places. Integers are 0 and 1, since they may be the numbers of rows of a table."""
    generator = torch.Generator().manual_seed(1)
    if not (zeros.is_floating_point() or zeros.is_complex()):
        chosen = torch.randint(0, 2, zeros.shape, generator=generator)
        yield chosen.to(zeros.dtype), (1 - chosen).to(zeros.dtype)
        return
    for more in (1.0, 0.0):  # some models take no more than 1
        one, other = (torch.rand(zeros.shape, generator=generator) for _ in range(2))
        yield one.to(zeros.dtype), (other + more).to(zeros.dtype)


def _computed(compute: Callable[[Tensor], Rows], inputs: Tensor) -> Rows:
    with _same_random_numbers():
        return compute(inputs)


def _different(before: Rows, after: Rows, kept: Tensor) -> str:
    """The first name whose rows of the samples `kept` differ; empty if none does."""
    for name, rows in before.items():
        other = after.get(name)
        if other is None or other.shape != rows.shape or not rows.numel():  # as of a batch cut to its longest sample
            continue
        allowed = ROUNDING * torch.finfo(rows.dtype).eps * rows.abs().max() if rows.is_floating_point() else 0
        if not bool((other[kept] - rows[kept]).abs().max() <= allowed):
            return name
    return ""


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Dropout and augmentation draw the same each time; afterwards all sources are as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - a task's code may use it
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - likewise
    random.seed(1)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - likewise
        random.setstate(states[2])
