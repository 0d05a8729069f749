"""The check of a task without a federation: it trains one step, encodes and decodes one update, and evaluates.

All of it is done as the plan asks for it, on the data and with the width of one device.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from ternbus.broker.errors import FederationError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.frame import FRAME_BYTES, PARTS_MAX
from ternbus.broker.protocol.messages import PRIVATE, SAMPLES_MAX
from ternbus.broker.protocol.meta_fields import ENTRIES_MAX
from ternbus.broker.protocol.schema import Schema, Vector, is_bounded, to_tensors, to_vector
from ternbus.broker.protocol.ternary import CODECS
from ternbus.edge.core.profile import schema_mismatch
from ternbus.edge.core.state import prepare
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.failure import LOOK_AT, data_hint
from ternbus.edge.learn.kinds import staying, tensor_kinds
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.partition import watched
from ternbus.edge.learn.subnetwork import trainers_of_device
from ternbus.edge.learn.task import (
    Evaluation,
    ExaminedTrainer,
    PrivateTrainer,
    Task,
    Trained,
    Trainer,
    initial_of,
    task_plan,
    whole_number,
)
from ternbus.edge.learn.task_loader import code_errors, described, import_hint, location_of
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.privacy import SAMPLE, SUM, PrivacyPolicy, cost
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell import preflight_private
from ternbus.edge.shell.check_report import Report

LARGE_PARTS = 1000
Result = TypeVar("Result")


class _CheckAbortedError(Exception):
    """A step failed that the next steps need; the problem is in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a device trains on, and what its owner allows; by default, the whole data and everything."""

    data: Path | None = None
    partition: str = "all"
    width: float = 1.0
    hold_out: float = 0.0
    policy: PrivacyPolicy | None = None
    sums: SumPolicy | None = None
    limits: TrainingLimits = field(default_factory=TrainingLimits)
    refusal: str = ""  # why the device makes no update by the newest plan and terms that it has seen
    allowed: tuple[str, ...] = ()  # keys that may be in the plan though neither Ternbus nor the task knows them

    @property
    def held_out(self) -> str:
        """The specification of the held-out data; of all data without any."""
        return f"{self.partition};test:{self.hold_out!r}" if self.hold_out else self.partition


def check(task: Task, conditions: Conditions | None = None, plan: Mapping[str, object] | None = None) -> Report:
    """Do everything that a device and an evaluator do with a task, except the network.

    ``plan`` has the federation's keys, which override those of the task's default plan.
    """
    about = conditions or Conditions()
    check = _Check(task, Report(task=task.name), about, plan or {})
    if about.refusal and not plan:
        check.problem(f"the device makes no update by the newest plan that it has seen: {about.refusal}")
    for examine in (check.device, check.evaluator, check.alone):
        try:
            examine()
        except _CheckAbortedError:
            continue
        except code_errors() as error:  # what the task returned is not what its annotations say
            check.problem(f"what the task returned cannot be used: {described(error)}{_place(error)}")
    return check.report


class _Check:
    def __init__(self, task: Task, report: Report, conditions: Conditions, plan: Mapping[str, object]) -> None:
        self.report = report
        self._task = task
        self._conditions = conditions
        self._asked = plan
        self._start: Tensors | None = None
        self._trained_by: Plan | None = None  # a device can train by this plan

    def device(self) -> None:
        plan, about = self._plan(), self._conditions
        start, schema = self._model()
        trainer, held = self._try(
            "trainer()",
            lambda: trainers_of_device(
                self._task, data=about.data, partition=about.partition, width=about.width, hold_out=about.hold_out
            ),
        )
        trained = self._step(trainer, start, plan)
        self._compare(start, trained)
        self._update(schema, start, trained, plan)
        self._privacy(plan)
        if held is not None:
            self._evaluation("evaluate() of the held-out data", held, start)
        self._trained_by = plan

    def evaluator(self) -> None:
        evaluator = self._try("evaluator()", lambda: self._task.evaluator(data=self._conditions.data))
        if self._start is None:
            return
        began = time.perf_counter()
        found = self._evaluation("evaluate()", evaluator, self._start)
        self.report.facts |= {"test_samples": found.samples, "evaluation_s": round(time.perf_counter() - began, 4)}

    def _evaluation(self, what: str, evaluator: Trainer, tensors: Tensors) -> Evaluation:
        found: Any = self._try(what, lambda: evaluator.evaluate(tensors))
        if not isinstance(found, Evaluation):
            self._stop(f"{what} returned {type(found).__name__}: it must return an Evaluation")
        if not found.values:
            self.problem(f"{what} returned no metric in its values: return at least a loss")
        if strange := [name for name in found.values if name not in found.finite]:
            faults = evaluator.data_faults() if isinstance(evaluator, ExaminedTrainer) else ""
            why = f"; of its data, {faults}: correct or remove them" if faults else ""
            for name in strange:
                self.problem(f"{what} returned no finite {name!r} in its values{why}")
        if len(found.values) > ENTRIES_MAX:
            self.problem(f"{what} returned {len(found.values)} metrics: at most {ENTRIES_MAX} can be sent")
        return found

    def _plan(self) -> Plan:
        known = self._try("default_plan", lambda: task_plan(self._task))
        if unknown := plan_keys.unknown(self._asked, (*known.keys, *self._conditions.allowed)):
            self._stop(f"the plan: {unknown[0]}")
        own = {} if self._conditions.sums is None else {"codec": PRIVATE}  # what no head changes
        asked = {**self._task.default_plan, **own, **self._asked}
        if fault := plan_keys.fault(asked):
            self._stop(f"the plan: {fault}")
        plan = Plan.from_meta(asked)
        if self._conditions.sums is not None and (reason := self._conditions.sums.plan_fault(plan)):
            self._stop(f"the device does not train by this plan: {reason}")
        bound = plan if self._conditions.policy is None else self._conditions.policy.bound(plan)
        if isinstance(bound, str):
            self._stop(f"the device does not train by this plan: {bound}")
        return self._conditions.limits.bound(bound)

    def _model(self) -> tuple[Tensors, Schema]:
        start = self._try("initial()", lambda: initial_of(self._task, 0))
        schema = self._try("initial()", lambda: Schema.of({name: tensor.shape for name, tensor in start.items()}))
        again = self._try("initial()", lambda: initial_of(self._task, 0))
        if schema_mismatch(schema, {name: tensor.shape for name, tensor in again.items()}) or not _same(start, again):
            self._note("initial() returned another model for the same seed: experiments cannot be repeated")
        for why, names in self._try("model()", lambda: staying(self._task)).items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._note(f"{names[0]}{more}: {why}")
        self._try("initial()", lambda: tensor_kinds(self._task, start))
        sizes = {"parameters": schema.elements, "dense_parameters": schema.dense_elements}
        self.report.facts |= {"tensors": len(start), **sizes}
        vector = to_vector(schema, start)
        if not is_bounded(vector):
            self._stop("initial() returned a number beyond 2^40: no aggregator takes such a model")
        vector.setflags(write=False)  # as the follower's is
        self._start = to_tensors(schema, vector)
        return self._start, schema

    def _step(self, trainer: Trainer, start: Tensors, plan: Plan) -> Trained:
        """Train one step twice, and time the second: the first warms up."""
        samples: Any = self._try("trainer.samples", lambda: trainer.samples)
        with suppress(TypeError):  # told below
            samples = whole_number(samples)
        if not isinstance(samples, int) or not 1 <= samples <= SAMPLES_MAX:
            self._stop(f"the trainer has {samples} samples: it must have 1 to {SAMPLES_MAX}")
        name, step = self._one_step(trainer, start, plan)
        first: Any = self._try(name, step)
        began = time.perf_counter()
        again: Any = self._try(name, step)
        step_s = time.perf_counter() - began
        if not isinstance(first, Trained) or not isinstance(again, Trained):
            self._stop(f"{name} returned {type(first).__name__}: it must return Trained")
        same = first.tensors.keys() == again.tensors.keys() and _same(first.tensors, again.tensors)
        if plan.dp != SAMPLE and not same:
            self._note("train() returned another result for the same seed: experiments cannot be repeated bit for bit")
        steps = plan.steps(samples)
        self.report.facts |= {"samples": samples, "step_s": round(step_s, 4), "steps": steps,
                              "training_s": round(step_s * steps, 1)}  # fmt: skip
        return again

    def _one_step(self, trainer: Trainer, start: Tensors, plan: Plan) -> tuple[str, Callable[[], object]]:
        """One step as the plan asks for it, by the kind of its differential privacy, and the method that it calls."""
        one = replace(plan, local_steps=1, local_seconds=None)
        if plan.dp != SAMPLE:
            return "train()", lambda: trainer.train(start, one, version=0, seed=0)
        if not isinstance(trainer, PrivateTrainer):
            narrow = ", which no narrower model has" if self._conditions.width < 1 else ""
            self._stop(f'the plan has dp = "sample", and the trainer has no train_privately(){narrow}')
        private = partial(trainer.train_privately, version=0, seed=0, random_source=RandomSource())
        return "train_privately()", lambda: private(start, one)

    def _privacy(self, plan: Plan) -> None:
        """Whether the plan's budget pays for one training."""
        if plan.dp == NO_DP:
            return
        if plan.dp == SUM:
            self._note("the epsilon of a training depends on the devices in a sum: see `ternbus edge noise --dp sum`")
            return
        charge = cost(plan, int(self.report.facts["samples"]))
        spent = self._try("the privacy account", lambda: epsilon((charge,), plan.dp_delta))
        if not spent <= plan.dp_epsilon:
            self.problem(
                f"one training would spend an epsilon of {spent:.4g}, and the budget is {plan.dp_epsilon:g} (delta "
                f"{plan.dp_delta:g}): raise dp_noise or dp_epsilon, or lower the number of steps"
            )
        self.report.facts["epsilon"] = round(spent, 4) if math.isfinite(spent) else str(spent)

    def alone(self) -> None:
        """Whether one sample can be trained and evaluated alone: batch norm cannot, nor can some metrics.

        No federation need have such a device; where the data have such an owner, it is a problem.
        """
        about, start, plan = self._conditions, self._start, self._trained_by
        if start is None or plan is None or about.partition != "all" or about.hold_out:
            return
        if (samples := int(self.report.facts["samples"])) < 2:
            return
        evaluates = "evaluation_s" in self.report.facts  # on the test data; else it needs no second complaint
        try:
            with watched() as seen:
                trainer, _ = trainers_of_device(
                    self._task, data=about.data, partition=f"iid:0/{samples}", width=about.width, hold_out=0.0
                )
            if trainer.samples != 1:
                return  # it ignores partitions
            owners = seen[0].owners if seen else None
        except code_errors():
            return
        if plan.dp != SAMPLE and (why := self._failure(*self._one_step(trainer, start, plan))):
            alone = 0 if owners is None else int((owners.counts == 1).sum())
            if alone:
                have = "1 owner in the data has" if alone == 1 else f"{alone} owners in the data have"
                self.problem(f"{have} one sample, and a device with one cannot train: {why}")
            else:
                self._note(f"a device with one sample cannot train: {why}")
        if evaluates and (why := self._failure("evaluate()", lambda: trainer.evaluate(start))):
            self._note(f"a device that holds out one sample, or one class, cannot evaluate: {why}")

    def _failure(self, what: str, call: Callable[[], object]) -> str:
        """Why it fails, without a problem in the report; empty if it does not."""
        before = [*self.report.problems]
        try:
            self._try(what, call)
        except _CheckAbortedError:
            found = self.report.problems.pop()
            self.report.problems[:] = before
            return found
        return ""

    def _compare(self, start: Tensors, trained: Trained) -> None:
        if lost := [name for name in start if name not in trained.tensors]:
            self._stop(f"train() returned no {lost[0]!r}: it must return all tensors of initial()")
        for name, tensor in start.items():
            if np.shape(trained.tensors[name]) != tensor.shape:
                shape = np.shape(trained.tensors[name])
                self._stop(f"train() returned {name!r} with shape {shape}: it must have initial()'s, {tensor.shape}")
        if extra := [name for name in trained.tensors if name not in start]:
            self._note(f"train() returned {extra[0]!r}, which initial() does not have: it is not sent")
        same = [name for name in start if np.array_equal(start[name], trained.tensors[name])]
        if len(same) == len(start):
            self.problem("one training step changed nothing: is learning_rate 0, or everything frozen or detached?")
        elif same:
            self._note(f"one training step did not change {len(same)} of {len(start)} tensors, for example {same[0]!r}")
        for name, value in trained.metrics.items():
            if not math.isfinite(value):
                self._note(f"train() reported {name!r} as {value}: only finite numbers are sent")

    def _update(self, schema: Schema, start: Tensors, trained: Trained, plan: Plan) -> None:
        """Encode the update in both codecs as a device does, then decode and apply it as the aggregator does."""
        base = to_vector(schema, start)
        change = self._try("train()", lambda: to_vector(schema, trained.tensors)) - base
        for codec in CODECS:
            asked = replace(plan, codec=codec)
            began = time.perf_counter()
            block = self._try("the update", partial(compress, schema, asked, change, None, 0)).block
            update = prepare(block, seq=1, base=0, samples=1, metrics={}, frame_bytes=FRAME_BYTES)
            read = self._try("the update", partial(update.block, schema))
            seconds = time.perf_counter() - began
            parts = -(-len(update.body) // FRAME_BYTES)
            if read.content != block.content:
                self.problem(
                    "the decoded update differs from the encoded one: this is a bug in Ternbus, please report it"
                )
            if not np.isfinite(read.apply(base)).all():
                self.problem("the model is not finite after the update: lower the plan's learning_rate")
            if codec == plan.codec:
                self._fits(parts)
                self.report.facts |= {"codec": codec, "parts": parts, "codec_s": round(seconds, 4)}
            self.report.facts[f"update_{codec}_bytes"] = len(update.body)
        if plan.codec == PRIVATE:
            self._private_update(schema, change, plan)

    def _private_update(self, schema: Schema, change: Vector, plan: Plan) -> None:
        samples = int(self.report.facts["samples"])
        found = self._try("the update", partial(preflight_private.trial, schema, plan, change, samples))
        if not found.agrees:
            self.problem("the decoded update differs from the encoded one: this is a bug in Ternbus, please report it")
        parts = -(-found.words // FRAME_BYTES)
        self._fits(parts)
        self.report.facts |= {"codec": PRIVATE, "parts": parts, "codec_s": round(found.seconds, 4)}
        self.report.facts["update_private_bytes"] = found.words
        self._note(preflight_private.NOTE)

    def _fits(self, parts: int) -> None:
        if parts > PARTS_MAX:
            self.problem(f"an update has {parts} parts, and the protocol allows {PARTS_MAX}: use a smaller model")
        elif parts > LARGE_PARTS:
            self._note(f"an update has {parts} parts: is the codec float32 intended for a model of this size?")

    def _try(self, what: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except FederationError as error:
            self._stop(str(error))
        except code_errors() as error:
            message = import_hint(error) or f"{what} raised {described(error)}"
            lacks_data = self._conditions.data is None and what in ("trainer()", "evaluator()")
            where = _place(error) or _no_place(what)
            self._stop(f"{message}{where}{_hint(error)}{data_hint(error, lacks_data=lacks_data)}")

    def problem(self, text: str) -> None:
        if text not in self.report.problems:
            self.report.problems.append(text)

    def _note(self, text: str) -> None:
        self.report.notes.append(text)

    def _stop(self, text: str) -> NoReturn:
        self.problem(text)
        raise _CheckAbortedError


def _same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def _place(error: BaseException) -> str:
    """File and line of the user's own code in which it was raised, or from which that was called."""
    place = location_of(error)
    return "" if place is None else f" ({Path(place[0]).name}, line {place[1]})"


def _no_place(what: str) -> str:
    """What to look at instead, where the model meets the data."""
    return f"; {LOOK_AT}" if what.startswith(("train()", "evaluate()")) else ""


def _hint(error: BaseException) -> str:
    if isinstance(error, ValueError) and "read-only" in described(error):
        return "; `start` is read-only: work on a copy"
    return ""
