"""The check of a task without a federation: it trains one step, encodes and decodes one update, and evaluates."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from ternbus.broker.errors import FederationError
from ternbus.broker.protocol.frame import FRAME_BYTES, PARTS_MAX
from ternbus.broker.protocol.messages import SAMPLES_MAX
from ternbus.broker.protocol.meta_fields import ENTRIES_MAX
from ternbus.broker.protocol.schema import Schema, to_tensors, to_vector
from ternbus.broker.protocol.ternary import CODECS
from ternbus.edge.core.profile import schema_mismatch
from ternbus.edge.core.state import prepare
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.task import Evaluation, PrivateTrainer, Task, Trained, Trainer, task_plan
from ternbus.edge.learn.task_loader import code_errors, described, import_hint, location_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import SAMPLE
from ternbus.edge.plan.tensors import Tensors

LARGE_PARTS = 1000
Result = TypeVar("Result")


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of a check. `facts` has what could be measured; a task with `problems` does not work."""

    task: str
    facts: dict[str, int | float | str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        facts = self.facts
        lines = [f"task       {self.task}"]
        if "parameters" in facts:
            lines.append(f"model      {facts['parameters']:,} parameters in {facts['tensors']} tensors")
        if "training_s" in facts:
            seconds = f"about {facts['training_s']} s"
            lines.append(f"step       {1000 * float(facts['step_s']):,.1f} ms")
            lines.append(f"training   {facts['steps']:,} steps on {facts['samples']:,} samples: {seconds}")
        if "codec" in facts:
            parts = f"in {facts['parts']} part{'s' if facts['parts'] != 1 else ''}"
            lines.append(f"update     {self._size('ternary')}; as float32 {self._size('float32')}")
            lines.append(f"           sent as {facts['codec']} {parts}; encoded and decoded in {facts['codec_s']} s")
        if "test_samples" in facts:
            lines.append(f"evaluation {facts['test_samples']:,} samples: {facts['evaluation_s']} s")
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"problem: {text}" for text in self.problems]
        return [*lines, "not ready: fix the problems above" if self.problems else "ready"]

    def _size(self, codec: str) -> str:
        size = int(self.facts[f"update_{codec}_bytes"])
        return f"{size:,} bytes ({8 * size / int(self.facts['parameters']):.2f} bits a parameter)"


class _CheckAbortedError(Exception):
    """A step failed that the next steps need; the problem is in the report."""


def check(task: Task, *, data: Path | None = None, partition: str = "all") -> Report:
    """Do everything that a device and an evaluator do with a task, except the network."""
    check = _Check(task, Report(task=task.name))
    for examine in (check.device, check.evaluator):
        try:
            examine(data, partition)
        except _CheckAbortedError:
            continue
    return check.report


class _Check:
    def __init__(self, task: Task, report: Report) -> None:
        self.report = report
        self._task = task
        self._start: Tensors | None = None

    def device(self, data: Path | None, partition: str) -> None:
        plan = self._plan()
        start, schema = self._model()
        trainer = self._try("trainer()", lambda: self._task.trainer(data=data, partition=partition))
        trained = self._step(trainer, start, plan)
        if plan.dp == SAMPLE:
            self._step_privately(trainer, start)
        self._compare(start, trained)
        self._update(schema, start, trained, plan)

    def evaluator(self, data: Path | None, _partition: str) -> None:
        evaluator = self._try("evaluator()", lambda: self._task.evaluator(data=data))
        if self._start is None:
            return
        start, began = self._start, time.perf_counter()
        found: Any = self._try("evaluate()", lambda: evaluator.evaluate(start))
        if not isinstance(found, Evaluation):
            self._stop(f"evaluate() returned {type(found).__name__}: it must return an Evaluation")
        if not found.values:
            self._problem("evaluate() returned no metric in its values: return at least a loss")
        for name in [name for name in found.values if name not in found.finite]:
            self._problem(f"evaluate() returned no finite {name!r} in its values")
        if len(found.values) > ENTRIES_MAX:
            self._problem(f"evaluate() returned {len(found.values)} metrics: at most {ENTRIES_MAX} can be sent")
        self.report.facts |= {"test_samples": found.samples, "evaluation_s": round(time.perf_counter() - began, 4)}

    def _plan(self) -> Plan:
        self._try("default_plan", lambda: task_plan(self._task))
        return Plan.from_meta(self._task.default_plan)

    def _model(self) -> tuple[Tensors, Schema]:
        start = self._named_arrays()
        schema = self._try("initial()", lambda: Schema.of({name: tensor.shape for name, tensor in start.items()}))
        again = self._try("initial()", lambda: self._task.initial(0))
        if schema_mismatch(schema, {name: tensor.shape for name, tensor in again.items()}) or not _same(start, again):
            self._note("initial() returned another model for the same seed: experiments cannot be repeated")
        self.report.facts |= {"tensors": len(start), "parameters": schema.elements}
        vector = to_vector(schema, start)
        vector.setflags(write=False)  # as the follower's is
        self._start = to_tensors(schema, vector)
        return self._start, schema

    def _named_arrays(self) -> Tensors:
        """The result of initial(), checked: annotations guarantee nothing."""
        start: Any = self._try("initial()", lambda: self._task.initial(0))
        if not isinstance(start, Mapping) or not start:
            self._stop("initial() returned no tensors: it must return a dict of name to float32 array")
        for name, tensor in start.items():
            if not isinstance(tensor, np.ndarray) or tensor.dtype != np.float32:
                kind = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
                self._stop(f"initial() returned {name!r} as {kind}: it must be a float32 numpy array")
            if not tensor.size:
                self._stop(f"initial() returned {name!r} without elements, of shape {tensor.shape}: leave it out")
            if not np.isfinite(tensor).all():
                self._stop(f"initial() returned {name!r} with a NaN or an infinity: all elements must be finite")
        return start

    def _step(self, trainer: Trainer, start: Tensors, plan: Plan) -> Trained:
        """Train one step twice, and time the second: the first warms up."""
        samples = self._try("trainer.samples", lambda: trainer.samples)
        if not 1 <= samples <= SAMPLES_MAX:
            self._stop(f"the trainer has {samples} samples: it must have 1 to {SAMPLES_MAX}")
        one = Plan.from_meta({**self._task.default_plan, "local_steps": 1})
        first: Any = self._try("train()", lambda: trainer.train(start, one, version=0, seed=0))
        began = time.perf_counter()
        again: Any = self._try("train()", lambda: trainer.train(start, one, version=0, seed=0))
        step_s = time.perf_counter() - began
        if not isinstance(first, Trained) or not isinstance(again, Trained):
            self._stop(f"train() returned {type(first).__name__}: it must return Trained")
        if first.tensors.keys() != again.tensors.keys() or not _same(first.tensors, again.tensors):
            self._note("train() returned another result for the same seed: experiments cannot be repeated bit for bit")
        steps = plan.steps(samples)
        self.report.facts |= {"samples": samples, "step_s": round(step_s, 4), "steps": steps,
                              "training_s": round(step_s * steps, 1)}  # fmt: skip
        return again

    def _step_privately(self, trainer: Trainer, start: Tensors) -> None:
        """Train one step by the plan's differential privacy, for which not every model is suited."""
        one = Plan.from_meta({**self._task.default_plan, "local_steps": 1})
        if not isinstance(trainer, PrivateTrainer):
            self._stop('default_plan has dp = "sample", and the trainer has no train_privately()')
        private = partial(trainer.train_privately, version=0, seed=0, random_source=RandomSource())
        self._try("train_privately()", lambda: private(start, one))

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
            self._problem("one training step changed nothing: is learning_rate 0, or everything frozen or detached?")
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
            asked = Plan.from_meta({**self._task.default_plan, "codec": codec})
            began = time.perf_counter()
            block = self._try("the update", partial(compress, schema, asked, change, None, 0)).block
            update = prepare(block, seq=1, base=0, samples=1, metrics={}, frame_bytes=FRAME_BYTES)
            read = self._try("the update", partial(update.block, schema))
            seconds = time.perf_counter() - began
            parts = -(-len(update.body) // FRAME_BYTES)
            if read.content != block.content:
                self._problem(
                    "the decoded update differs from the encoded one: this is a bug in Ternbus, please report it"
                )
            if not np.isfinite(read.apply(base)).all():
                self._problem("the model is not finite after the update: lower learning_rate in default_plan")
            if codec == plan.codec:
                self._fits(parts)
                self.report.facts |= {"codec": codec, "parts": parts, "codec_s": round(seconds, 4)}
            self.report.facts[f"update_{codec}_bytes"] = len(update.body)

    def _fits(self, parts: int) -> None:
        if parts > PARTS_MAX:
            self._problem(f"an update has {parts} parts, and the protocol allows {PARTS_MAX}: use a smaller model")
        elif parts > LARGE_PARTS:
            self._note(f"an update has {parts} parts: is the codec float32 intended for a model of this size?")

    def _try(self, what: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except FederationError as error:
            self._stop(str(error))
        except code_errors() as error:
            message = import_hint(error) or f"{what} raised {described(error)}"
            self._stop(f"{message}{_place(error)}{_hint(error)}")

    def _problem(self, text: str) -> None:
        if text not in self.report.problems:
            self.report.problems.append(text)

    def _note(self, text: str) -> None:
        self.report.notes.append(text)

    def _stop(self, text: str) -> NoReturn:
        self._problem(text)
        raise _CheckAbortedError


def _same(one: Tensors, other: Tensors) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def _place(error: BaseException) -> str:
    """File and line of the user's own code in which it was raised, or from which that was called."""
    place = location_of(error)
    return "" if place is None else f" ({Path(place[0]).name}, line {place[1]})"


def _hint(error: BaseException) -> str:
    if isinstance(error, ValueError) and "read-only" in described(error):
        return "; `start` is read-only: work on a copy"
    return ""
