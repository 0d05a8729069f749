"""An aggregator with enrolled devices, and a helper if its sums are private: their folders, processes and CPU."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.ingest import FEDERATION, shapes
from benchmarks.sender import device, identity
from ternbus.aggregator.core import records
from ternbus.aggregator.shell import administration, helper_cards
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.files import write_secret
from ternbus.broker.protocol.identity import enroll_proof
from ternbus.broker.sums.terms import MASK

HELPER: Final = "helper"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ternbus", *arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """The folders of an aggregator and, with private sums, of a helper."""

    folder: Path
    aggregator_public: bytes = b""
    names: tuple[str, ...] = ("aggregator",)

    @property
    def aggregator(self) -> Path:
        return self.folder / "aggregator"

    @contextmanager
    def running(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The processes, in the order of ``names``; they end with the block."""
        processes: list[subprocess.Popen[bytes]] = []
        with (self.folder / "processes.log").open("ab") as log:
            try:
                for name in self.names:
                    run = command(name, "run", str(self.folder / name))
                    processes.append(subprocess.Popen(run, stdout=log, stderr=log))
                yield processes
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait(60)


def make(
    folder: Path, url: str, *, parameters: int, devices: int, settings: Mapping[str, object], private: bool,
    sums: str = MASK,
) -> Homes:  # fmt: skip
    """Make the folders for a model of zeros; devices are enrolled. ``sums`` is the kind of private sums."""
    model = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(parameters).items()}
    helper, log = folder / HELPER, folder / "processes.log"
    own: dict[str, object] = {}
    if private:
        _run(log, "helper", "init", str(helper), "--federation", FEDERATION, "--broker", url, "--private-kind", sums)
        own = helper_cards.settings_of([helper / "card.toml"], FEDERATION, sums)
    homes = Homes(folder=folder)
    administration.create(
        homes.aggregator, federation=FEDERATION, broker=url, model=model, settings={**settings, **own}
    )
    _enroll(homes.aggregator, devices)
    if not private:
        return homes
    (invitation,) = administration.invite(homes.aggregator, helpers=[HELPER])
    write_secret(folder / "invitation", invitation.dumps().encode())
    _run(log, "helper", "init", str(helper), "--invitation", str(folder / "invitation"))
    key = bytes.fromhex(invitation.aggregator_key)
    return Homes(folder=folder, aggregator_public=key, names=("aggregator", HELPER))


def _enroll(directory: Path, devices: int) -> None:
    ledger = Ledger(directory / LEDGER)
    ledger.write(
        records.DeviceEnrolled(
            device=device(number), public=identity(number).public,
            proof=enroll_proof("bench", FEDERATION, device(number), identity(number).public),
        )
        for number in range(devices)
    )  # fmt: skip
    ledger.close()


def _run(log: Path, *arguments: str) -> None:
    with log.open("ab") as output:
        subprocess.run(command(*arguments), check=True, stdout=output)
