"""Statistics of a notebook's federation: those of the data in one place, without collecting them."""

from collections.abc import Callable

import numpy as np
import pytest

from ternbus.broker.errors import ConfigError
from ternbus.lab import Federation

torch = pytest.importorskip("torch")
ROWS = (30, 50, 20)


def clients() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = {}
    for number, rows in enumerate(ROWS):
        inputs = rng.normal(number, 1.0 + number, (rows, 2)).astype(np.float32)
        made[f"c{number}"] = (inputs, rng.integers(0, 3, rows))
    return made


def federation() -> Federation:
    return Federation(lambda: torch.nn.Linear(2, 3), clients=clients(), test=0.2)


def test_moments_and_labels_are_those_of_all_training_data_together() -> None:
    fed = federation()
    table = fed.statistics().set_index("name")
    facts = fed.statistics().attrs["facts"]
    assert facts["refused"] == {}
    features, labels = table[table["kind"] == "feature"], table[table["kind"] == "label"]
    assert list(features["devices"]) == [3, 3]
    # a fifth of each client's rows is test data: means lie within what its choice can move them
    together = np.concatenate([inputs for inputs, _ in clients().values()])
    assert features["count"].tolist() == [labels["count"].sum()] * 2 == [80.0, 80.0]
    assert np.allclose(features["mean"], together.mean(0), atol=0.4)
    assert np.allclose(features["std"], together.std(0), rtol=0.2)


def test_a_histogram_has_its_bounds_and_quantiles() -> None:
    table = federation().statistics("histogram", features=["1"], bounds=(-10.0, 10.0), bins=40)
    (row,) = table.to_dict("records")
    assert (row["name"], row["kind"], row["below"] + row["above"]) == ("1", "feature", 0)
    (histogram,) = (each["bins"] for each in table.attrs["facts"]["features"])
    assert (len(histogram), sum(histogram)) == (40, 80)
    assert row["q_error"] == 0.5
    assert row["q0.25"] < row["q0.5"] < row["q0.75"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda fed: fed.statistics("modes"), "no kind 'modes': choose some of moments, histogram, labels"),
        (lambda fed: fed.statistics("histogram"), "bounds|low"),
        (lambda fed: fed.statistics(features=["absent"]), "absent"),
        (lambda fed: fed.statistics(features="01"), r"features is one text: give a list of them, as \['01'\]"),
        (lambda fed: fed.statistics("histogram", bounds=3), r"bounds is 3, but must be two numbers, as \(0, 1\)"),
    ],
)
def test_what_no_device_can_answer_is_refused_in_words(asked: Callable[[Federation], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(federation())


def test_features_may_be_named_by_their_numbers() -> None:
    assert federation().statistics("moments", features=[1])["name"].tolist() == ["1"]
