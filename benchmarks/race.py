"""Asynchronous and synchronous ways raced to an accuracy, to choose the settings of each from a table.

    python -m benchmarks.race --data DIR [--seeds 3] [--out FOLDER] [--only digits-numpy] [--ways TEXT …] [--json]

The devices of `time_to_accuracy`: 20, of very unequal speed, Dirichlet 0.5, ternary both ways, in virtual time with
real training. Both kinds have the same choice of server optimizers and rates.

- synchronous: a version from the first k updates on the newest version (over-selection, Bonawitz et al. 2019);
- asynchronous: a version from each buffer of updates, however stale, by a discount of staleness (FedBuff, Nguyen et al.
  2022), by calibration with cached updates (CA2FL, Wang et al. 2024) or with a delay-adaptive rate (FADAS, Wang et al.
  2024).

First all of them run on digits-numpy, which takes minutes; then those of `FINALISTS` on fashion-mnist, of which --data
has the files. A run that is already in --out is not repeated. --ways runs only those whose name has one of the texts.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.program import options, print_result
from benchmarks.time_to_accuracy import DEVICES, LONGEST_WAIT_S, figures, run, unequal_devices
from benchmarks.words import table_of
from ternbus.aggregator.merge.model import Model
from ternbus.lab.notebook.algorithms import Hooks, Pair
from ternbus.lab.notebook.asynchronous import ca2fl, fadas
from ternbus.lab.scenario.scenario import End

DIGITS: Final = "digits-numpy"
FASHION: Final = "fashion-mnist"
ACCURACIES: Final[Mapping[str, float]] = {DIGITS: 0.94, FASHION: 0.85}
LONGEST_S: Final[Mapping[str, float]] = {DIGITS: 80.0, FASHION: 200.0}  # virtual; a way that needs longer has lost
FIRST: Final = (4, 7, 10, 13)  # of 20 devices
BUFFERS: Final = (3, 5, 10)
UNBOUNDED: Final = 10_000  # versions: as stale as it gets
GOAL: Final = 2.0  # times sooner than the best synchronous way
Settings = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How versions are made: settings of the aggregator, and pairs in place of its own algorithms."""

    name: str
    synchronous: bool
    settings: Settings
    pairs: Callable[[], Mapping[str, Pair]] = dict

    def model(self) -> Callable[..., Model]:
        """What makes the aggregator's model; anew for each run, since algorithms have a state."""
        pairs = self.pairs()
        return Hooks.of(pairs.get("merge_rule"), pairs.get("server_optimizer"), None).model


def _server(name: str, rate: float, **more: float) -> Settings:
    return {"optimizer.name": name, "optimizer.learning_rate": rate, **{f"optimizer.{key}": more[key] for key in more}}


SERVERS: Final[Mapping[str, Settings]] = {
    "fedavg": {},
    "fedavg, rate 1.5": _server("fedavg", 1.5),
    "fedavgm 0.5, rate 0.5": _server("fedavgm", 0.5, momentum=0.5),
    "fedadam, rate 0.03": _server("fedadam", 0.03),
}


def ways() -> Iterator[Way]:
    """All that are raced."""
    for first in FIRST:
        for server, settings in SERVERS.items():
            merging = {"merge.buffer_size": first, "staleness.max": 0, **settings}
            yield Way(name=f"first {first} of {DEVICES}, {server}", synchronous=True, settings=merging)
    for buffer in BUFFERS:
        merging = {"merge.buffer_size": buffer, "staleness.max": UNBOUNDED}
        for server, settings in SERVERS.items():
            name = f"buffer {buffer}, (1 + τ)^-0.5, {server}"
            yield Way(name=name, synchronous=False, settings={**merging, **settings})
        name, settings = f"buffer {buffer}, no discount, fedavg", {**merging, "staleness.discount": "constant"}
        yield Way(name=name, synchronous=False, settings=settings)
        for rate in (0.5, 1.0):
            name, settings = f"buffer {buffer}, CA2FL, rate {rate}", {**merging, **_server("fedavg", rate)}
            yield Way(name=name, synchronous=False, settings=settings, pairs=_ca2fl)
        for rate, divided in ((0.03, False), (0.1, True)):
            name = f"buffer {buffer}, FADAS, rate {rate}{' / τ' if divided else ''}"
            yield Way(name=name, synchronous=False, settings=merging, pairs=partial(_fadas, rate, divided))


FINALISTS: Final = (
    "first 10 of 20, fedavg",
    "first 10 of 20, fedavg, rate 1.5",
    "first 13 of 20, fedavg, rate 1.5",
    "buffer 5, (1 + τ)^-0.5, fedavg",
)


def _ca2fl() -> Mapping[str, Pair]:
    return {"merge_rule": ca2fl(DEVICES)}


def _fadas(rate: float, divided: bool) -> Mapping[str, Pair]:
    rule, optimizer = fadas(rate, divided=divided)
    return {"merge_rule": rule, "server_optimizer": optimizer}


def raced(way: Way, task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a way, one for each seed."""
    merging = {"downlink.codec": "ternary", "merge.max_wait_s": LONGEST_WAIT_S, **way.settings}
    rows = []
    for seed in range(arguments.seeds):
        end = End(seconds=LONGEST_S[task])
        wanted = unequal_devices(task, seed, arguments, codec="ternary", merging=merging, end=end)
        report = run(f"{task}, {way.name}", wanted, ACCURACIES[task], arguments.out, way.model())
        rows.append(figures(report, ACCURACIES[task]))
    return {"way": way.name, "synchronous": way.synchronous, "seeds": rows}


def seconds(row: Mapping[str, Any]) -> float | None:
    """The mean over the seeds; None if one has not reached the accuracy."""
    found = [each["seconds"] for each in row["seeds"] if each["version"] is not None]
    return statistics.mean(found) if len(found) == len(row["seeds"]) else None


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The ways that have reached the accuracy with all seeds, the soonest first."""
    return sorted((row for row in rows if seconds(row) is not None), key=lambda row: seconds(row) or 0.0)


def best(rows: Sequence[Mapping[str, Any]], *, synchronous: bool) -> Mapping[str, Any] | None:
    """The soonest way of a kind, if there is one that has reached the accuracy."""
    return next((row for row in ranked(rows) if row["synchronous"] is synchronous), None)


def sooner(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times sooner a way is than the best synchronous one; None where there is none, or it did not arrive."""
    fastest = best(rows, synchronous=True)
    mean, other = seconds(row), None if fastest is None else seconds(fastest)
    return None if mean is None or other is None else other / mean


def best_of_each(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each buffer and each algorithm the way with the best server optimizer, the soonest first."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in ranked(rows):
        found.setdefault(_group(row), row)
    return list(found.values())


def never(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The buffers and algorithms of which no way has reached the accuracy with all seeds."""
    arrived = {_group(row) for row in ranked(rows)}
    return [group for group in dict.fromkeys(map(_group, rows)) if group not in arrived]


def _group(row: Mapping[str, Any]) -> str:
    parts: list[str] = row["way"].split(", ")
    return ", ".join(parts[: 1 if row["synchronous"] else 2])


def cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of the table for a way that has arrived; `HEAD` says what of."""
    each, ratio = row["seeds"], sooner(row, rows)
    versions, size = (statistics.mean(one[key] for one in each) for key in ("version", "both"))
    taken = ", ".join(f"{one['seconds']:.0f}" for one in each)
    kind = "synchronous" if row["synchronous"] else "asynchronous"
    shown = "" if ratio is None else f"{ratio:.2f}"
    return [kind, row["way"], f"{seconds(row) or 0.0:.1f}", taken, f"{versions:.0f}", f"{size / 1e6:.1f}", shown]


HEAD: Final = (
    "kind", "way", "virtual s", "of seeds", "versions", "MB both ways", "times sooner than the best synchronous"
)  # fmt: skip


def show(result: Mapping[str, Any]) -> None:
    """Print a table of each task."""
    for task, about in result["tasks"].items():
        rows = about["rows"]
        print(f"\n{task}, until {about['accuracy']:.0%}, means of {result['asked']['seeds']} seeds\n")
        print(table_of(HEAD, [cells(row, rows) for row in ranked(rows)]))
        lost = [row["way"] for row in rows if seconds(row) is None]
        print(f"\nnot within {LONGEST_S[task]:.0f} s with every seed: {'; '.join(lost) or 'none'}")
    print(f"\nGoal: {GOAL:.0f} times sooner than the best synchronous way")


def main() -> None:
    """Run missing runs and print the tables."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="folder with FashionMNIST/raw/*-ubyte; without it, digits only")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--median-s", type=float, default=10.0, help="median duration of a local training")
    parser.add_argument("--up-mbit-s", type=float, default=1.0, help="uplink of each device; 0 means unlimited")
    parser.add_argument("--down-mbit-s", type=float, default=4.0, help="downlink of each device; 0 means unlimited")
    parser.add_argument("--out", type=Path, default=Path("benchmark-race"), help="folder for the runs")
    parser.add_argument("--only", choices=ACCURACIES, help="one of the two tasks")
    parser.add_argument("--ways", nargs="*", metavar="TEXT", help="only ways whose name has one of these")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    among = {DIGITS: list(ways()), FASHION: [way for way in ways() if way.name in FINALISTS or arguments.ways]}
    tasks = {}
    for task, all_of_them in among.items():
        if arguments.only not in (None, task) or (task == FASHION and arguments.data is None):
            continue
        chosen = [way for way in all_of_them if not arguments.ways or any(text in way.name for text in arguments.ways)]
        rows = [raced(way, task, arguments) for way in chosen]
        tasks[task] = {"accuracy": ACCURACIES[task], "rows": rows}
    asked = {name: getattr(arguments, name) for name in ("seeds", "median_s", "up_mbit_s", "down_mbit_s")}
    result = {"asked": asked, "goal": GOAL, "tasks": tasks}
    print_result(result, as_json=arguments.json, show=lambda: show(result))


if __name__ == "__main__":
    main()
