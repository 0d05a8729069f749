"""What exact sums cost, and what they save: rounding beside TernGrad's noise, accuracies, adders, revocations.

    python -m benchmarks.exact_sums [--seeds 40] [--versions 60] [--buffers 40] [--parameters 1200000] [--json]

*Rounding*: buffers of 32 updates of 100,000 parameters, made ternary at random (TernGrad), with samples and staleness
of unequal devices. The reference adds the same updates up in float64; TernGrad's noise is the distance of that from the
sum of the changes before they were ternary. *Accuracies*: simulations of digits-numpy, with sums in order and exact
ones, the same seeds. *Adders*: 256 updates by 1, 2 and 4 threads. How many a second they can add is counted by the CPU
time of the busiest thread, so it does not depend on how many processors are free. *Revocation*: the CPU time to take
one of 16 devices out of a buffer of 64, by adding the others anew and by subtraction; contents are decoded first.
"""

import argparse
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.ingest import shapes
from benchmarks.program import cpu_ms, one_thread, options, print_result
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate, Journal
from ternbus.aggregator.merge.accumulator import COMPILED, Accumulator
from ternbus.aggregator.merge.background import Background
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.merge.mean import Sum
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import TERNARY, ZSTD, Block, encode
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario
from ternbus.lab.virtual.simulate import Simulation

SMALL: Final = 100_000  # parameters
UPDATES: Final = 32
ADDED: Final = 256
ADDERS: Final = (1, 2, 4)
DEVICES: Final = 16
BUFFER: Final = 64
LAST: Final = 5  # versions whose mean accuracy is a run's
WAYS: Final[dict[str, Callable[[Schema], Sum]]] = {"in order": Accumulator, "exact": ExactSum}


def ternary(schema: Schema, change: Vector, seed: int) -> Block:
    """A change, made ternary at random as a device does."""
    return compress(schema, Plan(), change, None, seed).block


# --- rounding


def one_buffer(schema: Schema, seed: int) -> dict[str, dict[str, float]]:
    """The relative error of each way, and its part along the sum itself (the bias), beside TernGrad's."""
    random = np.random.default_rng(seed)
    common = random.normal(scale=1e-3, size=schema.elements)
    true = np.zeros(schema.elements)
    reference = np.zeros(schema.elements)
    sums = {name: make(schema) for name, make in WAYS.items()}
    for number in range(UPDATES):
        weight = float(random.integers(10, 2000)) * (1 + int(random.integers(0, 9))) ** -0.5
        size = random.lognormal(sigma=0.5)
        change = (size * (common + random.normal(scale=1e-3, size=schema.elements))).astype(np.float32)
        block = ternary(schema, change, UPDATES * seed + number)
        true += weight * change
        reference += weight * block.value().astype(np.float64)
        for each in sums.values():
            each.add(block, weight)
    found = {name: apart(each.total().astype(np.float64), reference) for name, each in sums.items()}
    return found | {"terngrad": apart(reference, true)}


def apart(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> dict[str, float]:
    """The L2 norm of the difference, and its part along ``expected``, both as shares of the norm of that."""
    square = float(expected @ expected)
    difference = found - expected
    return {"error": float(np.linalg.norm(difference)) / square**0.5, "bias": float(difference @ expected) / square}


def rounding(buffers: int) -> dict[str, dict[str, float]]:
    """Means over buffers, with the standard error of the bias."""
    schema = Schema.of(shapes(SMALL))
    rows = [one_buffer(schema, seed) for seed in range(buffers)]
    return {
        name: {
            "error": statistics.mean(row[name]["error"] for row in rows),
            "bias": statistics.mean(row[name]["bias"] for row in rows),
            "bias_se": statistics.stdev(row[name]["bias"] for row in rows) / len(rows) ** 0.5,
        }
        for name in rows[0]
    }


# --- accuracies


def accuracy(way: str, seed: int, versions: int) -> float:
    """The mean accuracy of a run's last versions."""
    wanted = Scenario(
        task="digits-numpy",
        devices=8,
        seed=seed,
        partition="dirichlet:0.5",
        aggregator={"merge.buffer_size": 4},
        end=End(versions=versions),
    )
    model = partial(Model, summing=WAYS[way])
    simulation = Simulation(wanted, load_task("digits-numpy"), Lines(sys.stderr), model=model)
    began = time.monotonic()
    simulation.run()
    rows = simulation.report(time.monotonic() - began)["versions"]
    return statistics.mean(float(row["accuracy"]) for row in rows[-LAST:])


# --- adders


@dataclass(slots=True)
class Accounted(Executor):
    """A pool that accounts for the CPU time of each of its threads, in seconds."""

    pool: ThreadPoolExecutor
    spent: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        return self.pool.submit(self._run, partial(function, *args, **named))

    def _run(self, work: Callable[[], Any]) -> Any:
        began = time.thread_time()
        try:
            return work()
        finally:
            self.spent[threading.get_ident()] += time.thread_time() - began


def scaling(schema: Schema, blocks: list[Block]) -> list[dict[str, Any]]:
    """A row for the sum in order by one thread, and one for each number of adders, all with the same blocks."""

    def add_in_order() -> None:
        total = Accumulator(schema)
        for place in range(ADDED):
            total.add(blocks[place % len(blocks)], 100.0 + place)

    spent = cpu_ms(add_in_order, runs=3)
    rows: list[dict[str, Any]] = [
        {"way": "in order", "adders": 1, "cpu_ms": spent / ADDED, "per_s": 1000 * ADDED / spent}
    ]
    expected = b""
    for adders in ADDERS:
        runs = []
        for _ in range(3):
            with ThreadPoolExecutor(adders) as pool:
                threads = Accounted(pool)
                total = Background(schema, threads, adders)
                for place in range(ADDED):
                    total.add(blocks[place % len(blocks)], 100.0 + place)
                bits = total.total().tobytes()
            expected = expected or bits
            assert bits == expected, "another number of adders has other bits"
            runs.append((max(threads.spent.values()), sum(threads.spent.values())))
        busiest, whole = (statistics.median(each) for each in zip(*runs, strict=True))
        rows.append(
            {
                "way": "exact",
                "adders": adders,
                "cpu_ms": 1000 * whole / ADDED,
                "busiest_ms": 1000 * busiest / ADDED,
                "per_s": ADDED / busiest,
            }
        )
    return rows


# --- a revocation


class Encoded(Journal):
    """A buffer whose contents are decoded when it is their turn."""

    def __init__(self, schema: Schema, updates: list[AcceptedUpdate], bodies: list[bytes]) -> None:
        self.schema, self.updates, self.bodies = schema, updates, bodies

    def __iter__(self) -> Iterator[BufferedUpdate]:
        return self._read(range(len(self.updates)))

    def of(self, device: str) -> Iterator[BufferedUpdate]:
        return self._read(place for place, update in enumerate(self.updates) if update.device == device)

    def _read(self, places: Iterable[int]) -> Iterator[BufferedUpdate]:
        for place in places:
            body = self.bodies[place % len(self.bodies)]
            yield self.updates[place], Block.read(self.schema, TERNARY, ZSTD, body)


def revocation(schema: Schema, blocks: list[Block]) -> dict[str, float]:
    """The CPU milliseconds of taking a device out of a buffer, each way."""
    updates = [
        AcceptedUpdate(
            device=f"d{place % DEVICES}", key=KeyId(bytes(8)), seq=1 + place, base=0, digest=bytes(32), staleness=0,
            samples=100 + place, discount=1.0, codec=TERNARY, encoding=ZSTD,
        )
        for place in range(BUFFER)
    ]  # fmt: skip
    journal = Encoded(schema, updates, [encode(block.content) for block in blocks])
    settings = Settings(federation="bench", broker="mqtt://127.0.0.1:1")
    start = np.zeros(schema.elements, np.float32)
    server = optimizer.init(settings.optimizer, start)
    found = {}
    for name, make in WAYS.items():
        about = partial(Model, settings=settings, schema=schema, version=0, published=start, server=server)
        spent = []
        for _ in range(3):
            model = about(kinds=TensorKinds(), summing=make)
            model.refill(journal)
            began = time.thread_time()
            model.drop("d3", journal)
            spent.append(1000 * (time.thread_time() - began))
        found[name] = statistics.median(spent)
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All four parts."""
    schema = Schema.of(shapes(given.parameters))
    random = np.random.default_rng(1)
    blocks = [
        ternary(schema, random.normal(scale=1e-3, size=schema.elements).astype(np.float32), seed) for seed in range(8)
    ]
    return {
        "parameters": schema.elements,
        "compiled": COMPILED,
        "buffers": given.buffers,
        "updates": UPDATES,
        "rounding": rounding(given.buffers),
        "accuracy": {way: [accuracy(way, seed, given.versions) for seed in range(given.seeds)] for way in WAYS},
        "versions": given.versions,
        "adders": scaling(schema, blocks),
        "revocation": {"buffer": BUFFER, "devices": DEVICES, "cpu_ms": revocation(schema, blocks)},
    }


def show(found: dict[str, Any]) -> None:
    """Print it."""
    for name, row in found["rounding"].items():
        print(f"{name:>9}: error {row['error']:.2e} of the sum, bias {row['bias']:+.1e} ± {row['bias_se']:.1e}")
    for way, values in found["accuracy"].items():
        print(f"{way:>9}: accuracy {100 * statistics.mean(values):.2f} %  {[round(100 * each, 1) for each in values]}")
    for row in found["adders"]:
        print(
            f"{row['way']:>9}: {row['adders']} adders, {row['cpu_ms']:.3f} ms of CPU an update, {row['per_s']:,.0f}/s"
        )
    took = found["revocation"]["cpu_ms"]
    ratio = took["in order"] / took["exact"]
    print(f"revocation: {took['in order']:.1f} ms in order, {took['exact']:.1f} ms exact: {ratio:.1f} times")


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="runs of each way")
    parser.add_argument("--versions", type=int, default=60, help="versions of a run")
    parser.add_argument("--buffers", type=int, default=40, help="buffers whose rounding is measured")
    parser.add_argument("--parameters", type=int, default=1_200_000, help="size of the model of adders and revocation")
    given = parser.parse_args()
    one_thread()
    found = measure(given)
    print_result(found, as_json=given.json, show=lambda: show(found))


if __name__ == "__main__":
    main()
