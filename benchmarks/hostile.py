"""The accuracy of each merge rule when a fifth of the devices is hostile.

    python -m benchmarks.hostile [--task digits-numpy] [--partition dirichlet:0.5] [--seeds 3] [--versions 30] [--json]

Digits, 20 devices of unequal speed, buffers of 10, in virtual time with real training (`ternbus lab simulate`). The
seed determines the 4 hostile devices, the split of the data, the speeds and the initial model. The rules are
configured for 3 hostile devices in a buffer; on average there are 2. An accuracy is the mean over the last 5 versions
of a run, then over all seeds. It does not depend on the speed of the machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.program import options, print_result
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Hostile, Scenario
from ternbus.lab.virtual.simulate import Simulation

DEVICES: Final = 20
LAST: Final = 5
CLAIMED: Final = 2**32 - 1

ATTACKS: Final[Mapping[str, tuple[Hostile, ...]]] = {
    "none": (),
    "sign-flip": (Hostile(kind="sign-flip"),),
    "scaled-noise": (Hostile(kind="scaled-noise"),),
    "label-flip": (Hostile(kind="label-flip"),),
    "free-rider": (Hostile(kind="free-rider"),),
    "false samples": (Hostile(kind="sign-flip", strength=1.0, samples=CLAIMED),),
}
RULES: Final[Mapping[str, Mapping[str, object]]] = {
    "mean": {},
    "mean, influence_bound": {"merge.influence_bound": "adaptive"},
    "mean, max_share 0.1": {"merge.max_share": 0.1},
    "norm-clip": {"merge.rule": "norm-clip"},
    "median": {"merge.rule": "median"},
    "trimmed-mean": {"merge.rule": "trimmed-mean", "merge.trim": 0.3},
    "krum": {"merge.rule": "krum", "merge.byzantine": 3},
    "multi-krum": {"merge.rule": "multi-krum", "merge.byzantine": 3},
}


def accuracy(rule: str, attack: str, seed: int, arguments: argparse.Namespace) -> float:
    """The mean accuracy of the last versions of one run."""
    scenario = Scenario(
        task=arguments.task,
        devices=DEVICES,
        seed=seed,
        partition=arguments.partition,
        aggregator={
            "merge.buffer_size": 10,
            "merge.max_wait_s": 1000.0,
            "merge.influence_bound": "none",
            **RULES[rule],
        },
        end=End(versions=arguments.versions),
        hostile=ATTACKS[attack],
    )
    simulation = Simulation(scenario, load_task(scenario.task), Lines(sys.stderr))
    simulation.run()
    found = [row.accuracy for row in simulation.moment().versions[-LAST:]]
    return statistics.mean(each for each in found if each is not None)


def table(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---" * (1 + len(ATTACKS)) + "|"]
    for rule, row in found.items():
        cells = [f"{100 * statistics.mean(seeds):.1f}" for seeds in row.values()]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    spread = {rule: max(max(seeds) - min(seeds) for seeds in row.values()) for rule, row in found.items()}
    others = max(points for rule, points in spread.items() if rule != "krum")
    lines += [
        "",
        f"Between seeds: up to {100 * spread['krum']:.0f} points with krum, up to {100 * others:.0f} with the others.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all simulations and print the table."""
    parser = options(__doc__)
    parser.add_argument("--task", default="digits-numpy", help="name of the task")
    parser.add_argument("--partition", default="dirichlet:0.5", help="partition of the data, as in a scenario")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--versions", type=int, default=30, help="versions of each run")
    arguments = parser.parse_args()
    began = time.monotonic()
    found: dict[str, dict[str, list[float]]] = {}
    for rule in RULES:
        found[rule] = {}
        for attack in ATTACKS:
            found[rule][attack] = [accuracy(rule, attack, seed, arguments) for seed in range(arguments.seeds)]
    result: dict[str, Any] = {
        "task": arguments.task,
        "partition": arguments.partition,
        "versions": arguments.versions,
        "seeds": arguments.seeds,
        "seconds": round(time.monotonic() - began, 1),
        "accuracy": found,
    }
    print_result(result, as_json=arguments.json, show=lambda: print(table(found)))


if __name__ == "__main__":
    main()
