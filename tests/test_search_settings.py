"""[search] in aggregator.toml: what it may hold, what it is refused with, and how people are shown what it finds."""

from typing import Any

import pytest

from support.searches import WIDTHS, ranked, settings, state_of, update
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core.search import UPDATES_MIN, Search
from ternbus.aggregator.search_settings import SearchSettings
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import search_text
from ternbus.broker.errors import ConfigError
from ternbus.lab.experiment.measures import FOUND, named
from ternbus.lab.notebook.run import Run
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import Speeds

RATES = [{"learning_rate": 0.1}, {"learning_rate": 1.0, "local_steps": 3}]
BASE = {"federation": "lab", "broker": "mqtt://localhost"}


def read(search: Any, **sections: Any) -> Settings:
    return configuration.from_table({**BASE, **sections, "search": search})


def test_a_search_is_read_and_written_as_it_is() -> None:
    made = read({"arms": RATES, "method": "fedex", "budget": 3, "metric": "loss", "classes": ["pi-"], "latency_s": 2})
    assert made.search == SearchSettings(
        arms=tuple(RATES), method="fedex", budget=3, metric="loss", classes=("pi-",), latency_s=2.0
    )
    assert configuration.parse(configuration.dumps(made)) == made
    assert read({}).search is None
    assert configuration.from_table(BASE).search is None
    assert read({"arms": []}).search is None


@pytest.mark.parametrize(
    ("search", "sections", "words"),
    [
        ("arms", {}, "search must be a table"),
        ({"budget": 3}, {}, "has no arms: add"),
        ({"arms": RATES[:1]}, {}, "has one arm"),
        ({"arms": [*RATES, RATES[0]]}, {}, "is there twice"),
        ({"arms": [*RATES, {}]}, {}, "states nothing"),
        ({"arms": [*RATES, 3]}, {}, "must be a list of tables"),
        ({"arms": [*RATES, {"rate": 1.0}]}, {}, "rate is unknown; known are learning_rate"),
        ({"arms": [*RATES, {"learning_rate": -1.0}]}, {}, r"arms\[2\].learning_rate is -1.0, not within"),
        ({"arms": [{"local_steps": each} for each in range(1, 18)]}, {}, "has 17 maps"),
        ({"arms": RATES, "method": "grid"}, {}, "must be one of successive-halving, fedex"),
        ({"arms": RATES, "classes": ["a", "a"]}, {}, "must be different beginnings"),
        ({"arms": RATES, "classes": [str(each) for each in range(8)]}, {}, "has 8 entries"),
        ({"arms": RATES, "classes": ["x" * 65]}, {}, "a beginning of more than 64 bytes"),
        ({"arms": [{"width": 0.5}, {"learning_rate": 1.0}]}, {}, "states its width and nothing else"),
        ({"arms": [{"width": 0.5}, {"width": 1.0, "local_steps": 3}]}, {}, "states its width and nothing else"),
        ({"arms": [{"width": (each + 1) / 10} for each in range(9)]}, {}, "has 9 widths, of at most 8"),
        ({"arms": RATES}, {"plan": {"seal": True}}, "devices do not say what a training gained"),
        ({"arms": RATES}, {"plan": {"arms": 3}}, "is what a search makes"),
        ({"arms": RATES}, {"plan": {"notes": "x" * 8100}}, "plan and arms take 8[0-9]{3} bytes, at most 8192"),
        (
            {"arms": RATES},
            {"plan": {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 1.0}},
            "by which their epsilon is accounted",
        ),
        (
            {"arms": RATES},
            {"private": {"helpers": {"h-1": "ab" * 32}}, "merge": {"buffer_size": 10}},
            "no update is seen alone",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_words(search: Any, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(search, **sections)


def test_widths_go_with_seal_but_without_a_latency() -> None:
    widths = [{"width": 0.5}, {"width": 1.0}]
    assert read({"arms": widths}, plan={"seal": True}).search is not None
    with pytest.raises(ConfigError, match="nor how long it took"):
        read({"arms": widths, "latency_s": 1.0}, plan={"seal": True})


def test_people_see_each_arm_and_what_to_do() -> None:
    search = Search.of(settings(classes=("pi-",)), 0)
    assert search.state is not None
    first = search_text.lines(search.state.status())
    assert first[0].startswith("search (successive-halving): 0 rungs judged")
    assert [line.split()[0] for line in first[-8:]] == ["pi-…"] * 4 + ["others"] * 4
    search = Search.of(settings(), 0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN)
    ranked(search, (None, 0.1, 0.2, None), UPDATES_MIN, first=UPDATES_MIN + 1)
    assert search.state is not None
    found = search.state.status()
    (row,) = [line for line in search_text.lines(found) if "(best)" in line]
    assert row.split()[:5] == ["all", "learning_rate", "1", "(best)", "100%"]
    assert "write the best arm into [plan]" in search_text.lines(found)[0]
    assert "--hold-out" not in search_text.lines(found)[0]


def test_people_see_that_nobody_judges() -> None:
    hint = "join devices with --hold-out"
    search = Search.of(settings(classes=("pi-",)), 0)
    assert hint not in search_text.lines(state_of(search).status())[0]
    search.made(1, [update("pi-1", 0)])
    assert hint in search_text.lines(state_of(search).status())[0]
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN, first=2, device="pi-1")
    search.made(UPDATES_MIN + 2, [update("other", 0)])
    opening = search_text.lines(state_of(search).status())[0]
    assert "1 rung judged" in opening  # of one class; the other has sent too little
    assert hint not in opening
    widths = Search.of(settings(WIDTHS), 0)
    assert "evaluators judge widths by the primary metric" in search_text.lines(state_of(widths).status())[0]


def test_people_see_by_which_metric_nobody_judges() -> None:
    search = Search.of(settings(metric="acuracy"), 0)
    search.made(1, [update("pi-1", 0)])
    assert "judged a version by acuracy:" in search_text.lines(state_of(search).status())[0]


def test_a_notebook_has_a_row_for_each_step_and_arm() -> None:
    search = Search.of(settings(), 0)
    ranked(search, (0.1, 0.4, 0.3, 0.2), UPDATES_MIN)
    assert search.state is not None
    about: dict[str, Any] = dict.fromkeys(("ended", "metadata", "counted", "module", "best_version"))
    run = Run(
        name="one",
        report={"search": search.state.status()},
        settings={},
        lines=[],
        tensors={},
        best_tensors={},
        **about,
    )
    table = run.search
    assert list(table.columns) == ["version", "judged", "class", "arm", "share", "effect", "learning_rate"]
    assert table["share"].tolist() == [0.25] * 4 + [0.0, 0.5, 0.5, 0.0]
    assert table["version"].tolist() == [0] * 4 + [UPDATES_MIN] * 4
    empty = Run(name="none", report={}, settings={}, lines=[], tensors={}, best_tensors={}, **about)
    assert len(empty.search) == 0


def test_some_devices_are_slower_by_the_beginning_of_their_names() -> None:
    speeds = Speeds(sigma=0.0, median_s=2.0, factors={"device-1": 4.0, "device-11": 2.0})
    drawn = speeds.draw(12, 0)
    assert (drawn[0], drawn[1], drawn[10], drawn[11]) == (2.0, 8.0, 8.0, 16.0)
    assert speeds.draw(3, 0, ["bob", "device-1", "device-0"]) == (2.0, 8.0, 2.0)
    assert scenario.parse({"speeds": {"factors": {"device-1": 4}}}).speeds.factors == {"device-1": 4}
    for wrong in (0, -1.0, True, "4"):
        with pytest.raises(ConfigError, match="factors"):
            scenario.parse({"speeds": {"factors": {"device-1": wrong}}})


def test_an_experiment_can_show_what_was_found() -> None:
    assert named(f"{FOUND}learning_rate").title == "learning_rate found"
