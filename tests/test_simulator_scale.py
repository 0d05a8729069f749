"""What a simulation of many devices does once, and keeps once, however many there are."""

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType

import pytest

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.partition import Rows
from ternbus.edge.tasks import digits_data, digits_numpy
from ternbus.lab.processes import fleet
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Narrow, Scenario
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.training import pairs

MANY = Scenario(task="digits-numpy", devices=300, partition="dirichlet:0.5", end=End(versions=2))


@contextmanager
def calls(*functions: Callable[..., object]) -> Iterator[Counter[CodeType]]:
    """Counts the calls of these functions in the block."""
    counted, wanted = Counter[CodeType](), {function.__code__ for function in functions}

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in wanted:
            counted[frame.f_code] += 1

    sys.setprofile(look)
    try:
        yield counted
    finally:
        sys.setprofile(None)


def test_the_data_are_divided_once_for_all_devices() -> None:
    task, divided = digits_numpy.TASK, Rows._divided
    with calls(divided) as counted:
        assert len(pairs(MANY, task, task.initial(0))) == 300
    assert counted == {divided.__code__: 1}


def test_the_data_are_read_once_for_all_devices() -> None:
    task, parsed = digits_numpy.TASK, digits_data._is_test
    digits_data._read.cache_clear()
    with calls(parsed) as counted:
        pairs(MANY, task, task.initial(0))
    assert counted == {parsed.__code__: 1}


def test_who_is_narrow_or_hostile_is_drawn_once_for_all_devices() -> None:
    wanted = replace(MANY, narrow=Narrow(share=0.5))
    widths, behaviours = Scenario.widths.func, Scenario.behaviours.func  # type: ignore[attr-defined]  # cached
    with calls(widths, behaviours) as counted:
        Simulation(wanted, digits_numpy.TASK, Lines(io.StringIO()))
    assert counted == {widths.__code__: 1, behaviours.__code__: 1}


def test_devices_on_a_version_share_its_vector() -> None:
    simulation = Simulation(MANY, digits_numpy.TASK, Lines(io.StringIO()))
    simulation.run()
    followers = [device.core.follower for device in simulation.devices]
    versions = {follower.version for follower in followers}
    assert len({id(follower.vector) for follower in followers}) == len(versions) < 4


def test_samples_of_many_devices_are_told_while_it_starts() -> None:
    said = io.StringIO()
    Simulation(replace(MANY, devices=1500), digits_numpy.TASK, Lines(said))
    assert "1438 samples are too few for 1500 devices: each draws about 9 by the seed" in said.getvalue()


def test_ten_thousand_devices_are_simulated_but_no_such_number_of_processes_is_started() -> None:
    most = replace(MANY, devices=10_000)
    with pytest.raises(ConfigError, match="must be from 1 to 10000"):
        replace(MANY, devices=10_001)
    with pytest.raises(ConfigError, match="`lab run` starts a process for each, at most 1000"):
        fleet.check(most)
    fleet.check(replace(MANY, devices=1000))
