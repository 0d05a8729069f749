"""A federation of private sums as processes: a broker, an aggregator, two helpers, and devices.

No two runs of it make the same versions, since the devices' draws are random: there is nothing to compare a run with
that was left alone. `private_differences` checks a run by itself.
"""

import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

from crash.differences import rows
from crash.federation import AGGREGATOR, SETTINGS, Federation, at
from ternbus.broker.server import running
from ternbus.broker.sums.terms import AGGREGATOR as BY_AGGREGATOR
from ternbus.broker.sums.terms import OWN
from ternbus.edge.shell.options import Options
from ternbus.helper.store.store import admit

MIN: Final = 3
DEVICES: Final = ("d0", "d1", "d2", "d3", "d4")
HELPERS: Final = {"h-1": OWN, "h-2": BY_AGGREGATOR}  # and who says which devices there are
SMALL_FRAMES: Final = ("--frame-bytes", "16384")  # its updates have so many parts that they are offered first
# At each step of a set: it is asked for, a helper has written it down, its answer leaves, its sum is merged.
ENDS: Final = {
    AGGREGATOR: (at("publish-terms"), at("publish-ask", 2)),
    "h-1": (at("state-written", 5), at("publish-answer")),
    "h-2": (at("publish-answer", 2), at("save", 6)),
    "d0": (at("publish-update", 2),),
    "d1": (at("saved", 4),),
    "d2": (at("publish-update"),),
}
PRIVATE_SETTINGS: Final = {
    **SETTINGS,
    "merge.buffer_size": len(DEVICES) - 1,
    "merge.min_devices": 0,
    "merge.max_wait_s": 3.0,  # for who is dead: a set of fewer, and now and then a group that is too small
    "merge.influence_bound": "none",
    "staleness.max": 2,
    "private.min": MIN,
}


class PrivateFederation(Federation):
    """One run of private sums in a folder of its own."""

    devices: ClassVar[Sequence[str]] = DEVICES

    def create(self) -> None:
        about = "--federation", "lab", "--broker", self.broker, "--min", str(MIN)
        for name, roster in HELPERS.items():
            self.command(name, "helper", "init", self.device(name), "--name", name, "--roster", roster, *about)
        self.make_aggregator({**PRIVATE_SETTINGS, "private.helpers": self.keys})

    @property
    def keys(self) -> dict[str, str]:
        """The helpers' public keys."""
        return {name: _card(self.device(name))["key"] for name in HELPERS}

    def options(self, name: str) -> Sequence[str]:
        pins = [word for key in self.keys.values() for word in ("--helper", key)]
        small = SMALL_FRAMES if name == DEVICES[0] else ()
        part = ("--partition", f"iid:{DEVICES.index(name)}/8")
        return "--private", *pins, "--private-min", str(MIN), *part, *small

    def process(self, name: str) -> tuple[str, list[str]]:
        return ("ternbus", ["helper", "run", str(self.device(name))]) if name in HELPERS else super().process(name)

    def run_options(self, name: str) -> Options:
        return Options()

    def assemble(self) -> None:
        """Have all join; aggregator and helpers run from now on."""
        self.start(AGGREGATOR)
        invitations = self.folder / "invitations"
        helpers = [word for name in HELPERS for word in ("--helper", name)]
        self.command(AGGREGATOR, "aggregator", "invite", self.home, *self.devices, *helpers, "--out", invitations)
        for name in HELPERS:
            self.command(name, "helper", "init", self.device(name), "--invitation", invitations / f"{name}.toml")
        self.join(*self.devices)
        for device, key in rows(self, "SELECT name, public FROM devices"):
            for helper in (name for name, roster in HELPERS.items() if roster == OWN):
                admit(self.device(helper), device, key, time.time())
        self.start(*HELPERS)

    def close(self) -> None:
        """Close the federation: whatever can be opened is opened, the rest is dropped, and all processes end."""
        self.command(AGGREGATOR, "aggregator", "close", self.home)
        self.until(lambda: self.all_done(*self.devices), "end of the devices")
        self.until(lambda: rows(self, "SELECT count(*) FROM updates WHERE merged IS NULL") == [(0,)], "end of all sets")
        self.end(*HELPERS, AGGREGATOR)


def _card(folder: Path) -> dict[str, str]:
    found: dict[str, str] = tomllib.loads((folder / "card.toml").read_text())
    return found


@contextmanager
def privately_joined(folder: Path, engine: running.Engine, preload: Path | None = None) -> Iterator[PrivateFederation]:
    """A federation all of whose processes run, and to which nothing has happened."""
    with PrivateFederation(folder, engine, preload) as federation:
        federation.assemble()
        federation.start(*federation.devices)
        yield federation
