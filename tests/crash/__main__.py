"""Kill a federation at random, as often as asked for, and show the differences from one that was left alone.

    PYTHONPATH=tests python -m crash --kills 1000 --seed 7
    PYTHONPATH=tests python -m crash --kills 200 --seed 7 --private

Each life of the aggregator and of the devices gets an end drawn from the seed: a crash point at its n-th time, a disk
that fails at its n-th write or sync, or a kill from outside after some time; the broker is killed meanwhile. The draws
of one seed are always the same; which of them a process lives to see depends on the machine.

With --private it is a federation of private sums, and its helpers are killed too. Devices' draws are random there, so
that no run is like another one; what must hold of a run by itself is checked instead (`private_differences`).
"""

import argparse
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crash import differences, private_differences
from crash.federation import AGGREGATOR, DEVICES, KINDS, OUTSIDE, End, Federation, at, failing, joined, preload_in
from crash.private import HELPERS, privately_joined
from ternbus.broker.server.running import Engine

EVERY_S: Final = 10.0  # how often the state is printed
BROKER_S: Final = (10.0, 30.0)  # how long a broker lives; for 5 s the aggregator waits for what it retained
BOTH: Final = ("save", "saved", "connect", "subscribe", "publish-status", "acknowledge")
SERVING: Final = (
    *BOTH, "republish", "publish-head", "publish-delta", "publish-snapshot", "publish-receipt", "publish-grant",
    "body-written", "bodies-synced", "segment-begun", "vectors-piece-written", "vectors-written", "log-moved",
    "file-removed", "publish-view",
)  # fmt: skip
SUMMING: Final = (*SERVING, "publish-terms", "publish-ask")  # an aggregator of private sums
HELPING: Final = (*BOTH, "publish-card", "publish-answer", "state-written")
TRAINING: Final = (
    *BOTH, "publish-offer", "publish-update", "publish-metrics", "start-job", "job-done", "state-written",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pace:
    """How long processes live: until a kill from outside, or until the n-th time at a point, on average."""

    least_s: float
    mean_s: float  # beyond that
    patience_s: float  # until a kill from outside of what does not get to the end that was drawn
    times: float


PLAIN: Final = Pace(least_s=0.5, mean_s=2.0, patience_s=8.0, times=2.0)
SLOW: Final = Pace(least_s=1.0, mean_s=10.0, patience_s=20.0, times=8.0)  # a set needs six processes at a time


class Lots:
    """The ends of one process, drawn from the seed and the process's name."""

    def __init__(self, seed: int, name: str, points: Sequence[str], pace: Pace, *, disk: bool) -> None:
        self._points = points
        self._pace = pace
        self._random = random.Random(f"{seed}/{name}")
        self._disk = disk

    def draw(self) -> End:
        chance, pace = self._random, self._pace
        lot = chance.random()
        if lot < 0.2:
            return End(how=OUTSIDE, after_s=pace.least_s + chance.expovariate(1 / pace.mean_s))
        if lot < 0.4 and self._disk:
            return failing(chance.choice(KINDS), chance.randint(1, 60), after_s=pace.patience_s)
        return at(chance.choice(self._points), 1 + int(chance.expovariate(1 / pace.times)), after_s=pace.patience_s)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m crash", description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=None, help="drawn if it is not given")
    arguments.add_argument("--engine", type=Engine, default=Engine.MOSQUITTO, choices=list(Engine))
    arguments.add_argument("--private", action="store_true", help="a federation of private sums")
    chosen = arguments.parse_args()
    seed = secrets.randbelow(2**31) if chosen.seed is None else chosen.seed
    about = f"{chosen.engine}, private sums" if chosen.private else str(chosen.engine)
    print(f"crash test: {chosen.kills} kills, seed {seed}, {about}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="ternbus-crash-"))
    found = (run_private if chosen.private else run)(folder, chosen.kills, seed, chosen.engine)
    for difference in found:
        print(difference)
    print(f"seed {seed}, differences: {len(found)}{f'; the folder is {folder}' if found else ''}", flush=True)
    if not found:
        shutil.rmtree(folder)
    sys.exit(1 if found else 0)


def run(folder: Path, kills: int, seed: int, engine: Engine) -> list[str]:
    """The differences after so many ends."""
    with joined(folder / "damaged", engine, _disk(folder)) as damaged:
        _kill(damaged, kills, seed, {AGGREGATOR: SERVING, **dict.fromkeys(DEVICES, TRAINING)}, PLAIN)
        damaged.end(*DEVICES, AGGREGATOR)
        print(f"{_ended(damaged)}; making as many versions again without a kill", flush=True)
        with joined(folder / "reference", engine) as reference:
            reference.until(lambda: reference.version() >= damaged.version(), "reference", within_s=3600.0)
            return differences.found(damaged, reference)


def run_private(folder: Path, kills: int, seed: int, engine: Engine) -> list[str]:
    """What does not hold of private sums after so many ends."""
    with privately_joined(folder / "damaged", engine, _disk(folder)) as damaged:
        devices = dict.fromkeys(damaged.devices, TRAINING)
        _kill(damaged, kills, seed, {AGGREGATOR: SUMMING, **dict.fromkeys(HELPERS, HELPING), **devices}, SLOW)
        damaged.close()
        story = private_differences.read(damaged)
        print(f"{_ended(damaged)}; {story.summary()}", flush=True)
        return private_differences.found(damaged, story)


def _disk(folder: Path) -> Path | None:
    compiler = shutil.which("cc")
    return None if compiler is None else preload_in(folder, compiler)


def _ended(damaged: Federation) -> str:
    for (name, what), count in sorted(damaged.ended.items()):
        print(f"{name:12}{what:28}{count:6}")
    return f"{damaged.ended.total()} kills, {damaged.version()} versions"


def _kill(damaged: Federation, kills: int, seed: int, points: Mapping[str, Sequence[str]], pace: Pace) -> None:
    """Have processes end so often, by these points, and then make two versions more in peace."""
    chance = random.Random(f"{seed}/broker")
    for name in points:
        lots = Lots(seed, name, points[name], pace, disk=damaged.preload is not None)
        damaged.draw(name, lots.draw)
        damaged.kill(name)
    said_at = time.monotonic()
    broker_at = said_at + chance.uniform(*BROKER_S)
    while damaged.ended.total() < kills:
        now = time.monotonic()
        if now >= broker_at:
            damaged.kill_broker()
            broker_at = now + chance.uniform(*BROKER_S)
        if now - said_at >= EVERY_S:
            said_at = now
            print(f"{damaged.ended.total()} of {kills} kills, version {damaged.version()}", flush=True)
        damaged.look()
        time.sleep(0.01)
    damaged.calm()
    damaged.until_later(2)


if __name__ == "__main__":
    main()
