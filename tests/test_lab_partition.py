"""The lab divides the data of any task: defaults that work and say so, its own words, and who has what."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.partition_spec import Partition
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.tasks import digits_data
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer
from ternbus.edge.torch.trainer import TorchTask
from ternbus.lab import cli
from ternbus.lab.report.partition_table import describe
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import partitions, scenario
from ternbus.lab.scenario.resolve import Resolved, resolved, settled
from ternbus.lab.scenario.scenario import DEVICES_MAX, End, Fault, Scenario
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.workers import Workers

ROWS = 60
OWN = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from ternbus.edge import TorchTask

generator = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=generator)
SITES = np.array(["Graz", "Lyon", "Oslo"])[np.arange(60) % 3]


def data(folder, split):
    return X, TARGETS


def owners(folder):
    return OWNERS


TASK = TorchTask(
    name="own", model=lambda: nn.Linear(4, WIDTH), data=data, owners=owners, loss=functional.mse_loss,
    metric=lambda outputs, targets: -(outputs - targets).abs().mean(),
)
"""
NUMBER = "TARGETS, WIDTH = X[:, :1] * 2, 1\n"
SEVERAL = "TARGETS, WIDTH = X[:, :2] * 2, 2\n"
NO_CLASSES = 'partition = "iid": the data have no classes, so samples are divided at random'
RUN = CliRunner()


def own(folder: Path, targets: str, owners: str = "None") -> str:
    return written(folder, f"{OWN}\n{targets}\nOWNERS = {owners}\n")


def written(folder: Path, text: str) -> str:
    """The file of a task; all modules of a process have names of their own."""
    path = folder / f"task_of_{folder.name.replace('-', '_')}.py"
    path.write_text(text)
    return str(path)


def task_of(targets: Tensor, owners: object = None) -> TorchTask:
    def data(_: Path | None, __: str) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(targets), 2), targets

    return TorchTask(name="own", model=lambda: nn.Linear(2, 1), data=data, owners=lambda _: owners)


CLASSES = task_of(torch.arange(ROWS) % 4, np.array(["a", "b", "c"])[np.arange(ROWS) % 3])
NUMBERS = task_of(torch.linspace(0, 1, ROWS))
MULTI_LABEL = task_of(torch.zeros(ROWS, 5))


def refusal(wanted: Scenario, task: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(wanted, task)
    return str(caught.value)


@pytest.mark.parametrize(
    ("partition", "part"),
    [
        ("auto", "dirichlet:0.5:2/5:9"),
        ("iid", "iid:2/5"),
        ("dirichlet:3", "dirichlet:3:2/5:9"),
        ("quantity:0.5", "quantity:0.5:2/5:9"),
        ("shards:2", "shards:2:2/5:9"),
        ("natural", "natural:2"),
        ("by:a site: north", "by:a site: north:2"),
        ("all", "all"),
    ],
)
def test_each_kind_is_a_kind_of_a_device(partition: str, part: str) -> None:
    assert Scenario(devices=5, seed=9, partition=partition).partition_of(2) == part
    assert Partition.parse(part).spec == part


@pytest.mark.parametrize(
    ("partition", "problem"),
    [
        ("some", 'there is no such partition: write partition = "all", "iid", "dirichlet:ALPHA"'),
        ("iid:0/8", "there is no such partition"),
        ("natural:1", "there is no such partition"),
        ("dirichlet:0.5:0/3:1", "there is no such partition"),
        ("all;test:0.1", "there is no such partition"),
        ("by:", "there is no such partition"),
        ("dirichlet:-1", "alpha is -1: it must be above 0"),
        ("shards:0", "the number of shards of a device is 0"),
    ],
)
def test_a_partition_that_is_none_is_refused_by_the_name_of_the_key(partition: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scenario(partition=partition)
    assert str(caught.value).startswith(f'partition = "{partition}": {problem}')


@pytest.mark.parametrize(
    ("task", "partition", "line"),
    [
        (CLASSES, "dirichlet:0.5", None),
        (NUMBERS, "iid", f'{NO_CLASSES}; "dirichlet:0.5" divides them by quantiles of the target'),
        (MULTI_LABEL, "iid", NO_CLASSES),
    ],
    ids=["classes", "numbers", "several labels"],
)
def test_the_default_falls_back_to_what_works_and_says_so(task: TorchTask, partition: str, line: str | None) -> None:
    found = settled(Scenario(devices=3), task)
    assert found.scenario.partition == partition
    assert [*found.lines] == ([] if line is None else [line])
    for index in range(3):
        assert task.trainer(data=None, partition=found.scenario.partition_of(index)).samples


def test_a_partition_that_is_written_is_kept_or_refused_with_others_that_work() -> None:
    assert settled(Scenario(partition="dirichlet:0.5"), NUMBERS) == Resolved(
        scenario=Scenario(partition="dirichlet:0.5")
    )
    for task in (NUMBERS, MULTI_LABEL):
        for partition in ("natural", "by:site", "dirichlet:0.5", "shards:2"):
            wanted = Scenario(devices=3, partition=partition)
            try:
                resolved(wanted, task)
            except ConfigError as error:
                text = str(error)
                assert text.startswith(f'partition = "{partition}": ')
                assert "--partition" not in text
                for other in re.findall(r'"([^"]+)"', text.partition(": write partition = ")[2]):
                    resolved(Scenario(devices=3, partition=other.replace("ALPHA", "0.5").replace("K", "2")), task)
            else:
                assert (task, partition[:4]) in ((NUMBERS, "diri"), (NUMBERS, "shar"))


def test_there_are_as_many_devices_as_owners_unless_devices_are_written() -> None:
    found = settled(Scenario(partition="natural"), CLASSES)
    assert (found.scenario.devices, [*found.lines]) == (3, ["devices = 3: as many as the data have owners"])
    found = settled(Scenario(partition="natural", devices=1), CLASSES)
    assert (found.scenario.devices, [*found.lines]) == (
        1,
        ['partition = "natural": 2 of 3 owners are beyond 1 device (b, c): nobody trains on their 40 of 60 samples'],
    )
    assert refusal(Scenario(partition="natural", devices=4), CLASSES) == (
        'devices = 4, but partition = "natural" has 3 owners: use devices = 3 or fewer, or leave it out'
    )
    table = task_of(torch.arange(ROWS) % 4, {"site": np.arange(ROWS) % 5, "kind": np.arange(ROWS) % 2})
    assert settled(Scenario(partition="by:site"), table).scenario.devices == 5
    assert "there is no column 'city': the columns are site, kind" in refusal(Scenario(partition="by:city"), table)
    owners = DEVICES_MAX + 500
    many = settled(Scenario(partition="natural"), task_of(torch.zeros(owners), np.arange(owners)))
    assert many.scenario.devices == DEVICES_MAX == 10_000
    assert "500 of 10500 owners are beyond 10000 devices (10000, 10001, 10002, 10003, 10004, …)" in many.lines[1]
    gaps = task_of(torch.zeros(4), np.array([0, 1, 3, 3]))
    assert "owner 2 has no samples: number the owners 0 to 2 without gaps" in refusal(
        Scenario(partition="natural"), gaps
    )


def test_a_scenario_whose_devices_the_data_decide_is_checked_before_and_after() -> None:
    assert Scenario().devices == partitions.DEVICES
    Scenario(partition="natural", sync=True, faults=(Fault(kill="device:7", after_version=1),))
    with pytest.raises(ConfigError, match="unknown"):
        Scenario(partition="natural", aggregator={"merge.bufer": 3})
    wanted = Scenario(partition="natural", faults=(Fault(kill="device:7", after_version=1),))
    assert "use a device from 0 to 2" in refusal(wanted, CLASSES)


class Opaque(DigitsNumpy):
    """A task that divides its data in its own way."""

    def trainer(self, *, data: Path | None, partition: str) -> NumpyTrainer:
        size = 20 if partition == "all" else 5 + Partition.parse(partition).index
        images, labels = digits_data.load("train")
        return NumpyTrainer(images[:size], labels[:size])


def test_a_task_that_does_not_say_what_it_divides_has_the_default_of_classes() -> None:
    found = resolved(Scenario(devices=3), Opaque())
    assert (found.scenario.partition, found.rows, [*found.lines]) == ("dirichlet:0.5", None, [])
    assert "does not say who owns which sample: set devices" in refusal(Scenario(partition="natural"), Opaque())


def test_devices_that_drew_too_little_are_counted() -> None:
    (line,) = resolved(Scenario(devices=6, partition="quantity:0.01"), NUMBERS).lines
    assert re.fullmatch(
        r'partition = "quantity:0.01": \d of 6 devices drew too few samples, and got some of the largest part: up to 8',
        line,
    )


def test_more_devices_than_samples_draw_a_few_each_and_a_line_says_so() -> None:
    found = resolved(Scenario(devices=61, partition="iid"), NUMBERS)
    (line,) = found.lines
    assert line.startswith('partition = "iid": 60 samples are too few for 61 devices: each draws about 9 by the seed')
    assert line.endswith("and a sample is at about 9 devices")
    facts = describe(found, NUMBERS)
    assert facts["left_over"] == 0
    assert 6 <= facts["samples"]["min"] <= facts["samples"]["max"] <= 9
    assert not resolved(Scenario(devices=60, partition="iid"), NUMBERS).lines


def test_a_simulation_by_owners_has_a_device_for_each(tmp_path: Path) -> None:
    task = own(tmp_path, NUMBER, "SITES")
    command = ["simulate", "--task", task, "--partition", "natural", "--versions", "2", "--out", str(tmp_path / "out")]
    ran = RUN.invoke(cli.app, command)
    assert ran.exit_code == 0, ran.output
    assert "in virtual time, with as many devices as the data have owners" in ran.output
    assert "devices = 3: as many as the data have owners" in ran.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["scenario"]["devices"], report["scenario"]["partition"]) == (3, "natural")
    assert [*report["devices"]] == ["device-0", "device-1", "device-2"]


def test_a_scenario_without_devices_and_the_option_partition_have_a_device_for_each_owner(tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text('task = "digits"\n[end]\nversions = 2\n')
    assert scenario.load(tmp_path / "scenario.toml").devices == 8
    task = own(tmp_path, SEVERAL, '{"site": SITES, "half": np.arange(60) % 2}')
    command = [str(tmp_path / "scenario.toml"), "--task", task, "--partition", "by:half"]
    ran = RUN.invoke(cli.app, ["partition", *command, "--json"])
    assert [part["owner"] for part in json.loads(ran.stdout)["parts"]] == ["0", "1"]


@pytest.mark.parametrize("targets", [NUMBER, SEVERAL], ids=["number", "several"])
def test_a_simulation_without_classes_runs_by_default(tmp_path: Path, targets: str) -> None:
    task = own(tmp_path, targets)
    command = ["simulate", "--task", task, "--devices", "3", "--versions", "2", "--out", str(tmp_path / "out")]
    ran = RUN.invoke(cli.app, command)
    assert ran.exit_code == 0, ran.output
    assert NO_CLASSES in ran.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scenario"]["partition"] == "iid"


def test_a_simulation_names_the_scenarios_key(tmp_path: Path) -> None:
    task = own(tmp_path, SEVERAL)
    (tmp_path / "scenario.toml").write_text(f'task = "{task}"\ndevices = 3\npartition = "dirichlet:0.5"\n')
    with pytest.raises(ConfigError) as caught:
        Simulation(wanted := scenario.load(tmp_path / "scenario.toml"), load_task(wanted.task), Lines(io.StringIO()))
    assert str(caught.value) == (
        'partition = "dirichlet:0.5": the data have no classes to split by, nor one number for each sample: '
        'write partition = "all", "iid" or "quantity:ALPHA"'
    )


@pytest.mark.slow
def test_workers_train_the_parts_that_the_data_decide(tmp_path: Path) -> None:
    task = own(tmp_path, NUMBER, "SITES")
    wanted = Scenario(task=task, partition="natural", end=End(versions=2), simulate=Simulated(jitter=0.3))
    models = []
    for jobs in (0, 2):
        with Workers(wanted, jobs) if jobs else io.StringIO() as place:
            simulation = Simulation(
                wanted, load_task(task), Lines(io.StringIO()), place=place if isinstance(place, Workers) else None
            )
            simulation.run()
            models.append(simulation.aggregator.core.model.digest)
    assert models[0] == models[1]


@pytest.mark.slow
def test_a_run_of_processes_has_what_the_data_decide(tmp_path: Path) -> None:
    task = own(tmp_path, SEVERAL, "SITES")
    command = [sys.executable, "-m", "ternbus", "lab", "run", "--task", task, "--versions", "1"]
    for more, line, code in (
        (["--partition", "natural"], "devices = 3: as many as the data have owners", 0),
        (["--partition", "shards:2"], 'partition = "shards:2": the data have no classes to split by', 2),
    ):
        ran = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert ran.returncode == code, ran.stdout + ran.stderr
        assert line in (ran.stderr if code else ran.stdout)
        if not code:
            report = json.loads((tmp_path / "ternbus-lab" / "report.json").read_text())
            assert report["scenario"]["devices"] == len([*(tmp_path / "ternbus-lab" / "devices").iterdir()]) - 1


def test_the_table_shows_who_has_what(tmp_path: Path) -> None:
    shown = RUN.invoke(cli.app, ["partition", "--task", "digits-numpy", "--devices", "3", "--seed", "4"]).stdout
    lines = shown.splitlines()
    assert lines[0].split() == ["device", "samples", *"0123456789"]
    assert [line.split()[0] for line in lines[1:4]] == ["device-0", "device-1", "device-2"]
    rows = [[0 if cell == "." else int(cell) for cell in line.split()[1:]] for line in lines[1:4]]
    assert all(row[0] == sum(row[1:]) for row in rows)
    sizes = sorted(row[0] for row in rows)
    assert lines[5] == f"samples per device: min {sizes[0]}, median {sizes[1]}, max {sizes[2]} of 1438"
    assert len(lines) == 6
    as_json = ["partition", "--task", "digits-numpy", "--devices", "3", "--seed", "4", "--hold-out", "0.2", "--json"]
    facts = json.loads(RUN.invoke(cli.app, as_json).stdout)
    assert (facts["by"], facts["labels"], facts["left_over"]) == ("class", [*"0123456789"], 0)
    assert [[part["samples"], *part["counts"]] for part in facts["parts"]] == rows
    assert all(0 < part["held_out"] < part["train"] == part["samples"] - part["held_out"] for part in facts["parts"])


def test_the_table_of_numbers_counts_quantiles_and_owners_are_named(tmp_path: Path) -> None:
    task = own(tmp_path, NUMBER, "SITES")
    command = ["partition", "--task", task, "--partition", "natural", "--devices", "2", "--hold-out", "0.2"]
    lines = RUN.invoke(cli.app, command).stdout.splitlines()
    assert lines[0].split()[:6] == ["device", "owner", "samples", "train", "held", "out"]
    assert lines[0].split()[6:] == [f"q{number}" for number in range(1, 11)]
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["device-0", "Graz", "20", "16", "4"], ["device-1", "Lyon", "20", "16", "4"],
    ]  # fmt: skip
    assert lines[4:6] == ["samples per device: min 20, median 20, max 20 of 60", "samples that no device has: 20"]
    assert "1 of 3 owners are beyond 2 devices (Oslo)" in lines[6]
    facts = json.loads(RUN.invoke(cli.app, [*command, "--json"]).stdout)
    assert (facts["by"], facts["left_over"], facts["parts"][1]["owner"]) == ("quantile", 20, "Lyon")


def test_many_classes_are_counted_and_a_class_may_be_called_samples(tmp_path: Path) -> None:
    many = own(tmp_path, "TARGETS, WIDTH = torch.arange(60) % 20, 20")
    lines = RUN.invoke(
        cli.app, ["partition", "--task", many, "--partition", "all", "--devices", "2"]
    ).stdout.splitlines()
    assert lines[0].split() == ["device", "samples", "classes", "largest"]
    assert lines[1].split() == ["device-0", "60", "20", "0:", "3"]
    assert not any("no device has" in line for line in lines)
    (tmp_path / "numpy").mkdir()
    texts = written(
        tmp_path / "numpy",
        "import numpy as np\nfrom ternbus.edge import select\nfrom ternbus.edge.tasks.digits_numpy import DigitsNumpy, "
        "NumpyTrainer\nclass Own(DigitsNumpy):\n    def trainer(self, *, data, partition):\n"
        "        rows = select(partition, np.array(['samples', 'train'])[np.arange(40) % 2])\n"
        "        return NumpyTrainer(np.zeros((len(rows), 64), np.float32), rows)\nTASK = Own()\n",
    )
    command = ["partition", "--task", texts, "--partition", "iid", "--devices", "2"]
    assert RUN.invoke(cli.app, command).stdout.split()[:4] == ["device", "samples", "'samples'", "train"]


@pytest.mark.parametrize("share", [[], ["--hold-out", "0.2"]], ids=["whole", "halves"])
def test_a_task_that_divides_in_its_own_way_shows_its_sizes(tmp_path: Path, share: list[str]) -> None:
    task = written(
        tmp_path,
        "from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer\nfrom ternbus.edge.tasks import "
        "digits_data\nclass Own(DigitsNumpy):\n    def trainer(self, *, data, partition):\n"
        "        size = 2 if ';test' in partition else 8\n"
        "        return NumpyTrainer(*(one[:size] for one in digits_data.load('train')))\nTASK = Own()\n",
    )
    command = ["partition", "--task", task, "--devices", "2", *share]
    lines = RUN.invoke(cli.app, command).stdout.splitlines()
    assert lines[1].split() == (["device-0", "10", "8", "2"] if share else ["device-0", "8"])
    assert lines[4].startswith("samples per device: min ")


@pytest.mark.parametrize(
    ("name", "begin"), [("parts.png", b"\x89PNG"), ("parts.svg", b"<?xml"), ("parts.pdf", b"%PDF")]
)
def test_the_picture_is_what_its_name_says(tmp_path: Path, name: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    ran = RUN.invoke(cli.app, ["partition", "--task", "digits-numpy", "--plot", str(tmp_path / name)])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_picture_of_many_devices_and_of_data_without_classes_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    task = own(tmp_path, SEVERAL, "np.arange(60) % 30")
    for number, more in enumerate((["--task", "digits-numpy", "--devices", "120"], ["--task", task])):
        path = tmp_path / f"{number}.png"
        assert RUN.invoke(cli.app, ["partition", *more, "--plot", str(path)]).exit_code == 0
        assert path.stat().st_size > 5000


def test_a_picture_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(name: str) -> str:
        ran = RUN.invoke(cli.app, ["partition", "--task", "no_such_task", "--plot", str(tmp_path / name)])
        assert isinstance(ran.exception, ConfigError)
        return str(ran.exception)

    assert "must end with .png, .svg or .pdf" in fault("parts.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'ternbus[lab]'" in fault("parts.png")
