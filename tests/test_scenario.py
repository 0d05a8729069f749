"""The scenario file: each key checked, unknown ones refused by name, defaults that run."""

import os
import re
from pathlib import Path

import pytest

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import absolute
from ternbus.lab.cli import EXAMPLE
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import End, Fault, Scenario, Speeds

WHOLE = """
task = "digits-numpy"
devices = 5
seed = 7
data = "somewhere"
partition = "iid"
sync = false

[speeds]
sigma = 1.0
median_s = 0.25

[plan]
local_epochs = 3
flavour = "own"

[broker]
engine = "nats"

[aggregator.merge]
buffer_size = 2
[aggregator.downlink]
codec = "float32"

[end]
versions = 30
seconds = 100
accuracy = 0.95

[[fault]]
kill = "aggregator"
after_version = 5

[[fault]]
kill = "device:4"
after_version = 8
restart_after_s = 0.5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        scenario.load(written(folder, text))
    return str(caught.value)


def test_every_key_is_read(tmp_path: Path) -> None:
    assert scenario.load(written(tmp_path, WHOLE)) == Scenario(
        task="digits-numpy",
        devices=5,
        seed=7,
        data=tmp_path / "somewhere",
        partition="iid",
        speeds=Speeds(sigma=1.0, median_s=0.25),
        plan={"local_epochs": 3, "flavour": "own"},
        engine="nats",
        aggregator={"merge.buffer_size": 2, "downlink.codec": "float32"},
        end=End(versions=30, seconds=100, accuracy=0.95),
        faults=(
            Fault(kill="aggregator", after_version=5),
            Fault(kill="device:4", after_version=8, restart_after_s=0.5),
        ),
    )


@pytest.mark.parametrize("current", [".", "elsewhere"])
def test_relative_paths_count_from_the_folder_of_the_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: str
) -> None:
    own = tmp_path / "own"
    for folder in (own, own / "inner", tmp_path / "elsewhere"):
        folder.mkdir()
    for file in (own / "path_task.py", own / "inner" / "inner_task.py", tmp_path / "elsewhere" / "path_task.py"):
        file.write_text("from ternbus.edge.tasks.digits_numpy import TASK\n")
    monkeypatch.chdir(tmp_path / current)
    file = Path(os.path.relpath(own / "scenario.toml"))
    specs = {
        "path_task:TASK": f"{own}/path_task:TASK",
        "path_task.py": f"{own}/path_task",
        "./inner/inner_task.py:TASK": f"{own}/inner/inner_task:TASK",
        f"{own}/path_task:TASK": f"{own}/path_task:TASK",
        "digits": "digits",
        "ternbus.edge.tasks.digits:TASK": "ternbus.edge.tasks.digits:TASK",
    }
    for spec, wanted in specs.items():
        file.write_text(f'task = "{spec}"\ndata = "kept/data"\n')
        found = scenario.load(file)
        assert absolute(found.task) == wanted
        assert found.data is not None
        assert found.data.resolve() == own / "kept" / "data"
    for data, path in {"/data": Path("/data"), "~/data": Path.home() / "data"}.items():
        file.write_text(f'data = "{data}"\n')
        assert scenario.load(file).data == path


def test_the_example_shows_the_defaults() -> None:
    assert scenario.load(EXAMPLE) == Scenario()


def test_the_example_has_every_key(tmp_path: Path) -> None:
    """What stands in it behind a # and is no sentence is a key, too."""
    text = "\n".join(
        line.removeprefix("# ") if re.match(r"# ([a-z_]+ = |\[)", line) else line
        for line in EXAMPLE.read_text().splitlines()
    )
    example = scenario.load(written(tmp_path, text))
    assert example.data
    assert example.broker_url
    assert example.plan
    assert example.aggregator
    assert example.end.seconds
    assert example.end.accuracy
    assert example.private
    assert [fault.kill for fault in example.faults] == ["aggregator", "device:2"]
    assert [each.kind for each in example.hostile] == ["sign-flip"]


def test_an_empty_file_is_the_run_without_a_file(tmp_path: Path) -> None:
    assert scenario.load(written(tmp_path, "")) == Scenario()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("divices = 3", "unknown key 'divices' (do you mean devices?); known keys: "),
        ("[privat]\nhelpers = 2", "unknown key 'privat' (do you mean private?); known keys: "),
        ("[speeds]\nmean = 1", "unknown key 'speeds.mean'"),
        ("[broker]\nport = 1", "unknown key 'broker.port'"),
        ("[end]\nrounds = 1", "unknown key 'end.rounds'"),
        ('[[fault]]\nkill = "broker"\nafter_version = 1\nwhen = 2', "unknown key 'fault.when'"),
        ("[aggregator.merge]\nbuffer = 1", "merge.buffer is unknown"),
        ("[aggregator.merge]\nbuffer_siz = 1", "merge.buffer_siz is unknown (do you mean buffer_size?); known are "),
        ("[aggregator.plan]\nlocal_epochs = 1", "[plan]"),
        ("[aggregator]\nbuffer_size = 1", "aggregator.buffer_size is not in a section"),
        ("devices = 0", "devices is 0, but must be from 1 to 1000"),
        ("devices = true", "devices is True, but must be a whole number"),
        ('devices = "8"', "devices is '8', but must be a whole number"),
        ("seed = -1", "seed is -1"),
        ("task = 3", "task is 3, but must be a string"),
        ("speeds = 3", "speeds is 3, but must be a table"),
        ("fault = 3", "fault is 3, but must be a list of tables"),
        ("[speeds]\nsigma = nan", "speeds.sigma is nan"),
        ('sync = "yes"', "sync is 'yes', but must be true or false"),
        ('partition = "dirichlet:-1"', "partition"),
        ('partition = "iid:0/8"', "partition"),
        ('[broker]\nengine = "rabbit"', "choose one of auto, mosquitto, nats"),
        ('[broker]\nurl = "http://x"', "mqtt://HOST:PORT"),
        ('[plan]\nlearning_rate = "high"', "scenario.toml: plan.learning_rate is 'high', not a number"),
        ('[[fault]]\nkill = "evaluator"\nafter_version = 1', "device:I"),
        ('[[fault]]\nkill = "device:8"\nafter_version = 1', "use a device from 0 to 7"),
        ('[[fault]]\nkill = "broker"', "needs the keys kill and after_version"),
        ('[end]\nversions = 5\n[[fault]]\nkill = "broker"\nafter_version = 5', "ends at version 5"),
        (
            '[broker]\nurl = "mqtt://x"\n[[fault]]\nkill = "broker"\nafter_version = 1',
            "the lab cannot kill the broker of broker.url",
        ),
        (
            "devices = 1\n[plan]\nseal = true",
            "2 devices (aggregator.merge.min_devices, 2 where plan.seal is true)",
        ),
        ("devices = 2\n[aggregator.merge]\nmin_devices = 3", "(aggregator.merge.min_devices): devices = 2 is too few"),
        ("devices = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(tmp_path, text)
    assert says in message
    assert message.startswith(str(tmp_path / "scenario.toml"))
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.toml"):
        scenario.load(tmp_path / "nowhere.toml")


def test_each_device_has_a_part_of_its_own() -> None:
    assert Scenario(devices=3, seed=9).partition_of(1) == "dirichlet:0.5:1/3:9"
    assert Scenario(devices=3, partition="iid").partition_of(2) == "iid:2/3"
    assert Scenario(devices=3, partition="all").partition_of(2) == "all"


def test_speeds_are_the_seeds_and_unequal() -> None:
    speeds = Speeds(sigma=0.7, median_s=2.0)
    assert speeds.draw(8, 1)[:5] == speeds.draw(5, 1) != speeds.draw(5, 2)
    assert len(set(speeds.draw(8, 1))) == 8
    assert Speeds(sigma=0, median_s=2.0).draw(3, 1) == (2.0, 2.0, 2.0)


def test_the_scenarios_plan_goes_before_the_tasks() -> None:
    settings = Scenario(plan={"learning_rate": 0.5}, aggregator={"merge.buffer_size": 2}).settings(
        {"learning_rate": 0.1, "batch_size": 16}
    )
    assert settings == {"plan.learning_rate": 0.5, "plan.batch_size": 16, "merge.buffer_size": 2}


def test_a_barrier_waits_for_all_devices_and_takes_nothing_stale() -> None:
    settings = Scenario(devices=6, sync=True, aggregator={"merge.buffer_size": 2}).settings({})
    assert (settings["merge.buffer_size"], settings["staleness.max"]) == (6, 0)


@pytest.mark.parametrize(
    ("end", "reached"),
    [
        (End(versions=10), True),
        (End(versions=11), False),
        (End(seconds=5), True),
        (End(seconds=6), False),
        (End(accuracy=0.9), True),
        (End(accuracy=0.91), False),
        (End(versions=11, seconds=6, accuracy=0.9), True),
    ],
)
def test_the_run_ends_at_whichever_comes_first(end: End, reached: bool) -> None:
    assert end.reached(version=10, seconds=5, evaluations=[{"accuracy": 0.8}, {"accuracy": 0.9}]) is reached


def test_an_accuracy_that_nobody_measured_ends_nothing() -> None:
    assert not End(accuracy=0.0).reached(version=1, seconds=1, evaluations=[{"loss": 0.5}])


def test_without_any_end_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no limit: set versions, seconds, accuracy or metric"):
        End()


def test_what_devices_hold_out_is_read_and_what_cannot_be_measured_refused() -> None:
    wanted = scenario.loads("[local]\nhold_out = 0.25\nfine_tune = 2", "x")
    assert (wanted.local.hold_out, wanted.local.fine_tune) == (0.25, 2.0)
    for text, message in (
        ("[local]\nhold_out = 0.5", r"local\.hold_out is 0\.5"),
        ("[local]\nfine_tune = 2", r"set local\.hold_out"),
        ("[local]\nholdout = 0.2", r"local\.holdout"),
    ):
        with pytest.raises(ConfigError, match=message):
            scenario.loads(text, "x")
