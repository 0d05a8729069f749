"""Simulated devices come and go by `[availability]`, through the code of a real session, and by the seed alone."""

import io
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from support.noise_task import Noise, memory
from ternbus.broker.errors import ConfigError
from ternbus.lab.processes import fleet
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.availability import DAY_H, HOUR_S, Availability
from ternbus.lab.scenario.scenario import End, Fault, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

DAY_S = DAY_H * HOUR_S
NIGHTS = Scenario(
    devices=6,
    speeds=Speeds(sigma=0.5, median_s=3600.0),
    aggregator={"merge.buffer_size": 3, "merge.max_wait_s": 7200.0},
    availability=Availability(hours=8.0, zones=4.0, session_min=120.0, pause_min=20.0, drop_out=0.2),
    end=End(seconds=2 * DAY_S),
)


@pytest.fixture(scope="module")
def nights() -> Simulation:
    return simulated(NIGHTS)


def simulated(wanted: Scenario) -> Simulation:
    simulation = Simulation(wanted, Noise(), Lines(io.StringIO()))
    simulation.run()
    return simulation


def report(simulation: Simulation) -> dict[str, Any]:
    found = simulation.report(1.0)
    found.pop("machine")
    return found


def test_a_device_is_online_in_the_hours_of_its_day_only() -> None:
    about = Availability(hours=8.0, zones=24.0, session_min=60.0, pause_min=15.0)
    for name in ("device-0", "device-1", "device-2"):
        found = [*itertools.takewhile(lambda times: times[0] < 30 * DAY_S, about.sessions(3, name))]
        assert all(begin < end for begin, end in found)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
        phase = min(begin % DAY_S for begin, _ in found[-60:])
        hours = [((end - 1 - phase) % DAY_S) / HOUR_S for _, end in found]
        assert max(hours) < 16 + 8  # a window that spans midnight
        online = sum(end - begin for begin, end in found) / 30
        assert 0.6 * 8 * HOUR_S < online < 8 * HOUR_S  # 60 of 75 minutes are 80 %


def test_devices_of_one_time_zone_begin_their_day_together_and_others_do_not() -> None:
    def begins(zones: float) -> list[float]:
        about = Availability(hours=6.0, zones=zones)
        return [[*itertools.islice(about.sessions(0, f"device-{index}"), 2)][1][0] % DAY_S for index in range(40)]

    assert {*begins(0.0)} == {0.0}
    drawn = sorted(begins(24.0))
    assert drawn[0] < 3 * HOUR_S < 21 * HOUR_S < drawn[-1]


def test_nights_are_the_same_for_the_same_seed(nights: Simulation) -> None:
    other = simulated(NIGHTS)
    assert memory(nights).digests == memory(other).digests
    assert report(nights) == report(other)
    assert nights.clock.now > DAY_S
    assert nights.moment().version > 5


def test_a_device_that_goes_offline_is_known_to_be_offline_by_its_last_will(nights: Simulation) -> None:
    """At the end of the second night nobody is online."""
    members = nights.aggregator.core.registry.members
    states = {name: member.status.state for name, member in members.items() if member.status is not None}
    expected = {name for name, attendance in nights._attendances.items() if not attendance.is_online}
    assert expected
    assert {name for name, state in states.items() if state == "offline"} == expected
    online = [row["online_s"] / HOUR_S for row in report(nights)["devices"].values()]
    assert all(2 * 3 < hours < 2 * 8 for hours in online)


def test_a_share_of_the_trainings_is_lost_and_nothing_that_was_accepted_is() -> None:
    always = replace(NIGHTS, availability=Availability(drop_out=0.3, pause_min=5.0), end=End(versions=40))
    simulation = simulated(always)
    found = report(simulation)
    trainings = sum(row["trainings"] for row in found["devices"].values())
    sent = found["updates"] + found["counts"]["stale"]
    assert 0.6 < sent / trainings < 0.8
    merges = Counter((row.device, row.base) for row in memory(simulation).contributions)
    assert max(merges.values()) == 1
    kept = report(simulated(replace(NIGHTS, availability=Availability(), end=End(versions=5))))
    assert sum(row["trainings"] for row in kept["devices"].values()) == kept["updates"] + kept["counts"]["stale"]


def test_without_the_table_every_device_is_online_all_the_time() -> None:
    simulation = simulated(replace(NIGHTS, availability=Availability(), end=End(versions=3)))
    assert {row["online_s"] for row in report(simulation)["devices"].values()} == {round(simulation.clock.now, 3)}


def test_availability_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ConfigError, match="is for `ternbus lab simulate`"):
        fleet.check(NIGHTS)
    with pytest.raises(ConfigError, match=r"\[availability\] says when devices are lost"):
        replace(NIGHTS, faults=(Fault(kill="device:1", after_version=2),))
    with pytest.raises(ConfigError, match="hours is 25"):
        scenario.parse({"availability": {"hours": 25.0}})
    with pytest.raises(ConfigError, match="unknown key"):
        scenario.parse({"availability": {"our": 8.0}})
