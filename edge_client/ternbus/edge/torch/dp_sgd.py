"""Per-sample differential privacy in PyTorch: DP-SGD (Abadi et al. 2016, algorithm 1) on Opacus' per-sample gradients.

Opacus computes each sample's gradient. Gradients of any values are clipped and summed here, in float64. The samples of
a batch, and the noise, come from `RandomSource`: the secure source of Opacus, torchcsprng, is no longer built. Opacus
is loaded at the first use.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.noise import ROUNDING, RandomSource
from ternbus.edge.learn.task_loader import code_errors, described
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.autotune import duration
from ternbus.edge.torch.batches import inputs_of, with_inputs
from ternbus.edge.torch.buffers import Buffers
from ternbus.edge.torch.dp_checks import (
    OUTPUTS,
    PROBES,
    check_alone,
    check_layers,
    check_outputs,
    check_unit,
    drawn,
    in_order,
)
from ternbus.edge.torch.objective import trainable
from ternbus.edge.torch.tree import Tree, leaves, mapped, row_count

ELEMENTS: Final = 2**18  # of gradients, converted to float64 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimized. Outputs and targets are trees of tensors, each with one row for each sample."""

    predict: Callable[[Tensor], tuple[Tree, Tree]]  # numbers of samples -> the model's outputs, the targets
    loss: Callable[[Tree, Tree], Any]  # outputs, targets -> the mean loss
    zeros: Callable[[int], Tree]  # a batch of this many samples that are 0
    outputs: Callable[[Tree], tuple[Tree, Tree]]  # as `predict`, for a batch


def descend(
    model: nn.Module, objective: Objective, *, samples: int, plan: Plan, rate: float, random_source: RandomSource
) -> dict[str, float]:
    """Run the plan's steps on the model, in place, in training mode. Returns their number and the last batch's loss.

    The sum of clipped gradients and noise is divided by the expected batch size, `plan.batch_size` or all samples: the
    actual batch size is secret. A sample affects the steps by its clipped gradient only: one whose gradient is not
    finite, or that raises an exception, counts as 0 (and in `failed_samples` of the result). What a forward pass writes
    to parameters or buffers is undone. The number of steps does not depend on the samples, so neither do the time and
    the share of data in the result. Raises `ConfigError` for a model without per-sample gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unclipped = replace(plan, grad_clip=0.0)  # each sample's gradient is clipped to dp_clip
    optimizer = local_optimizer.begin(unclipped, [parameter.detach() for parameter in parameters])
    expected = min(plan.batch_size, samples)
    with _per_sample(model):
        gradients = _Gradients(model, parameters, objective, plan.dp_clip)
        gradients.check()

        def noisy(sums: Sequence[Tensor]) -> list[Tensor]:
            deviation = plan.dp_noise * plan.dp_clip
            pairs = zip(sums, parameters, strict=True)
            return [_noisy(clipped, parameter, deviation, expected, random_source) for clipped, parameter in pairs]

        steps = plan.steps(samples)
        if plan.local_seconds is not None:
            steps = max(1, min(steps, _steps_within(plan.local_seconds, lambda: noisy(gradients.of_probe(expected)))))
        for step in range(steps):
            sums = gradients.clipped_sums(torch.from_numpy(random_source.sampled(samples, expected / samples)))
            with torch.no_grad():
                optimizer.step(noisy(sums), rate * plan.step_share(step, steps))
            gradients.keep()
    failed = {"failed_samples": float(gradients.failed)} if gradients.failed else {}
    return {"loss": gradients.loss, "steps": steps, **failed}


def _steps_within(seconds: float, step: Callable[[], object]) -> int:
    """How many steps there is time for, after one or two that are measured in the same time."""
    one_s = duration(step, time.perf_counter)
    left_s = seconds - one_s
    if left_s > one_s:  # the first one is slower, while memory is allocated
        again_s = duration(step, time.perf_counter)
        one_s, left_s = min(one_s, again_s), left_s - again_s
    return int(left_s / one_s)


def clipped_sum(gradients: Sequence[Tensor], clip: float, usable: Tensor | None = None) -> tuple[list[Tensor], int]:
    """sum_i g_i·min(1, C/|g_i|) over the samples i, in float64; and the number of samples that count as 0.

    Those are not `usable`, a bool for each sample, or not finite. Each of `gradients` belongs to one parameter, shape
    (samples, …); |g_i| is the L2 norm over all parameters. One sample changes the sum by at most C, up to the rounding
    of a float64 sum.
    """
    flat = [gradient.reshape(len(gradient), -1) for gradient in gradients]
    squares = torch.zeros(len(flat[0]), dtype=torch.float64)
    for gradient in flat:
        for rows, part in _doubled(gradient):
            squares[rows] += torch.linalg.vecdot(part, part)
    finite = squares.isfinite()  # no square of a finite float32 overflows in float64
    if usable is not None:
        finite &= usable
    failed = int((~finite).sum())
    factors = ROUNDING * (clip / squares.sqrt()).clamp(max=1.0)
    factors[~finite] = 0.0
    sums = []
    for gradient, shaped in zip(flat, gradients, strict=True):
        total = torch.zeros(gradient.shape[1], dtype=torch.float64)
        for rows, part in _doubled(gradient):
            if failed:
                part[~finite[rows]] = 0.0
            total.addmv_(part.t(), factors[rows])
        sums.append(total.reshape(shaped.shape[1:]))
    return sums, failed


def _doubled(gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Convert some rows at a time to float64, always in the same memory, which stays in the processor's cache."""
    count = max(1, ELEMENTS // max(1, gradient.shape[1]))
    memory = torch.empty(min(count, len(gradient)), gradient.shape[1], dtype=torch.float64)
    for first in range(0, len(gradient), count):
        rows = slice(first, min(first + count, len(gradient)))
        yield rows, memory[: rows.stop - first].copy_(gradient[rows])


class _NoLossError(Exception):
    """The loss raises an exception for each sample of the batch, which needs no further search."""


@dataclass(slots=True)
class _Gradients:
    """The clipped gradients of a batch, under Opacus' hooks."""

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    objective: Objective
    clip: float
    failed: int = 0  # samples, in all steps
    loss: float = 0.0  # of the last batch
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _buffers: Buffers = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = Buffers(self.model, set(self.model.buffers()))
        self._kept = {name: tensor.detach().clone() for name, tensor in self._state().items()}

    def keep(self) -> None:
        """Keep the parameters as they are now, after a step; the buffers are as they were."""
        for name, parameter in self.model.named_parameters():
            self._kept[name].copy_(parameter.detach())

    def check(self) -> None:
        """Raises `ConfigError` for a model whose parameters do not each have one gradient for each sample.

        Opacus takes the rows of each layer's input for the samples. If a model puts time first, or folds it into the
        rows, each time step would be clipped alone.
        """
        for count in PROBES:
            try:
                outputs = self._backward_of_probe(self.objective.zeros(count), with_loss=False)
            except code_errors() as error:
                self._forget()
                self._restore()
                raise ConfigError(
                    f'dp = "sample" cannot check this model: with samples that are 0 it raises {described(error)}'
                ) from error
            check_outputs(outputs, count)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    check_unit(name, getattr(parameter, "grad_sample", None), count)
            self._forget()
            self._restore()
        self._check_alone()

    def _check_alone(self) -> None:
        """Raises `ConfigError` for a model in which samples change each other's gradients, whatever its weights are."""
        kept, generator = self._kept, torch.Generator().manual_seed(1)
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self._kept = {**kept, **{name: drawn(each, generator) for name, each in trained.items()}}
        count = max(PROBES)
        batch = self.objective.zeros(count)

        def compute(inputs: Tree) -> dict[str, Tensor]:
            self._restore()
            try:
                outputs = self._backward_of_probe(with_inputs(batch, inputs), with_loss=True)
                found = {name: getattr(each, "grad_sample", None) for name, each in trained.items()}
            finally:
                self._forget()
            rows = {f"{OUTPUTS} {number}": each.detach() for number, each in enumerate(outputs)} | found
            return {name: each for name, each in rows.items() if each is not None and each.shape[:1] == (count,)}

        try:
            check_alone(compute, inputs_of(batch), count)
        finally:
            self._kept = kept
            self._restore()

    def _backward_of_probe(self, batch: Tree, *, with_loss: bool) -> list[Tensor]:
        """Compute gradients for samples that are made up, of the loss or of the outputs' sum; returns the outputs."""
        outputs, targets = self.objective.outputs(batch)
        found = [leaf for leaf in leaves(outputs) if leaf.is_floating_point()]
        totals = [leaf.sum() for leaf in found if leaf.requires_grad]
        if with_loss:
            with suppress(*code_errors()):  # a loss may reject targets that are 0
                totals = [trainable(self.objective.loss(outputs, targets))]
        torch.autograd.backward(totals)
        return found

    def clipped_sums(self, rows: Tensor) -> list[Tensor]:
        """Returns one sum for each parameter: of the samples with these numbers, without those that fail.

        If the batch raises an exception, the samples that do so alone are found. Then the batch runs again, with the
        same random numbers, as it would be without them: other samples stay in their places.
        """
        count = len(rows)
        if not count:  # an empty batch must stay secret too
            return self._nothing()
        if count == 1:  # as large as other batches for a model that squeezes its outputs
            rows = rows.repeat(2)
        random_state = torch.get_rng_state()
        found = self._sums(rows, count)
        if found is None:
            usable = _usable(len(rows), lambda chosen: self._alone(rows[chosen], random_state))
            if usable.any():
                torch.set_rng_state(random_state)
                found = self._sums(torch.where(usable, rows, rows[usable][0]), count, usable)
        if found is None:  # noise alone
            self.failed += count
            return self._nothing()
        sums, failed = found
        self.failed += failed
        return sums

    def of_probe(self, count: int) -> list[Tensor]:
        """The sums of samples that are 0: they take as long as others."""
        objective = self.objective
        self.objective = replace(objective, predict=lambda rows: objective.outputs(objective.zeros(len(rows))))
        try:
            return self.clipped_sums(torch.arange(count))
        finally:
            self.objective, self.failed, self.loss = objective, 0, 0.0

    def _sums(self, rows: Tensor, count: int, usable: Tensor | None = None) -> tuple[list[Tensor], int] | None:
        """The sums of the first `count` rows, and how many of these failed; None if the batch raises an exception."""
        try:
            loss, with_loss = self._backward(rows)
            kept = with_loss if usable is None else with_loss & usable
            gradients = [self._of_samples(parameter, len(rows))[:count] for parameter in self.parameters]
            found = clipped_sum(gradients, self.clip, kept[:count])
            self.loss = loss.item()
        except _NoLossError:
            self._forget()
            return self._nothing(), count
        except code_errors():  # it may depend on the data: nobody else may see it
            self._forget()
            return None
        self._clear()
        return found

    def _alone(self, rows: Tensor, random_state: Tensor) -> None:
        """Raises an exception if one of these samples does so."""
        torch.set_rng_state(random_state)
        try:
            self._backward(rows)
        finally:
            self._forget()

    def _backward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients. Returns the mean loss, and for each sample whether it has a loss."""
        try:
            outputs, targets = self.objective.predict(rows)
            loss, with_loss = self._loss(outputs, targets, len(rows))
            loss.backward()
        finally:
            self._restore()
        return loss, with_loss

    def _loss(self, outputs: Tree, targets: Tree, count: int) -> tuple[Tensor, Tensor]:
        """The mean of each sample's own loss, and for which samples it raises no exception.

        Of a batch it might divide by what all samples have, such as the sum of class weights, or the number of tokens
        that `ignore_index` leaves: one sample would then scale the gradients of the others.
        """
        both = (outputs, targets)
        if row_count(both) != count:
            raise ValueError("outputs or targets do not have a row for each sample")
        values = list(leaves(both))

        def alone(*rows: Tensor) -> Tensor:
            # Twice, since a loss may squeeze its outputs, and must then get what a larger batch gives it.
            return trainable(self.objective.loss(*mapped(in_order([torch.stack([row, row]) for row in rows]), both)))

        with suppress(*code_errors()):  # of a sample; or of a loss that decides by values, which vmap cannot do
            return torch.vmap(alone, randomness="different")(*values).mean(), torch.ones(count, dtype=torch.bool)
        found, usable = [], torch.zeros(count, dtype=torch.bool)
        for number in range(count):
            with suppress(*code_errors()):
                found.append(alone(*[value[number] for value in values]))
                usable[number] = True
        if not found:
            raise _NoLossError
        return torch.stack(found).sum() / count, usable

    def _of_samples(self, parameter: nn.Parameter, count: int) -> Tensor:
        found: object = getattr(parameter, "grad_sample", None)
        if found is None:  # the loss of this batch does not depend on the parameter
            return parameter.detach().new_zeros(count, *parameter.shape)
        if not isinstance(found, Tensor) or len(found) != count:
            raise ValueError("the rows of a layer are not the samples")
        return found

    def _state(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _restore(self) -> None:
        """Undo what the forward pass wrote: it would depend on the samples, without noise."""
        self._buffers.put_back()
        for name, tensor in self._state().items():
            if name in self._kept:  # a forward pass may add buffers
                tensor.data.copy_(self._kept[name])

    def _nothing(self) -> list[Tensor]:
        return [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in self.parameters]

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus adds it

    def _forget(self) -> None:
        """Remove what an interrupted forward pass has left in the hooks: the next pass would use it."""
        self._clear()
        for parameter in self.parameters:
            setattr(parameter, "_forward_counter", 0)  # noqa: B010 - internal to Opacus, which has no function to reset it
        for keeper in (*self.parameters, *self.model.modules()):
            for name in ("_current_grad_sample", "activations", "max_batch_len"):
                if hasattr(keeper, name):
                    delattr(keeper, name)


def _usable(count: int, compute: Callable[[Tensor], object]) -> Tensor:
    """For each of `count` samples, whether `compute` does not raise an exception for two of it; found by bisection."""
    usable = torch.ones(count, dtype=torch.bool)
    groups = list(torch.arange(count).tensor_split(2))
    while groups:
        group = groups.pop()
        try:
            compute(group if len(group) > 1 else group.repeat(2))
        except code_errors():  # the samples are left out
            if len(group) > 1:
                groups += group.tensor_split(2)
            else:
                usable[group] = False
    return usable


def _noisy(
    clipped: Tensor, parameter: nn.Parameter, deviation: float, expected: int, random_source: RandomSource
) -> Tensor:
    noise = torch.from_numpy(random_source.normal(parameter.numel())).reshape(parameter.shape)
    return ((clipped + noise * deviation) / expected).to(parameter.dtype)


@contextmanager
def _per_sample(model: nn.Module) -> Iterator[None]:
    """Attach Opacus' hooks to the model."""
    try:
        from opacus import GradSampleModule  # noqa: PLC0415 - takes seconds and loads scipy
        from opacus.validators import ModuleValidator  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        raise ConfigError("the plan's dp = \"sample\" needs the package opacus: pip install 'ternbus[dp]'") from error
    if errors := ModuleValidator.validate(model, strict=False):
        raise ConfigError(f'dp = "sample" cannot train this model: {errors[0]}')
    check_layers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the inputs need no gradient
        try:
            hooked = GradSampleModule(model)
        except NotImplementedError as error:  # a layer with parameters and buffers
            raise ConfigError(f'dp = "sample" cannot train this model: {described(error)}') from error
        try:
            yield
        finally:
            hooked.to_standard_module()
            for parameter in model.parameters():
                parameter.grad = None
