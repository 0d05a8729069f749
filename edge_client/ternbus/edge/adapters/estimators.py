"""scikit-learn's estimators whose coefficients can be averaged, how each continues from given ones, and why others
cannot.

The mean of two devices' coefficients is a model only if both began at the same ones and took steps from there.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters.foreign import SEEDS
from ternbus.edge.learn.labels import Indices
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors

Estimator = Any
Labels = npt.NDArray[Any]
Matrix = Any  # an array or a CSR matrix of samples, [samples, features]

COEFFICIENTS: Final = ("coef_", "intercept_")
STEPPED: Final = {
    "SGDClassifier": COEFFICIENTS,
    "SGDRegressor": COEFFICIENTS,
    "Perceptron": COEFFICIENTS,
    "PassiveAggressiveClassifier": COEFFICIENTS,
    "PassiveAggressiveRegressor": COEFFICIENTS,
    "MLPClassifier": ("coefs_", "intercepts_"),
    "MLPRegressor": ("coefs_", "intercepts_"),
}
"""They train with `partial_fit`, batch by batch."""
ITERATED: Final = (
    "LogisticRegression", "PoissonRegressor", "GammaRegressor", "TweedieRegressor", "Lasso", "ElasticNet",
)  # fmt: skip
"""They train with `fit`, in iterations over all samples, from where `warm_start` left off."""

LEAST_SQUARES: Final = (
    "it solves its own data at once, from no start, and the mean of solutions is not the solution: use "
    "TweedieRegressor(power=0), the same least squares by iterations, or SGDRegressor"
)
SUPPORT_VECTORS: Final = (
    "its model is made of samples, which must not leave a device: use SGDClassifier (SGDRegressor for numbers), for a "
    "kernel on the features of sklearn.kernel_approximation.RBFSampler(random_state=0) in data()"
)
BY_NAME: Final = {
    "LinearRegression": LEAST_SQUARES,
    "Ridge": LEAST_SQUARES,
    "RidgeClassifier": "it solves its own data at once, from no start: use SGDClassifier(loss='squared_error')",
    "LinearSVC": "it does not start from given coefficients: use SGDClassifier(loss='hinge'), the same model",
    "LinearSVR": "it does not start from given coefficients: use SGDRegressor(loss='epsilon_insensitive')",
}
TREES: Final = (
    "it is made of trees, and the splits of two trees have no mean: use SGDClassifier or MLPClassifier (Regressor for "
    "numbers)"
)
BY_MODULE: Final = {
    "sklearn.tree": TREES,
    "sklearn.ensemble": TREES,
    "xgboost": TREES,
    "lightgbm": TREES,
    "catboost": TREES,
    "sklearn.neighbors": SUPPORT_VECTORS,
    "sklearn.svm": SUPPORT_VECTORS,
    "sklearn.gaussian_process": SUPPORT_VECTORS,
    "sklearn.naive_bayes": "its counts are to be added up and not averaged: use SGDClassifier(loss='log_loss')",
    "sklearn.cluster": "the clusters of two devices have no common order: train a classifier or regressor",
    "sklearn.pipeline": (
        "each device would fit the steps before the last to its own data: do them in data(), with constants that are "
        "the same on every device, and give the last step alone"
    ),
    "sklearn.compose": "each device would fit it to its own data: do its work in data(), with the same constants",
    "sklearn.model_selection": "each device would choose other parameters: give the estimator with parameters",
}
FULL_BATCH: Final = 200  # the batch of scikit-learn's MLP, unless one is given


def refused(estimator: Estimator) -> str:
    """Why an estimator cannot be trained in a federation, and what to use; empty for one that can."""
    names = [kind.__name__ for kind in type(estimator).__mro__ if kind.__module__.startswith("sklearn.")]
    known = next((name for name in names if name in STEPPED or name in ITERATED or name in BY_NAME), "")
    if known in BY_NAME:
        return BY_NAME[known]
    if not known:
        modules = [kind.__module__ for kind in type(estimator).__mro__]
        found = (why for place, why in BY_MODULE.items() for module in modules if f"{module}.".startswith(f"{place}."))
        able = ", ".join([*STEPPED, *ITERATED])
        return next(found, f"it is none whose coefficients Ternbus can set and read: use one of {able}")
    return _refused_parameters(estimator)


def _refused_parameters(estimator: Estimator) -> str:
    parameters: Mapping[str, Any] = estimator.get_params(deep=False)
    if parameters.get("early_stopping"):
        return "early_stopping is for a single fit: leave it out"
    if parameters.get("average"):
        return "average keeps a second model beside the first: leave it out, the merge averages"
    if parameters.get("class_weight") == "balanced":
        return "class_weight='balanced' depends on each device's labels: give a dict with the weight of each class"
    if parameters.get("solver") == "liblinear":
        return "solver='liblinear' does not start from given coefficients: use solver='lbfgs'"
    if parameters.get("solver") == "lbfgs" and "hidden_layer_sizes" in parameters:
        return "solver='lbfgs' has no partial_fit: use solver='adam' or 'sgd'"
    return ""


@dataclass(frozen=True, slots=True)
class Model:
    """An estimator that has its shapes: fitted once, on zeros, with all classes, and never trained."""

    estimator: Estimator
    attributes: Sequence[str]
    stepped: bool

    @classmethod
    def of(cls, estimator: Estimator, features: int, classes: Labels | None, seed: int) -> "Model":
        """Raises `ConfigError` for parameters that scikit-learn refuses."""
        from sklearn.base import clone  # noqa: PLC0415 - scikit-learn is needed for its own estimators only

        stepped = next((STEPPED[kind.__name__] for kind in type(estimator).__mro__ if kind.__name__ in STEPPED), ())
        own = {"random_state": seed % SEEDS, "warm_start": not stepped}
        fresh = _with(clone(estimator), **own)
        zeros = np.zeros((2 if classes is None else len(classes), features))
        targets = np.ones(len(zeros)) if classes is None else classes
        try:
            if stepped:
                # the least step that there is: the random weights of a network must stay as they are drawn
                small = _with(fresh, learning_rate_init=1e-300, batch_size=len(zeros))
                small.partial_fit(zeros, targets, **({} if classes is None else {"classes": classes}))
            else:
                quietly(_with(fresh, max_iter=1).fit, zeros, targets)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(estimator).__name__}: {' '.join(str(error).split())}") from error
        _with(fresh, **(estimator.get_params(deep=False) | own))
        made = cls(fresh, stepped or COEFFICIENTS, bool(stepped))
        if "coefs_" not in stepped:  # linear models begin at zero, as scikit-learn's do
            made.put({name: np.zeros_like(tensor) for name, tensor in made.tensors().items()})
        return made

    def copy(self) -> "Model":
        return Model(copy.deepcopy(self.estimator), self.attributes, self.stepped)

    def tensors(self) -> dict[str, FloatArray]:
        """Copies of the coefficients, by the names of their attributes; those of lists are numbered."""
        found: dict[str, FloatArray] = {}
        for attribute in self.attributes:
            value = getattr(self.estimator, attribute)
            items = {f"{attribute}.{i}": one for i, one in enumerate(value)} if isinstance(value, list) else None
            for name, one in (items or {attribute: value}).items():
                with np.errstate(over="ignore"):  # `Trained` refuses what is not finite
                    found[name] = np.array(one, np.float32)
        return found

    def put(self, tensors: Tensors, dtype: npt.DTypeLike = np.float64) -> None:
        """Set the coefficients to copies of `tensors`, in the dtype of the samples, which scikit-learn asks for."""
        for attribute in self.attributes:
            value = getattr(self.estimator, attribute)
            if isinstance(value, list):
                new: Any = [np.array(tensors[f"{attribute}.{i}"], dtype) for i in range(len(value))]
            else:
                new = np.array(tensors[attribute], dtype)
                new = new if np.ndim(value) else new[()]
            setattr(self.estimator, attribute, new)

    def rate(self) -> float | None:
        """The learning rate that the estimator was made with; None if it has none that a plan could set."""
        parameters = self.estimator.get_params(deep=False)
        name = _rate_name(self.estimator)
        return None if name is None else float(parameters[name])

    def batch(self) -> int | None:
        """The batch size of a network."""
        asked = self.estimator.get_params(deep=False).get("batch_size")
        return FULL_BATCH if asked == "auto" else asked

    def train(
        self, rows: Matrix, targets: Labels, plan: Plan, *, version: int, seed: int, clock: Callable[[], float]
    ) -> int:
        """Train in place from the coefficients that were put. Returns the number of steps or iterations."""
        _with(self.estimator, random_state=seed % SEEDS)
        if name := _rate_name(self.estimator):
            _with(self.estimator, **{name: plan.rate(version)})
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # `Trained` refuses what diverges
                if self.stepped:
                    batches = plan.batches(rows.shape[0], np.random.default_rng(seed), clock)
                    return self._step(rows, targets, plan, version, batches)
                return self._iterate(rows, targets, plan)
        except ValueError as error:
            if "overflow" not in str(error) and "non-finite" not in str(error):
                raise
            raise TrainingError(
                "training diverged: lower the plan's learning_rate, or scale the inputs to about 1"
            ) from error

    def _step(self, rows: Matrix, targets: Labels, plan: Plan, version: int, batches: Iterable[Indices]) -> int:
        samples = rows.shape[0]
        size = min(plan.batch_size, samples)
        _with(self.estimator, batch_size=size)
        if hasattr(self.estimator, "_optimizer"):
            del self.estimator._optimizer  # noqa: SLF001 - of a network: its state lasts for one training
        elif hasattr(self.estimator, "t_"):
            # The samples that one machine would have seen by now: SGD's schedules count them.
            self.estimator.t_ = 1.0 + version * plan.steps(samples) * size
        steps = 0
        for chosen in batches:
            self.estimator.partial_fit(rows[chosen], targets[chosen])
            steps += 1
        return steps

    def _iterate(self, rows: Matrix, targets: Labels, plan: Plan) -> int:
        steps = plan.local_steps or max(1, round(plan.local_epochs))
        steps = steps if plan.steps_max is None else min(steps, plan.steps_max)
        _with(self.estimator, max_iter=steps)
        weights: dict[str, Any] = {}
        missing = np.setdiff1d(getattr(self.estimator, "classes_", []), targets)
        if len(
            missing
        ):  # the estimator takes its classes from the labels: a row that weighs nothing for each other one
            rows, targets, weight = _with_rows(rows, targets, missing)
            weights = {"sample_weight": weight}
        quietly(self.estimator.fit, rows, targets, **weights)
        return int(np.max(self.estimator.n_iter_))


def quietly(fit: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Fit without the warning that it has not converged: a few iterations are what the plan asks for."""
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - as above

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit(*args, **kwargs)


def _with_rows(rows: Matrix, targets: Labels, missing: Labels) -> tuple[Matrix, Labels, FloatArray]:
    zeros = np.zeros((len(missing), rows.shape[1]), rows.dtype)
    if isinstance(rows, np.ndarray):
        more: Matrix = np.concatenate([rows, zeros])
    else:
        from scipy import sparse  # noqa: PLC0415 - only with sparse data

        more = sparse.vstack([rows, sparse.csr_matrix(zeros)], format="csr")
    weight = np.ones(more.shape[0], rows.dtype)
    weight[rows.shape[0] :] = 0
    return more, np.concatenate([targets, missing.astype(targets.dtype)]), weight


def _rate_name(estimator: Estimator) -> str | None:
    """The parameter that the plan's learning rate sets. SGD's schedule "optimal" has none; "pa1" has another."""
    parameters = estimator.get_params(deep=False)
    if "learning_rate_init" in parameters:
        return "learning_rate_init"
    fixed = parameters.get("learning_rate", "constant") in ("constant", "invscaling", "adaptive")
    return "eta0" if "eta0" in parameters and fixed else None


def _with(estimator: Estimator, **parameters: Any) -> Estimator:
    """The estimator, with those of the parameters that it knows."""
    known = estimator.get_params(deep=False)
    return estimator.set_params(**{name: value for name, value in parameters.items() if name in known})
