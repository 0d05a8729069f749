"""What a model must be for DP-SGD: one gradient for each sample, which depends on no other sample.

The checks need no data, and no weights of the aggregator's: what they find tells nothing, and no weights hide it.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.torch.tree import Tree, leaves, mapped, some_rows

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


def check_outputs(outputs: Sequence[Tensor], count: int) -> None:
    """Raises `ConfigError` for outputs of a batch that are not those of its samples, such as a mean over them."""
    if not any(output.requires_grad for output in outputs):
        raise ConfigError('dp = "sample" cannot train this model: its outputs do not depend on its parameters')
    for output in outputs:
        if output.shape[:1] != (count,):
            raise ConfigError(
                'dp = "sample" cannot train this model: one of its outputs has the shape '
                f"{tuple(output.shape)} for {count} samples; let each output have a row for each sample, and compute "
                "the loss in loss(outputs, targets)"
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


def check_alone(compute: Callable[[Tree], Rows], zeros: Tree, count: int) -> None:
    """Raises `ConfigError` if a sample changes the outputs or the gradients of another, as in x - x.mean(0).

    `compute` returns both for inputs of the shapes and dtypes of `zeros`, with a row for each of `count` samples. Each
    sample in turn is replaced; the rows of the others must stay as they are, with the same random numbers. What is not
    finite, or differs without a reason, and inputs for which `compute` raises an exception decide nothing.
    """
    for inputs, others in _inputs(zeros):
        try:
            name = _mixed(compute, inputs, others, count)
        except code_errors():
            continue
        if name is None:
            continue
        if name:
            what = "outputs" if name.partition(" ")[0] == OUTPUTS else f"gradients of the parameter {name}"
            raise ConfigError(
                f'dp = "sample" cannot train this model: the {what} of one sample depend on the other samples of its '
                "batch, as in x - x.mean(0), so that one sample would change the gradients of all; let model, loss and "
                "augment treat each sample alone, without sums or statistics over the first dimension"
            )
        return


def _mixed(compute: Callable[[Tree], Rows], inputs: Tree, others: Tree, count: int) -> str | None:
    """The name of what depends on other samples; empty if nothing does; None if nothing can be compared."""
    every = torch.ones(count, dtype=torch.bool)
    found, again = (_computed(compute, inputs) for _ in range(2))
    before = {
        name: rows
        for name, rows in found.items()
        if rows.isfinite().all() and not _different({name: rows}, again, every)
    }
    for changed in range(count):
        kept = every.clone()
        kept[changed] = False
        replaced = some_rows((inputs, others), torch.arange(count))  # copies
        for one, other in zip(leaves(replaced[0]), leaves(replaced[1]), strict=True):
            one[changed] = other[changed]
        if name := _different(before, _computed(compute, replaced[0]), kept):
            return name
    return "" if before else None


def drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights that keep the size of what they are applied to; of one dimension, between 0.5 and 1.5."""
    if parameter.dim() < 2:
        return (torch.rand(parameter.shape, generator=generator) + 0.5).to(parameter.dtype)
    normal = torch.randn(parameter.shape, generator=generator)
    return (normal / math.sqrt(max(1, parameter.numel() // max(1, len(parameter))))).to(parameter.dtype)


def _inputs(zeros: Tree) -> Iterator[tuple[Tree, Tree]]:
    """Samples, and others in their places. Integers are 0 and 1, since they may be the numbers of rows of a table."""
    generator = torch.Generator().manual_seed(1)
    numbers = any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves(zeros))

    def drawn_for(leaf: Tensor, more: float) -> tuple[Tensor, Tensor]:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            chosen = torch.randint(0, 2, leaf.shape, generator=generator)
            return chosen.to(leaf.dtype), (1 - chosen).to(leaf.dtype)
        one, other = (torch.rand(leaf.shape, generator=generator) for _ in range(2))
        return one.to(leaf.dtype), (other + more).to(leaf.dtype)

    for more in (1.0, 0.0) if numbers else (0.0,):  # some models take no more than 1
        pairs = [drawn_for(leaf, more) for leaf in leaves(zeros)]
        one, other = (mapped(in_order([pair[each] for pair in pairs]), zeros) for each in (0, 1))
        yield one, other


def in_order(values: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that returns these, whatever it is called with."""
    left = iter(values)
    return lambda _: next(left)


def _computed(compute: Callable[[Tree], Rows], inputs: Tree) -> Rows:
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
