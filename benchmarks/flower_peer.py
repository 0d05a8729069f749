"""The same federation by Flower's simulation engine, for comparison. Flower is no dependency of ours.

    PYTHON -m benchmarks.flower_peer TASK --devices 20 --versions 10 --processes 2 [--data DIR] [--json]

PYTHON is one that has `flwr[simulation]`, and what the task needs: a virtual environment of its own, since Flower pins
older versions of some packages. FedAvg in rounds of all clients; a client trains as in `benchmarks.bare_training`, and
the server evaluates each version on the test data.
"""

import argparse
import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_training import Clients, federation_options

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


@cache
def clients(task: str, data: Path | None, devices: int, partition: str) -> Clients:
    """Loaded once in each process of the engine."""
    return Clients(task, data, devices, partition)


def client_app(*which: Any) -> ClientApp:
    """What each client does in a round; ``which`` are the arguments of `clients`."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # Flower has no types here
    def train(message: Message, context: Context) -> Message:
        mine = clients(*which)
        device, version = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        net = mine.task.fresh()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loss = mine.train(net, device, version)
        metrics = {"train_loss": loss, "num-examples": len(mine.rows[device])}
        found = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)})
        return Message(content=found, reply_to=message)

    return app


def server_app(versions: int, found: dict[str, Any], *which: Any) -> ServerApp:
    """FedAvg, with an evaluation of each version."""
    app = ServerApp()
    mine, devices = clients(*which), which[2]
    evaluator = mine.task.evaluator(data=which[1])

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        tensors = {name: array.numpy() for name, array in arrays.to_torch_state_dict().items()}
        found["accuracy"] = evaluator.evaluate(tensors).values["accuracy"]
        found["evaluated_s"] = time.perf_counter()
        return MetricRecord({"accuracy": found["accuracy"]})

    @app.main()  # type: ignore[untyped-decorator]  # Flower has no types here
    def run(grid: Grid, context: Context) -> None:  # noqa: ARG001 - of Flower
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(OrderedDict(mine.task.fresh().state_dict())),
            num_rounds=versions,
            train_config=ConfigRecord({}),
            evaluate_fn=evaluate,
        )

    return app


def simulated(given: argparse.Namespace) -> Mapping[str, float]:
    """Run it; the seconds until the last version was evaluated, and its accuracy."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    which = (given.task, given.data, given.devices, given.partition)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": given.processes}}
    run_simulation(
        server_app=server_app(given.versions, found, *which),
        client_app=client_app(*which),
        num_supernodes=given.devices,
        backend_config=resources,
    )
    return {"wall_s": found["evaluated_s"] - began, "accuracy": found["accuracy"]}


def main() -> None:
    """Simulate, and print the seconds."""
    given = federation_options(__doc__).parse_args()
    found = simulated(given)
    print("\n" + json.dumps(found) if given.json else f"{found['wall_s']:.1f} s, accuracy {found['accuracy']:.4f}")


if __name__ == "__main__":
    sys.modules["__main__"] = import_module("benchmarks.flower_peer")  # by its name the engine's processes import it
    sys.modules["__main__"].main()
