"""A federation's training without a federation: the same batches of the same models in a plain loop of PyTorch.

    python -m benchmarks.bare_training TASK --devices 20 --versions 10 --processes 2 [--data DIR] [--json]

Each process trains a part of the devices, and waits for nobody: less cannot be done. Nothing is merged or evaluated.
`benchmarks.training_speed` compares with it; `train` is what a client of its peer does too.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.program import options
from ternbus.edge import TorchTask
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.lab.scenario.partitions import part_of

SEED = 0


class Clients:
    """All clients of a task: their rows of its data, and a plain training."""

    def __init__(self, task: str, data: Path | None, devices: int, partition: str) -> None:
        torch.set_num_threads(1)
        found = load_task(task)
        assert isinstance(found, TorchTask)
        self.task, self.plan = found, Plan.from_meta(found.default_plan)
        self.inputs, self.targets = found.dataset(data, "train")
        partitions = [part_of(partition, device, devices, SEED) for device in range(devices)]
        trainers: Any = found.trainers(data=data, partitions=partitions)
        self.rows: list[Any] = [trainer.data.numbers for trainer in trainers]

    def train(self, net: nn.Module, device: int, version: int) -> float:
        """Train in place; the mean loss."""
        plan, rows = self.plan, self.rows[device]
        optimizer = torch.optim.SGD(net.parameters(), lr=plan.learning_rate, momentum=plan.momentum)
        losses = []
        net.train()
        for chosen in plan.batches(len(rows), np.random.default_rng([SEED, device, version])):
            numbers = torch.from_numpy(rows[chosen])
            loss = functional.cross_entropy(net(as_floats(self.inputs[numbers])), self.targets[numbers])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


def as_floats(inputs: Tensor) -> Tensor:
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def part(given: argparse.Namespace, process: int) -> float:
    """Train the devices of one process, all versions; the seconds of its processor, without imports and data."""
    clients = Clients(given.task, given.data, given.devices, given.partition)
    which = divided(clients.rows, given.processes)
    initial = clients.task.fresh().state_dict()
    net = clients.task.fresh()
    began = time.process_time()
    for version in range(given.versions):
        for device in (device for device, own in which.items() if own == process):
            net.load_state_dict(initial)
            clients.train(net, device, version)
    return time.process_time() - began


def divided(rows: Sequence[Any], processes: int) -> dict[int, int]:
    """The process of each device: the largest first, each to the process with the fewest samples."""
    loads, found = [0] * processes, dict[int, int]()
    for device in sorted(range(len(rows)), key=lambda each: -len(rows[each])):
        found[device] = loads.index(min(loads))
        loads[found[device]] += len(rows[device])
    return found


def federation_options(description: str | None) -> argparse.ArgumentParser:
    """The options that name a federation, also one of the peer."""
    parser = options(description)
    parser.add_argument("task", help="the task, of tensors")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--partition", default="dirichlet:0.5")
    parser.add_argument("--data", type=Path)
    return parser


def main() -> None:
    """Train, and print the seconds."""
    given = federation_options(__doc__).parse_args()
    began = time.perf_counter()
    work = partial(part, given)
    if given.processes == 1:
        spent = [work(0)]
    else:
        with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            spent = pool.map(work, range(given.processes), chunksize=1)
    found = {"wall_s": time.perf_counter() - began, "training_cpu_s": sum(spent)}
    print(json.dumps(found) if given.json else f"{found['wall_s']:.1f} s, {sum(spent):.1f} s of processor in training")


if __name__ == "__main__":
    main()
