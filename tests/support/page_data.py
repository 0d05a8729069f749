"""What a reader of the pages has and a test must make: data, and names that a command printed.

`python -m support.page_data KIND …`, for the stories of `support.page_story`.
"""

import json
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np


def samples(folder: str) -> None:
    """Samples of the README's own task: 20 inputs, 3 classes."""
    rng = np.random.default_rng(0)
    Path(folder).mkdir()
    for split in ("train", "test"):
        inputs = rng.normal(size=(90, 20)).astype(np.float32)
        np.savez(Path(folder) / f"{split}.npz", inputs=inputs, targets=inputs[:, :3].argmax(1))


def arrays(task: str, folder: str) -> None:
    """The task's file and the data of three clients, as the notebook writes them."""
    from torch import nn  # noqa: PLC0415 - the other kinds are quicker without

    from ternbus.edge.tasks.digits_data import load  # noqa: PLC0415
    from ternbus.lab import Federation  # noqa: PLC0415

    inputs, targets = load("train")
    part = np.arange(len(targets)) % 3
    clients = {name: (inputs[part == i], targets[part == i]) for i, name in enumerate(("alice", "bob", "carol"))}
    Federation(lambda: nn.Linear(64, 10), clients=clients, test=0.2).to_task(task, data=folder)


def key(invitation: str) -> None:
    """The aggregator's public key."""
    print(tomllib.loads(Path(invitation).read_text(encoding="utf-8"))["aggregator_key"])


def card(path: str) -> None:
    """A helper's public key."""
    print(tomllib.loads(Path(path).read_text(encoding="utf-8"))["key"])


def device(folder: str) -> None:
    """A device's public key."""
    print(_printed("edge", "status", folder)["public_key"])


def head(folder: str) -> None:
    """VERSION:DIGEST of an aggregator's newest version."""
    status = _printed("aggregator", "status", folder)
    print(f"{status['version']}:{status['digest']}")


def newest(folder: str) -> None:
    """The number of an aggregator's newest version but one."""
    print(int(_printed("aggregator", "status", folder)["version"]) - 1)


def update(folder: str) -> None:
    """The number of a device's last answered update."""
    print(_printed("edge", "status", folder)["receipt"]["seq"])


def port() -> None:
    """A free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1])


def answers(url: str) -> None:
    """Waits for an answer."""
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=60).close()
        except OSError:
            time.sleep(0.1)  # a service that starts tells nobody when it listens
        else:
            return
    raise SystemExit(f"{url} does not answer")


def _printed(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ternbus", *words, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


if __name__ == "__main__":
    kinds = (samples, arrays, key, card, device, head, newest, update, port, answers)
    {each.__name__: each for each in kinds}[sys.argv[1]](*sys.argv[2:])
