"""What every test may count on, however the suite was started."""

import os
import random
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from support.small_world import Bench, close_ledgers, make_directory, scratch

# A shell starts what runs in the background deaf to Ctrl-C, and nohup deaf to the end of a session; then so would be
# all that tests start in order to interrupt it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)

# No deadlines: a loaded machine is no failure. With CI set, each run draws other inputs (Hypothesis' own profile for CI
# draws the same ones forever), keeps none on disk, and prints what repeats it: the seed, and a blob of each failure.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "developer")


# Files that take longest come first, so that no process is left alone with one of them at the end (see the Makefile).
LONGEST = (
    "test_crash_points.py", "test_lab_run.py", "test_private_kill.py", "test_tls.py", "test_edge_agent.py",
    "test_kill.py", "test_local_state.py", "test_byzantine_proxy.py", "test_aggregator_crash.py",
    "test_byzantine_broker.py", "test_hostile_devices.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed before Hypothesis' plugin reads it."""
    if "CI" in os.environ and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the seed first, so that a run that hangs or is killed can be repeated too; pytest -q has no header."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (seed := session.config.option.hypothesis_seed) is not None:
        reporter.write_line(f"Hypothesis draws from seed {seed}; to repeat this run: --hypothesis-seed={seed}")


@pytest.fixture(autouse=True)
def _no_ledger_stays_open() -> Iterator[None]:
    yield
    close_ledgers()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """Makes a started aggregator with these settings; by default it merges nothing by itself."""
    made: list[Bench] = []

    def start(*, started: bool = True, frame_bytes: int = 120 * 1024, **settings: object) -> Bench:
        bench = Bench(make_directory(scratch() / "aggregator", **{"merge__buffer_size": 100, **settings}))
        made.append(bench)
        if started:
            bench.start(frame_bytes)
        return bench

    yield start
    for bench in made:
        bench.close()
