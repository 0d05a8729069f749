"""A command that keeps a folder may be killed at any moment: nothing is lost, and it is run again."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.small_world import Bench, Device, make_directory, ternary_block
from ternbus.aggregator.shell import administration, log
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.store import merge_log
from ternbus.aggregator.store import status as statuses
from ternbus.broker.crash_points import VARIABLE

VERSIONS, KEPT = 12, 10
PRUNING = ("archive-written", "rows-removed")
POINTS = {*PRUNING}  # that are killed at here


def killed(point: str, *words: object) -> None:
    """Run a command that is killed at a point."""
    command = [sys.executable, "-m", "ternbus", *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, VARIABLE: point}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr.endswith(f"killed at the crash point {point.partition(':')[0]}\n")


def merge(bench: Bench, devices: list[Device], times: int) -> None:
    for number in range(times):
        for device in devices:
            bench.send(device, ternary_block(bench.schema, number), bench.version)


class World:
    """A stopped federation of two devices, with several versions."""

    def __init__(self, home: Path) -> None:
        bench = Bench(make_directory(home, merge__buffer_size=2, staleness__max=2, downlink__slots=2))
        self.devices = [bench.join(name) for name in ("pi", "other")]
        merge(bench, self.devices, VERSIONS)
        bench.close()
        self.home = home

    def check_that_it_goes_on(self, home: Path) -> None:
        """It is sound, and so is the next version."""
        assert check(home).faults == ()
        bench = Bench(home)
        bench.start()
        bench.tick(seconds=10.0)
        version = bench.version
        merge(bench, self.devices, 1)
        bench.close()
        assert (bench.version, check(home).faults) == (version + 1, ())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole") / "agg")


@pytest.fixture
def home(whole: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.home, tmp_path / "agg"))


@pytest.mark.slow
@pytest.mark.parametrize("point", PRUNING)
def test_a_prune_goes_on_when_it_is_run_again(whole: World, home: Path, point: str) -> None:
    before = statuses.read(home)["counts"]
    killed(point, "aggregator", "prune", home, "--keep-versions", KEPT)
    assert (check(home).faults, statuses.read(home)["counts"]) == ((), before)
    administration.prune(home, KEPT)
    assert (len(statuses.read(home)["versions"]), log.verify(home, None, None).faults) == (KEPT, [])
    assert [path.name for path in (home / merge_log.FOLDER).iterdir()] == ["1.sqlite"]
    assert statuses.read(home)["counts"] == before
    whole.check_that_it_goes_on(home)
