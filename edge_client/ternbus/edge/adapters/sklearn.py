"""scikit-learn's estimators as tasks: those with `partial_fit`, and linear models that start from coefficients.

`estimators.py` lists them, and says why others are refused.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters.estimators import Estimator, Labels, Matrix, Model, refused
from ternbus.edge.adapters.foreign import check_functions, check_tables
from ternbus.edge.learn.calls import called, place_of
from ternbus.edge.learn.class_counts import counted
from ternbus.edge.learn.metric import Metric
from ternbus.edge.learn.partition import Rows
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SklearnTask:
    """A task of a scikit-learn estimator.

    `estimator` has its parameters and need not be fitted. `data(folder, split)` returns (X, y): arrays, DataFrames, or
    for X a sparse matrix; `features` is the number of X's columns. A classifier has `classes`, all labels that any
    device may have, since a device may lack some. `metrics` are computed from predictions and y, over the whole split,
    beside `accuracy` (`r2` for numbers) and `loss`. `owners(folder)` returns the label of each training row's owner.

    The plan's learning rate sets `eta0` or `learning_rate_init`; its default is the estimator's own. `partial_fit` gets
    the plan's batches. A linear model without `partial_fit` trains `local_steps` iterations, or `local_epochs`.

    Raises `ConfigError` for an estimator whose models cannot be averaged, with what to use.
    """

    name: str
    estimator: Estimator
    data: Callable[[Path | None, Split], tuple[Any, Any]]
    features: int
    classes: Sequence[Any] | None = None
    default_plan: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, Metric | Callable[[Any, Any], Any]] = field(default_factory=dict)
    owners: Callable[[Path | None], Any] | None = None

    def __post_init__(self) -> None:
        kind = type(self.estimator).__name__
        check_tables(self.name, default_plan=self.default_plan, metrics=self.metrics)
        measures = {f"the metric {name!r}": each.compute for name, each in self.measures.items()}
        check_functions(self.name, data=self.data, owners=self.owners, **measures)
        if isinstance(self.estimator, type) or not hasattr(self.estimator, "get_params"):
            raise ConfigError(f"the task {self.name}: estimator is no estimator: write {_called(self.estimator)}()")
        if why := refused(self.estimator):
            raise ConfigError(f"the task {self.name} cannot train a {kind} in a federation: {why}")
        if self._classifies != (self.classes is not None):
            need = "needs classes, all labels that there are" if self._classifies else "takes no classes"
            raise ConfigError(f"the task {self.name}: a {kind} {need}")
        if type(self.features) is not int or self.features < 1:
            raise ConfigError(f"the task {self.name}: features is {self.features!r}: give the number of columns of X")
        if self.classes is not None and not isinstance(self.classes, Iterable):
            raise ConfigError(f"the task {self.name}: classes is {self.classes!r}: give all labels, as range(10)")
        if self.classes is not None and len(set(self.classes)) < 2:
            raise ConfigError(f"the task {self.name}: classes has {len(set(self.classes))} labels: give at least 2")
        model = self._model(0)
        own = {"learning_rate": model.rate(), "batch_size": model.batch()}
        plan = {key: value for key, value in own.items() if value is not None} | dict(self.default_plan)
        object.__setattr__(self, "default_plan", plan)

    @property
    def _classifies(self) -> bool:
        from sklearn.base import is_classifier  # noqa: PLC0415 - needed with an estimator only

        return bool(is_classifier(self.estimator))

    @property
    def measures(self) -> dict[str, Metric]:
        """The metrics; of one that is a plain function more is better."""
        return {name: each if isinstance(each, Metric) else Metric(each) for name, each in self.metrics.items()}

    @property
    def labels(self) -> Labels | None:
        """The classes in scikit-learn's order."""
        return None if self.classes is None else np.unique(np.asarray(list(self.classes)))

    def _model(self, seed: int) -> Model:
        return Model.of(self.estimator, self.features, self.labels, seed)

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """The coefficients of a new estimator: zeros for a linear model, drawn with the seed for a network."""
        return self._model(seed).tensors()

    def fitted(self, tensors: Tensors) -> Estimator:
        """The estimator with a model's tensors, such as `safetensors.numpy.load_file` reads, ready to predict."""
        model = self._model(0)
        model.put(tensors)
        return model.estimator

    def trainer(self, *, data: Path | None, partition: str) -> "SklearnTrainer":
        return self.trainers(data=data, partitions=[partition])[0]

    def trainers(self, *, data: Path | None, partitions: Sequence[str]) -> list["SklearnTrainer"]:
        """Trainers for many devices in one process, used one at a time: they read the data once."""
        inputs, targets = self._read(data, "train")
        owners = None if self.owners is None else partial(self.owners, data)
        divided = Rows(targets, owners, samples=len(targets))
        model, parts = self._model(0), [divided.of(each) for each in partitions]
        return [SklearnTrainer(self, model, inputs[part], targets[part]) for part in parts]

    def evaluator(self, *, data: Path | None) -> "SklearnTrainer":
        return SklearnTrainer(self, self._model(0), *self._read(data, "test"))

    def _read(self, folder: Path | None, split: Split) -> tuple[Matrix, Labels]:
        """The data of a split, checked. Raises `ConfigError` for data that the estimator cannot take."""
        found: Any = called("data(folder, split)", self.data, folder, split)
        what = f"{place_of(self.data)}data(folder, {split!r})"
        if not isinstance(found, tuple) or len(found) != 2:
            raise ConfigError(f"{what} returned {type(found).__name__}: return a tuple of X, y")
        rows, targets = _matrix(found[0], what), np.asarray(found[1])
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ConfigError(
                f"{what} returned X of shape {rows.shape}: it must be [samples, {self.features}], as the task's "
                "features say"
            )
        if targets.shape != (rows.shape[0],) or not len(targets):
            raise ConfigError(
                f"{what} returned y of shape {targets.shape} for {rows.shape[0]} rows of X: it must have one value for "
                "each, and at least one"
            )
        values = rows if isinstance(rows, np.ndarray) else rows.data
        if not np.isfinite(values).all():
            raise ConfigError(f"{what} returned X with a NaN or an infinity: correct or remove such rows")
        return rows, self._checked(targets, what)

    def _checked(self, targets: Labels, what: str) -> Labels:
        labels = self.labels
        if labels is None:
            if targets.dtype.kind not in "fiub" or not np.isfinite(targets).all():
                raise ConfigError(f"{what} returned y of dtype {targets.dtype}: it must have finite numbers")
            return targets.astype(np.float64)
        if unknown := [label for label in np.unique(targets).tolist() if label not in labels.tolist()]:
            raise ConfigError(f"{what} returned y with the label {unknown[0]!r}, which is none of the task's classes")
        return targets


ROWS: Final = 1000  # that are read together for statistics: a sparse matrix becomes a dense one


class SklearnTrainer:
    """One device's data, and an estimator that has the shapes of the model."""

    def __init__(self, task: SklearnTask, model: Model, rows: Matrix, targets: Labels) -> None:
        self._task = task
        self._model = model
        self._rows = rows
        self._targets = targets

    @property
    def samples(self) -> int:
        return len(self._targets)

    @property
    def class_counts(self) -> dict[str, int]:
        return {} if self._task.classes is None else counted(self._targets)

    def measured_inputs(self) -> Iterator[npt.NDArray[Any]]:
        for first in range(0, self.samples, ROWS):
            rows = self._rows[first : first + ROWS]
            yield rows if isinstance(rows, np.ndarray) else rows.toarray()

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        model = self._model.copy()
        model.put(start, self._rows.dtype)
        steps = model.train(self._rows, self._targets, plan, version=version, seed=seed, clock=time.perf_counter)
        tensors = model.tensors()
        Trained(tensors=tensors, samples=self.samples, metrics={})  # a diverged model predicts nothing
        metrics = {**self._measures(model.estimator), "seconds": time.perf_counter() - began, "steps": float(steps)}
        return Trained(tensors=tensors, samples=self.samples, metrics=metrics)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        model = self._model.copy()
        model.put(tensors, self._rows.dtype)
        values = self._measures(model.estimator)
        predicted = model.estimator.predict(self._rows)
        values |= {
            name: float(metric.compute(predicted, self._targets)) for name, metric in self._task.measures.items()
        }
        better = {name: metric.better for name, metric in self._task.measures.items()}
        return Evaluation(samples=self.samples, values=values, better=better)

    def _measures(self, estimator: Estimator) -> dict[str, float]:
        """Accuracy and log loss (hinge loss without probabilities) of classes; r2 and squared error of numbers."""
        from sklearn import metrics  # noqa: PLC0415 - needed with an estimator only

        predicted, labels = estimator.predict(self._rows), self._task.labels
        if labels is None:
            error = float(metrics.mean_squared_error(self._targets, predicted))
            score = {"r2": float(metrics.r2_score(self._targets, predicted))} if self.samples > 1 else {}
            return {**score, "loss": error}
        if hasattr(estimator, "predict_proba"):
            loss = metrics.log_loss(self._targets, estimator.predict_proba(self._rows), labels=labels)
        else:
            loss = metrics.hinge_loss(self._targets, estimator.decision_function(self._rows), labels=labels)
        return {"accuracy": float((predicted == self._targets).mean()), "loss": float(loss)}


def _matrix(found: Any, what: str) -> Matrix:
    """X as an array, or as a CSR matrix if it is sparse; float64 stays, all else becomes float32."""
    try:
        rows: Matrix = found.tocsr() if hasattr(found, "tocsr") else np.asarray(found)
        return rows.astype(np.float64 if rows.dtype == np.float64 else np.float32, copy=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} returned X that is not numeric ({error}): encode texts and categories") from error


def _called(estimator: Any) -> str:
    return estimator.__name__ if isinstance(estimator, type) else "SGDClassifier"
