"""A plan is checked where it is written: settings, commands, scenarios, experiments, tasks."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from support.old_formats import copy_of
from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.settings import Settings, dumps, from_table, parse
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.cli import app as aggregator
from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_metadata
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.task_plan import TaskPlan
from ternbus.edge.shell.cli import app as edge
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.cli import app as lab
from ternbus.lab.experiment import experiment, session
from ternbus.lab.experiment.session import Choices
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import plan_check, scenario
from ternbus.lab.scenario.scenario import End, Scenario
from ternbus.lab.virtual.simulate import Simulation

BASE: dict[str, Any] = {"federation": "lab", "broker": "mqtt://127.0.0.1:1883"}
ENDLESS = {"schedule": "cosine"}
FAULTS: list[tuple[Mapping[str, object], str]] = [
    (ENDLESS, "plan.schedule_versions is 0: cosine must end after the warm-up; set schedule_versions"),
    ({"schedule": "linear", "schedule_versions": 3, "warmup_versions": 3}, "plan.schedule_versions is 3: linear"),
    ({"dp": "device", "dp_clip": 1.0}, "plan.dp is 'device': dp_clip, dp_noise and dp_epsilon must be above 0; set"),
    ({"learning_rat": 0.5}, "plan.learning_rat is an unknown key: do you mean learning_rate? A task names"),
    ({"zzz": 1}, "plan.zzz is an unknown key. A task names its own keys in plan_keys. Other keys are allowed by"),
]  # fmt: skip
OWN_TASK = """
from dataclasses import dataclass
from ternbus.edge.tasks.digits_numpy import DigitsNumpy

@dataclass(frozen=True)
class Own(DigitsNumpy):
    plan_keys = ["flavour"]

TASK = Own(default_plan={DEFAULT})
"""


def table(plan: Mapping[str, object], **check: object) -> dict[str, Any]:
    return {**BASE, "plan": dict(plan), "plan_check": check}


# --- aggregator.toml


@pytest.mark.parametrize(("plan", "says"), FAULTS)
def test_a_plan_with_a_fault_is_refused_and_in_a_file_of_before_named(plan: Mapping[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_table(table(plan))
    assert f"aggregator.toml: {says}" in str(caught.value)
    (warning,) = from_table({**BASE, "plan": plan}).warnings
    assert says in warning


def test_a_value_that_every_device_refuses_is_refused_in_any_file() -> None:
    for made in (BASE | {"plan": {"optimizer": "lion"}}, table({"optimizer": "lion"})):
        with pytest.raises(ConfigError, match=r"plan\.optimizer is 'lion', not one of sgd, adam, adamw, rmsprop"):
            from_table(made)


def test_a_good_plan_has_no_warning() -> None:
    assert from_table({**BASE, "plan": {"optimizer": "adam"}}).warnings == []
    assert from_table(table({"optimizer": "adam"})).warnings == []


def test_the_task_s_default_plan_completes_the_plan_as_on_devices() -> None:
    assert from_table(table(ENDLESS, default_plan={"schedule_versions": 40})).plan == ENDLESS
    with pytest.raises(ConfigError, match="schedule_versions is 40"):
        from_table(table({**ENDLESS, "warmup_versions": 50}, default_plan={"schedule_versions": 40}))


def test_keys_of_the_task_and_keys_allowed_are_accepted_and_written_back() -> None:
    made = from_table(table({"flavour": "sweet", "mood": 1}, task_keys=["flavour"], allowed_keys=["mood"]))
    assert made.plan == {"flavour": "sweet", "mood": 1}
    assert parse(dumps(made)) == made
    with pytest.raises(ConfigError, match=r"plan\.flavor is .*: do you mean flavour\?"):
        from_table(table({"flavor": "sweet"}, task_keys=["flavour"]))


def test_a_file_without_the_table_stays_without_it() -> None:
    made = from_table({**BASE, "plan": {"mood": 1}})
    assert made.plan_check is None
    assert "plan_check" not in toml.loads(dumps(made), "the file")
    assert parse(dumps(made)) == made


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (3, "plan_check must be a table"),
        ({"keys": []}, "plan_check.keys is unknown; known are task_keys, allowed_keys, default_plan"),
        ({"task_keys": "flavour"}, "plan_check.task_keys = 'flavour' must be a list of strings"),
        ({"allowed_keys": [1]}, "plan_check.allowed_keys = [1] must be a list of strings"),
        ({"task_keys": [""]}, "plan_check.plan_keys has '', which is no name of a plan key"),
        ({"default_plan": 1}, "plan_check.default_plan must be a table"),
        ({"default_plan": {"mood": 1}}, "plan_check.default_plan: 'mood' is not a documented key of a plan"),
        ({"default_plan": ENDLESS}, "plan_check.default_plan: schedule_versions is 0"),
    ],
)
def test_a_wrong_table_is_refused_by_name(check: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_table({**BASE, "plan_check": check})
    assert says in str(caught.value)


def test_where_no_update_may_be_stale_all_of_the_statistics_are_sent_unless_somebody_says_otherwise() -> None:
    def published(staleness: int, plan: Mapping[str, object], **check: object) -> Mapping[str, object]:
        return from_table({**table(plan, **check), "staleness": {"max": staleness}}).published_plan

    assert published(0, {"momentum": 0.5}) == {"momentum": 0.5, "statistics_rate": 1}
    assert published(1, {"momentum": 0.5}) == {"momentum": 0.5}
    assert published(0, {"statistics_rate": 0.5}) == {"statistics_rate": 0.5}
    assert published(0, {}, default_plan={"statistics_rate": 0.5}) == {}
    assert Settings(**BASE).published_plan == {}
    barrier = from_table({**BASE, "staleness": {"max": 0}})
    assert barrier.published_plan == {"statistics_rate": 1}
    assert "statistics_rate" not in dumps(barrier)  # or it would stay when the bound is raised


def test_every_key_is_documented() -> None:
    docs = Path(__file__).parents[1] / "docs"
    protocol = (docs / "protocol.md").read_text().partition("### 11.1")[2].partition("### 11.2")[0]
    rows = [line.split("|")[1] for line in (docs / "tasks.md").read_text().splitlines() if line.startswith("|")]
    assert [name for name in plan_keys.KEYS if f"`{name}`" not in protocol] == []
    own = set(plan_keys.OWN) - {"schedule_versions", "final_rate"}  # in the row of `schedule`
    assert [name for name in own if not any(f"`{name}`" in row for row in rows)] == []


# --- the model's file


def test_what_a_task_brings_goes_through_the_metadata() -> None:
    task = TaskPlan.of(["flavour"], {"flavour": {"any": "thing"}, "momentum": 0.5, "local_steps": None, "seal": True})
    assert task.default == {"momentum": 0.5, "local_steps": None, "seal": True}
    back = TaskPlan.from_metadata(task.metadata(), "m")
    assert back == TaskPlan(keys=("flavour",), default={"momentum": 0.5, "seal": True})
    assert TaskPlan.from_metadata({"ternbus": "x"}, "m") == TaskPlan()


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"plan_keys": "["}, "is not JSON"),
        ({"plan_keys": "[" * 100_000}, "is not JSON"),
        ({"plan_keys": "{}"}, "has no list plan_keys"),
        ({"plan_keys": '"ab"'}, "has no list plan_keys"),
        ({"default_plan": "[]"}, "and object default_plan"),
        ({"plan_keys": "[1]"}, "plan_keys has 1, which is no name of a plan key"),
        ({"plan_keys": json.dumps([f"k{number}" for number in range(1001)])}, "it may have at most 1000"),
        ({"plan_keys": json.dumps(["k" * 101])}, "a printable text of at most 100 characters"),
        ({"plan_keys": json.dumps(["\x1b[2J"])}, r"plan_keys has '\x1b[2J', which is no name"),
        ({"default_plan": '{"mood": 1}'}, "'mood' is not a documented key"),
        ({"default_plan": '{"momentum": NaN}'}, "momentum is nan"),
    ],
)
def test_metadata_of_another_kind_are_refused(about: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TaskPlan.from_metadata(about, "m.safetensors")
    assert says in str(caught.value)
    assert str(caught.value).startswith("the metadata of m.safetensors")
    assert str(caught.value).endswith("make the file again with `ternbus edge init-model`")


def test_a_default_that_toml_cannot_hold_is_left_out_of_the_settings() -> None:
    task = TaskPlan(default={"seed": 2**63, "local_steps": None, "momentum": 0.5, "codec": "float32"})
    assert PlanCheck.settings(task)["plan_check.default_plan"] == {"momentum": 0.5, "codec": "float32"}


def own_task(folder: Path, default: Mapping[str, object]) -> str:
    file = folder / f"own_{uuid4().hex}.py"  # a process imports a name once
    file.write_text(OWN_TASK.replace("{DEFAULT}", repr(dict(default))))
    return str(file)


def init(folder: Path, model: Path, *more: str) -> Any:
    where = ["init", str(folder), "--federation", "lab", "--broker", BASE["broker"], "--model", str(model)]
    return CliRunner().invoke(aggregator, [*where, *more])


def test_a_new_federation_knows_its_task_s_keys_and_what_was_allowed(tmp_path: Path) -> None:
    task, model = own_task(tmp_path, {"flavour": "sweet", "schedule_versions": 9}), tmp_path / "m.safetensors"
    assert CliRunner().invoke(edge, ["init-model", task, str(model)]).exit_code == 0
    assert json.loads(load_metadata(model)["plan_keys"]) == ["flavour"]
    before = model.read_bytes()
    again = ["init-model", task, str(model)]
    refused = CliRunner().invoke(edge, [*again, "--seed", "1"])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception) == f"{model} exists already: give another name, or add --force to replace it"
    assert CliRunner().invoke(edge, [*again, "--force"]).exit_code == 0
    assert model.read_bytes() == before

    refused = init(tmp_path / "home", model, "--set", "plan.flavor=1")
    assert isinstance(refused.exception, ConfigError)
    assert "--set: plan.flavor is an unknown key: do you mean flavour?" in str(refused.exception)
    assert not (tmp_path / "home").exists()
    more = ["--set", "plan.flavour=sour", "--set", "plan.schedule=cosine", "--set", "plan.mood=1"]
    assert init(tmp_path / "home", model, *more, "--allow-plan-key", "mood").exit_code == 0

    settings = administration.load_settings(tmp_path / "home")
    assert settings.plan == {"flavour": "sour", "schedule": "cosine", "mood": 1}
    assert settings.plan_check == PlanCheck(
        task_keys=("flavour",), allowed_keys=("mood",), default_plan={"schedule_versions": 9}
    )
    file = tmp_path / "home" / administration.TOML
    file.write_text(file.read_text().replace("mood = 1", "moood = 1"))
    with pytest.raises(ConfigError, match=r"aggregator.toml: plan.moood is .*: do you mean mood\?"):
        administration.load_settings(tmp_path / "home")


def test_a_model_from_elsewhere_makes_a_federation_that_knows_the_documented_keys(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415 - as another program writes it

    save_file(digits_numpy.TASK.initial(0), tmp_path / "m.safetensors")
    assert isinstance(init(tmp_path / "home", tmp_path / "m.safetensors", "--set", "plan.x=1").exception, ConfigError)
    assert init(tmp_path / "home", tmp_path / "m.safetensors", "--set", "plan.grad_clip=1").exit_code == 0
    assert administration.load_settings(tmp_path / "home").plan_check == PlanCheck()


@pytest.mark.parametrize(("default", "says"), [(ENDLESS, "schedule_versions is 0"), ({"gradclip": 1}, "grad_clip?")])
def test_no_model_is_made_of_a_task_with_a_plan_that_nobody_follows(
    tmp_path: Path, default: Mapping[str, object], says: str
) -> None:
    done = CliRunner().invoke(edge, ["init-model", own_task(tmp_path, default), str(tmp_path / "m")])
    assert isinstance(done.exception, ConfigError)
    assert says in str(done.exception)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_an_aggregator_of_before_runs_and_warns_of_keys_that_nobody_knows(tmp_path: Path) -> None:
    home = copy_of("aggregator-6", tmp_path) / "home"
    file = home / administration.TOML
    file.write_text(file.read_text().replace('"local_steps" = 5', '"local_step" = 5'))
    command = [sys.executable, "-m", "ternbus", "aggregator", "run", str(home)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        kill = threading.Timer(60, process.kill)
        kill.start()
        warned = next((line for line in process.stderr if "local_step is an unknown" in line), "")
        ran = process.poll() is None
        kill.cancel()
        process.terminate()
    assert f"{file}: plan.local_step is an unknown key: do you mean local_steps?" in warned
    assert ran


# --- the lab


@pytest.mark.parametrize(("plan", "says"), FAULTS)
def test_no_simulation_begins_with_a_plan_that_nobody_follows(plan: Mapping[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Simulation(Scenario(plan=plan), digits_numpy.TASK, Lines(sys.stderr))
    assert f"the scenario and its task: {says}" in str(caught.value)


def written(folder: Path, text: str) -> str:
    (folder / "s.toml").write_text(f'task = "digits-numpy"\n{text}')
    return str(folder / "s.toml")


@pytest.mark.parametrize("command", ["simulate", pytest.param("run", marks=pytest.mark.slow)])
def test_both_commands_refuse_a_schedule_without_an_end_and_start_nothing(tmp_path: Path, command: str) -> None:
    file = written(tmp_path, '[plan]\nschedule = "cosine"\n')
    done = subprocess.run(
        [sys.executable, "-m", "ternbus", "lab", command, file, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "plan.schedule_versions is 0: cosine must end after the warm-up; set schedule_versions" in done.stderr
    assert not [path.name for path in (tmp_path / "out").rglob("*.log") if path.stem != "prepare"]


def test_a_scenario_takes_keys_of_its_task_and_keys_that_it_allows(tmp_path: Path) -> None:
    text = 'allow_plan_keys = ["mood"]\n[plan]\nmood = 1\nflavour = 2\n'
    wanted = scenario.load(Path(written(tmp_path, text)))
    assert wanted.allow_plan_keys == ("mood",)
    settings = plan_check.settings_of(wanted, {"momentum": 0.5}, ["flavour"])
    assert {name: settings[name] for name in ("plan.mood", "plan.flavour", "plan.momentum")} == {
        "plan.mood": 1,
        "plan.flavour": 2,
        "plan.momentum": 0.5,
    }
    for keys, allowed in (([], ("mood",)), (["flavour"], ())):
        with pytest.raises(ConfigError, match="is an unknown key"):
            plan_check.settings_of(replace(wanted, allow_plan_keys=allowed), {}, keys)


def test_a_scenario_completes_the_task_s_plan() -> None:
    wanted = Scenario(plan=ENDLESS)
    assert plan_check.settings_of(wanted, {"schedule_versions": 5}, [])["plan.schedule"] == "cosine"


def test_an_experiment_is_checked_whole_before_its_first_run(tmp_path: Path) -> None:
    made = experiment.parse(
        "own",
        {
            "scenario": {"task": "digits-numpy", "end": {"versions": 1}},
            "axes": {"rate": {"constant": {}, "falling": {"plan": ENDLESS}}},
        },
        tmp_path,
    )
    choices = Choices(data=None, seeds=1, jobs=1, out=tmp_path / "out", keep=None)
    with pytest.raises(ConfigError, match=r"^falling: .*schedule_versions is 0: cosine must end"):
        session.run(made, choices, lambda: None, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_the_command_for_experiments_exits_with_the_same_error(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[scenario]\ntask = "digits-numpy"\nend = { versions = 1 }\n[axes.rate]\nwrong = { plan = { batchsize = 1 } }\n'
    )
    done = CliRunner().invoke(lab, ["experiment", str(file), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigError)
    says = "wrong: the scenario and its task: plan.batchsize is an unknown key: do you mean batch_size?"
    assert says in str(done.exception)


def test_a_look_at_the_partition_checks_the_plan_too(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('task = "digits-numpy"\n[plan]\nbatchsize = 1\n')
    done = CliRunner().invoke(lab, ["partition", str(file)])
    assert isinstance(done.exception, ConfigError)
    assert f"{file} and its task: plan.batchsize is an unknown key: do you mean batch_size?" in str(done.exception)
    file.write_text(file.read_text().replace("batchsize", "batch_size"))
    assert CliRunner().invoke(lab, ["partition", str(file)]).exit_code == 0


def test_a_barrier_sends_all_of_batch_norm_s_statistics_and_tests_better(tmp_path: Path) -> None:
    from torch import nn  # noqa: PLC0415 - for this test alone

    from ternbus.edge import TorchTask  # noqa: PLC0415 - likewise
    from ternbus.edge.tasks import digits  # noqa: PLC0415 - likewise

    def model() -> nn.Module:
        layers = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))

    task = TorchTask(name="bn", model=model, data=digits.data, default_plan={"batch_size": 16, "learning_rate": 0.05})

    def accuracy(**plan: object) -> float:
        wanted = Scenario(devices=4, sync=True, partition="iid", plan=plan, end=End(versions=3))
        simulation = Simulation(wanted, task, Lines(sys.stderr))
        simulation.run()
        found: float = simulation.report(0.0)["accuracy"]
        return found

    assert accuracy() == accuracy(statistics_rate=1) > accuracy(statistics_rate=0.25) + 0.01
