"""scikit-learn's estimators as tasks: they train as scikit-learn does, and what cannot be averaged is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn import ensemble, linear_model, naive_bayes, neighbors, neural_network, pipeline, preprocessing, svm, tree
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression, Perceptron, PoissonRegressor, SGDClassifier, SGDRegressor
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor

from support.simulated import simulated
from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters import SklearnTask
from ternbus.edge.learn.metric import higher
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError, halves_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.preflight import Conditions, check
from ternbus.edge.tasks.digits_data import CLASSES, PIXELS, load

CLASSIFIERS = [  # with what the plan changes, and how far below central training the federation may stay
    (SGDClassifier(), {"batch_size": 100}, 0.06),
    (SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05), {"batch_size": 100}, 0.05),
    (SGDClassifier(penalty=None, learning_rate="pa1", eta0=1.0), {"batch_size": 100}, 0.06),  # passive-aggressive
    (Perceptron(), {"batch_size": 100}, 0.06),
    (LogisticRegression(), {"local_steps": 5}, 0.1),
    (MLPClassifier(hidden_layer_sizes=(32,), batch_size=32, learning_rate_init=0.005), {"local_epochs": 3}, 0.1),
    (MLPClassifier(hidden_layer_sizes=(32,), solver="sgd", batch_size=32, learning_rate_init=0.1), {}, 0.08),
]
REGRESSORS = [
    (SGDRegressor(), 0.1),
    (PoissonRegressor(alpha=1e-3, max_iter=1000), 0.2),
    (linear_model.TweedieRegressor(power=0, alpha=1e-3, max_iter=1000), 0.1),
    (linear_model.Lasso(alpha=1e-3), 0.1),
    (linear_model.ElasticNet(alpha=1e-3), 0.1),
]


def digits(folder: Path | None, split: str) -> tuple[Any, Any]:
    return load("test" if split == "test" else "train")


def numbers(folder: Path | None, split: str) -> tuple[Any, Any]:
    images, labels = digits(folder, split)
    return images, labels + 1.0


def task_of(estimator: Any, data: Any = digits, classes: Any = range(CLASSES), **fields: Any) -> SklearnTask:
    return SklearnTask(name="mine", estimator=estimator, data=data, features=PIXELS, classes=classes, **fields)


def plan_of(task: SklearnTask, **keys: object) -> Plan:
    return Plan.from_meta({**task.default_plan, **keys})


def centrally(estimator: Any, data: Any) -> float:
    """The score of the same estimator, fitted by scikit-learn to all training data."""
    return float(clone(estimator).fit(*data(None, "train")).score(*data(None, "test")))


@pytest.mark.parametrize("estimator", [*(each[0] for each in CLASSIFIERS), MLPClassifier()], ids=str)
def test_a_classifier_trains_on_a_device_that_lacks_classes_and_the_same_seed_gives_the_same(estimator: Any) -> None:
    report = check(task_of(estimator), Conditions(partition="dirichlet:0.1:0/4:0"))
    assert not report.problems
    assert not [note for note in report.notes if "another result" in note or "another model" in note]


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "plan", "gap"), CLASSIFIERS, ids=str)
def test_a_federation_classifies_about_as_well_as_central_training(
    estimator: Any, plan: dict[str, Any], gap: float
) -> None:
    task = task_of(estimator)
    found = simulated(task, devices=4, versions=12, partition="dirichlet:1", **plan)
    assert found.evaluation.values["accuracy"] > centrally(estimator, digits) - gap
    assert task.fitted(found.tensors).score(*digits(None, "test")) == found.evaluation.values["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "gap"), REGRESSORS, ids=str)
def test_a_federation_estimates_about_as_well_as_central_training(estimator: Any, gap: float) -> None:
    found = simulated(task_of(estimator, numbers, None), devices=4, versions=12, local_epochs=3)
    assert found.evaluation.values["r2"] > centrally(estimator, numbers) - gap
    assert found.evaluation.values.keys() == {"r2", "loss"}


def test_a_network_estimates_numbers() -> None:
    task = task_of(MLPRegressor(hidden_layer_sizes=(16,), batch_size=32, learning_rate_init=0.01), numbers, None)
    trainer, plan = task.trainer(data=None, partition="all"), plan_of(task, local_epochs=5)
    model = trainer.train(task.initial(0), plan, version=0, seed=0).tensors
    assert task.evaluator(data=None).evaluate(model).values["r2"] > 0.5


class Recorded:
    """The task, and the seeds and plans that its only device was told."""

    def __init__(self, task: SklearnTask) -> None:
        self.name, self.default_plan, self.initial, self.evaluator = (
            "mine",
            task.default_plan,
            task.initial,
            task.evaluator,
        )
        self._task = task
        self.trainings: list[tuple[Plan, int, int]] = []

    def trainer(self, *, data: Path | None, partition: str) -> "Recorded":
        self._trainer = self._task.trainer(data=data, partition=partition)
        self.samples = self._trainer.samples
        return self

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        self.trainings.append((plan, version, seed))
        return self._trainer.train(start, plan, version=version, seed=seed)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self._trainer.evaluate(tensors)


@pytest.mark.parametrize("schedule", ["optimal", "constant", "invscaling"])
def test_one_device_alone_learns_what_partial_fit_learns_without_a_federation(schedule: str) -> None:
    estimator = SGDClassifier(loss="log_loss", learning_rate=schedule, eta0=0.02, alpha=1e-3)
    recorded = Recorded(task_of(estimator))
    found = simulated(recorded, devices=1, versions=4, partition="all", exact=True)
    images, labels = digits(None, "train")
    alone = SGDClassifier(**estimator.get_params())
    assert [version for _, version, _ in recorded.trainings[:4]] == [0, 1, 2, 3]
    for plan, _, seed in recorded.trainings[:4]:
        alone.set_params(random_state=seed % 2**32)
        for rows in plan.batches(len(labels), np.random.default_rng(seed)):
            alone.partial_fit(images[rows], labels[rows], classes=range(CLASSES))
    np.testing.assert_allclose(found.tensors["coef_"], alone.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.tensors["intercept_"], alone.intercept_, rtol=1e-4, atol=1e-5)
    assert np.abs(alone.coef_).max() > 0.05


def test_a_linear_model_continues_where_the_version_is() -> None:
    task = task_of(LogisticRegression())
    trainer = task.trainer(data=None, partition="all")
    plan = plan_of(task, local_steps=5)
    once = trainer.train(task.initial(0), plan, version=0, seed=0)
    twice = trainer.train(once.tensors, plan, version=1, seed=1)
    assert once.metrics["steps"] == twice.metrics["steps"] == 5
    assert twice.metrics["loss"] < 0.8 * once.metrics["loss"]
    limited = trainer.train(task.initial(0), replace(plan, steps_max=2), version=0, seed=0)
    assert limited.metrics["steps"] == 2


def test_the_rows_that_fill_missing_classes_up_weigh_nothing() -> None:
    images, labels = digits(None, "train")
    few = labels < 3

    def data(folder: Path | None, split: str) -> Any:
        return images[few], labels[few]

    plan = Plan.from_meta({"local_steps": 200})
    whole = task_of(LogisticRegression(tol=1e-8), data, range(4)).trainer(data=None, partition="all")
    start = {"coef_": np.zeros((4, PIXELS), np.float32), "intercept_": np.zeros(4, np.float32)}
    trained = whole.train(start, plan, version=0, seed=0)
    exact = LogisticRegression(tol=1e-8, max_iter=200).fit(images[few], labels[few])
    shares = task_of(LogisticRegression(), data, range(4)).fitted(trained.tensors).predict_proba(images[few])
    np.testing.assert_allclose(shares[:, :3], exact.predict_proba(images[few]), atol=0.02)
    sparse_rows = task_of(
        LogisticRegression(tol=1e-8), lambda f, s: (sparse.csr_matrix(images[few]), labels[few]), range(4)
    )
    again = sparse_rows.trainer(data=None, partition="all").train(start, plan, version=0, seed=0)
    np.testing.assert_allclose(again.tensors["coef_"], trained.tensors["coef_"], atol=0.02)


def test_the_plan_s_rate_and_batches_are_obeyed_and_default_to_the_estimator_s() -> None:
    assert task_of(SGDClassifier(learning_rate="constant", eta0=0.03)).default_plan == {"learning_rate": 0.03}
    assert task_of(SGDClassifier()).default_plan == {}
    network = task_of(MLPClassifier(batch_size=20), default_plan={"learning_rate": 0.5})
    assert network.default_plan == {"learning_rate": 0.5, "batch_size": 20}
    task = task_of(SGDClassifier(learning_rate="constant", eta0=0.03))
    trainer = task.trainer(data=None, partition="iid:0/10")
    slow, fast = (
        trainer.train(task.initial(0), plan_of(task, learning_rate=rate, local_steps=7), version=0, seed=0)
        for rate in (0.001, 0.1)
    )
    assert slow.metrics["steps"] == 7
    assert np.abs(fast.tensors["coef_"]).max() > 5 * np.abs(slow.tensors["coef_"]).max()


def test_sparse_inputs_and_text_labels_are_taken() -> None:
    images, labels = digits(None, "train")
    names = np.array([f"digit {label}" for label in labels])

    def data(folder: Path | None, split: str) -> tuple[Any, Any]:
        return sparse.coo_matrix(images), names

    task = task_of(SGDClassifier(loss="log_loss"), data, sorted(set(names)))
    trainer = task.trainer(data=None, partition="iid:1/3")
    assert trainer.samples == len(labels) // 3 + (len(labels) % 3 > 1)
    trained = trainer.train(task.initial(0), plan_of(task, local_epochs=5), version=0, seed=0)
    assert task.evaluator(data=None).evaluate(trained.tensors).values["accuracy"] > 0.8
    assert task.fitted(trained.tensors).predict(images[:1])[0].startswith("digit ")


def test_metrics_of_one_s_own_see_the_whole_split_and_state_their_direction() -> None:
    def macro(predicted: Any, targets: Any) -> float:
        assert len(targets) == len(digits(None, "test")[1])
        return float(f1_score(targets, predicted, average="macro"))

    task = task_of(SGDClassifier(), metrics={"f1": higher(macro)})
    found = task.evaluator(data=None).evaluate(task.initial(0))
    assert found.values.keys() == {"accuracy", "loss", "f1"}
    assert found.better == {"f1": "higher"}


def test_data_have_owners_and_a_device_holds_some_out() -> None:
    owners = np.arange(len(digits(None, "train")[1])) % 3
    task = task_of(SGDClassifier(), owners=lambda folder: owners)
    ((trainer, held),) = halves_of(task, None, ["natural:1"], 0.2)
    assert trainer.samples + held.samples == (owners == 1).sum()
    assert 0 < held.samples < trainer.samples
    with pytest.raises(ConfigError, match="owners"):
        task_of(SGDClassifier(), owners=lambda folder: [0, 1]).trainer(data=None, partition="natural:0")


def test_regression_data_are_split_by_quantiles() -> None:
    task = task_of(SGDRegressor(), numbers, None)
    assert task.trainer(data=None, partition="iid:0/4").samples == len(digits(None, "train")[1]) // 4 + 1
    assert 0 < task.trainer(data=None, partition="dirichlet:0.5:0/4:0").samples < len(digits(None, "train")[1])


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (tree.DecisionTreeClassifier(), "the splits of two trees have no mean: use SGDClassifier or MLPClassifier"),
        (ensemble.RandomForestClassifier(), "the splits of two trees have no mean"),
        (ensemble.HistGradientBoostingRegressor(), "the splits of two trees have no mean"),
        (neighbors.KNeighborsClassifier(), "its model is made of samples, which must not leave a device"),
        (svm.SVC(), "its model is made of samples.*RBFSampler"),
        (svm.LinearSVC(), r"use SGDClassifier\(loss='hinge'\)"),
        (naive_bayes.GaussianNB(), "its counts are to be added up"),
        (linear_model.LinearRegression(), r"use TweedieRegressor\(power=0\)"),
        (linear_model.Ridge(), r"use TweedieRegressor\(power=0\)"),
        (linear_model.RidgeClassifier(), "use SGDClassifier"),
        (pipeline.make_pipeline(preprocessing.StandardScaler(), SGDClassifier()), r"do them in data\(\)"),
        (GridSearchCV(SGDClassifier(), {}), "each device would choose other parameters"),
        (preprocessing.StandardScaler(), "use one of SGDClassifier, SGDRegressor"),
        (SGDClassifier(average=True), "average keeps a second model"),
        (SGDClassifier(early_stopping=True), "early_stopping is for a single fit"),
        (SGDClassifier(class_weight="balanced"), "give a dict with the weight of each class"),
        (LogisticRegression(solver="liblinear"), "use solver='lbfgs'"),
        (neural_network.MLPClassifier(solver="lbfgs"), "use solver='adam' or 'sgd'"),
        (SGDClassifier, r"estimator is no estimator: write SGDClassifier\(\)"),
        (SGDClassifier(alpha=-1.0), "The 'alpha' parameter of SGDClassifier must be"),
    ],
    ids=str,
)
def test_what_cannot_be_averaged_is_refused_with_what_to_use(estimator: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^(the task mine|SGDClassifier).*{words}"):
        task_of(estimator)


def test_a_model_of_another_library_is_refused() -> None:
    class Booster(BaseEstimator):  # type: ignore[misc]  # its library has no annotations
        __module__ = "xgboost.sklearn"

    with pytest.raises(ConfigError, match="cannot train a Booster in a federation: it is made of trees"):
        task_of(Booster())


def test_a_subclass_of_an_estimator_is_that_estimator() -> None:
    class Mine(SGDClassifier):  # type: ignore[misc]  # likewise
        pass

    assert task_of(Mine()).initial(0)["coef_"].shape == (CLASSES, PIXELS)


@pytest.mark.parametrize(
    ("estimator", "classes", "words"),
    [
        (SGDClassifier(), None, "a SGDClassifier needs classes"),
        (SGDRegressor(), range(3), "a SGDRegressor takes no classes"),
        (SGDClassifier(), [1, 1], "classes has 1 labels"),
        (SGDClassifier(), 10, r"classes is 10: give all labels, as range\(10\)"),
    ],
)
def test_the_classes_are_known_from_the_start(estimator: Any, classes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_of(estimator, classes=classes)


ROWS, LABELS = np.zeros((6, PIXELS)), np.arange(6)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ROWS, "returned ndarray: return a tuple of X, y"),
        ((ROWS[:, :3], LABELS), r"X of shape \(6, 3\): it must be \[samples, 64\]"),
        ((ROWS, LABELS[:5]), r"y of shape \(5,\) for 6 rows"),
        ((ROWS[:0], LABELS[:0]), r"y of shape \(0,\) for 0 rows"),
        ((np.full_like(ROWS, np.nan), LABELS), "X with a NaN or an infinity"),
        ((np.full((6, PIXELS), "red"), LABELS), "X that is not numeric"),
        ((ROWS, LABELS + 5), "the label 10, which is none of the task's classes"),
    ],
)
def test_data_that_do_not_fit_are_told_in_words_with_file_and_line(found: Any, words: str) -> None:
    def data(folder: Path | None, split: str) -> Any:
        return found

    with pytest.raises(ConfigError, match=rf"^test_sklearn_adapter.py, line \d+: data\(folder, 'train'\).*{words}"):
        task_of(SGDClassifier(), data).trainer(data=None, partition="all")


@pytest.mark.parametrize("targets", [np.full(6, np.inf), np.full(6, "red")])
def test_targets_of_a_regression_are_finite_numbers(targets: Any) -> None:
    with pytest.raises(ConfigError, match="it must have finite numbers"):
        task_of(SGDRegressor(), lambda folder, split: (ROWS, targets), None).trainer(data=None, partition="all")


@pytest.mark.parametrize("scale", [1e100, 1e300])
def test_a_diverged_training_says_so(scale: float) -> None:
    huge = task_of(SGDRegressor(), lambda folder, split: (np.full((6, PIXELS), scale), np.ones(6)), None)
    plan = plan_of(huge, local_epochs=5)
    with pytest.raises(TrainingError, match=r"training diverged.*: lower the plan's learning_rate"):
        huge.trainer(data=None, partition="all").train(huge.initial(0), plan, version=0, seed=0)


def test_an_exception_of_data_names_its_own_line() -> None:
    def data(folder: Path | None, split: str) -> Any:
        raise KeyError("column")

    problems = check(task_of(SGDClassifier(), data)).problems
    assert re.search(r"KeyError: 'column' \(test_sklearn_adapter.py, line \d+\)", problems[0])


def test_what_is_no_function_is_refused_and_a_plain_function_is_a_metric() -> None:
    rows: Any = np.ones((4, 2)), np.ones(4)
    bad: Any = {"f1": 3}
    mine = dict[str, Any](name="mine", estimator=SGDRegressor(), features=2)
    with pytest.raises(ConfigError, match="the task mine: data is tuple, but must be a function"):
        SklearnTask(**mine, data=rows)
    with pytest.raises(ConfigError, match="the metric 'f1' is int, but must be a function"):
        SklearnTask(**mine, data=lambda *_: rows, metrics=bad)
    for name in ("default_plan", "metrics"):
        with pytest.raises(ConfigError, match=f"the task mine: {name} is 'x', but must be a dict"):
            SklearnTask(**mine, data=lambda *_: rows, **dict[str, Any]({name: "x"}))
    plain = {"worst": lambda predicted, targets: np.abs(predicted - targets).max()}
    task = SklearnTask(**mine, data=lambda *_: rows, metrics=plain)
    assert task.evaluator(data=None).evaluate(task.initial(0)).values["worst"] == 1
