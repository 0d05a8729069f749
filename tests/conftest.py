"""What every test may count on, however the suite was started."""

import signal
from collections.abc import Callable, Iterator

import pytest

from support.small_world import Bench, make_directory, scratch

# A shell starts what runs in the background deaf to Ctrl-C, and nohup deaf to the end of a session; then so would be
# all that tests start in order to interrupt it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)


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
