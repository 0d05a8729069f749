"""The services, over real sockets to a real mosquitto, with a Byzantine proxy in between."""

import sqlite3
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stranger.servers import Aggregator, until
from support.at_length import at_length, in_every_run
from support.byzantine_broker import FAULTS, NUMBERS, Adversary, Fault
from support.byzantine_proxy import ByzantineProxy
from support.noise_trainer import MODEL
from support.shell_device import WITHIN_S, Device
from support.small_world import scratch
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import status as aggregator_status
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

pytestmark = pytest.mark.slow

NAMES = ("a", "b", "c")


class ByzantineServices(RuleBasedStateMachine):
    """Rules are faults, cuts and kills; time is real, so each waits until its faults have been applied."""

    @initialize()
    def begin(self) -> None:
        self.folder = scratch()
        save_safetensors(self.folder / "model.safetensors", MODEL, {})
        self.broker: RunningBroker = start(
            choose(Engine.MOSQUITTO), host="127.0.0.1", port=0, directory=self.folder / "broker"
        )
        self.line = ByzantineProxy(self.broker.endpoint.port, Adversary(), Adversary())
        self.aggregator = Aggregator(
            self.folder / "aggregator",
            federation="lab",
            broker=self.line.url,
            model=self.folder / "model.safetensors",
            settings={"merge.buffer_size": 2, "merge.max_wait_s": 2, "downlink.slots": 4, "plan.codec": "float32"},
        )
        self.aggregator.start()
        invitations = administration.invite(self.aggregator.folder, *NAMES)
        self.devices = [Device(self.folder / each.device, each) for each in invitations]
        until(lambda: self.version >= 1, WITHIN_S, "no version")

    @property
    def version(self) -> int:
        return int(self.status()["version"])

    def status(self) -> dict[str, Any]:
        return aggregator_status.read(self.aggregator.folder)

    def at_rest(self) -> bool:
        """Whether nothing is left to be merged, and all devices hold the bits that there are.

        An update that is still under way may make one more version after a pause: so look until all is the same.
        """
        found = self.status()
        same = {device.vector_digest for device in self.devices} == {found["digest"]}
        return found["state"] == "paused" and found["buffer"] == 0 and same

    def wait_until_applied(self, adversary: Adversary) -> None:
        """Wait until all faults are applied; drop them where nobody sends enough messages for them."""
        try:
            until(lambda: not adversary.faults, 3.0, "not all faults are applied")
        except TimeoutError:
            adversary.faults.clear()

    @rule(faults=FAULTS)
    def attack_what_clients_get(self, faults: list[Fault]) -> None:
        self.line.inject(self.line.down, faults)
        self.wait_until_applied(self.line.down)

    @rule(faults=FAULTS)
    def attack_what_devices_publish(self, faults: list[Fault]) -> None:
        self.line.inject(self.line.up, faults)
        self.wait_until_applied(self.line.up)

    @rule()
    def deliver_late(self) -> None:
        self.line.deliver_late()

    @rule(client=st.integers(0, 3), chosen=st.lists(NUMBERS, min_size=1, max_size=20))
    def replay(self, client: int, chosen: list[int]) -> None:
        self.line.replay(client, chosen)

    @rule()
    def cut(self) -> None:
        self.line.cut()

    @rule()
    def kill_the_aggregator(self) -> None:
        self.aggregator.kill()
        self.aggregator.start()

    @invariant()
    def everybody_lives(self) -> None:
        if hasattr(self, "devices"):
            assert self.aggregator.alive, self.aggregator.log.read_text()
            assert [device.ended for device in self.devices if device.ended is not None] == []

    def teardown(self) -> None:
        if not hasattr(self, "devices"):
            return
        try:
            self._end_well()
        finally:
            for device in self.devices:
                device.service.request_stop("the test is over")
            if self.aggregator.alive:
                self.aggregator.kill()
            self.line.close()
            self.broker.stop()

    def _end_well(self) -> None:
        """The attack ends: the federation goes on, and all come to the same digest."""
        self.line.become_honest()
        before, accepted = self.version, [device.core.state.accepted for device in self.devices]
        until(
            lambda: (
                self.version >= before + 3
                and all(
                    device.core.state.accepted > count for device, count in zip(self.devices, accepted, strict=True)
                )
            ),
            WITHIN_S,
            "the federation does not go on",
        )
        administration.change_state(self.aggregator.folder, "pause", "test")
        until(self.at_rest, WITHIN_S, "not all come to the same version")
        self.everybody_lives()
        for device in self.devices:
            device.stop()
        assert self.aggregator.terminate() == 0
        assert "Traceback" not in self.aggregator.log.read_text()
        with closing(sqlite3.connect(self.aggregator.folder / LEDGER)) as db:
            twice = db.execute("SELECT 1 FROM updates GROUP BY device, base HAVING count(*) > 1").fetchall()
            counted = db.execute("SELECT sum(updates) FROM versions").fetchone()
            merged = db.execute("SELECT count(*) FROM updates WHERE merged IS NOT NULL").fetchone()
        assert (twice, counted) == ([], merged)
        # of now: a last update may have been accepted after the look above
        accepted_by_devices = sum(device.core.state.accepted for device in self.devices)
        assert accepted_by_devices <= self.status()["counts"]["accepted"]


ABOUT: dict[str, Any] = {
    "stateful_step_count": 8,
    "phases": [Phase.explicit, Phase.generate],  # to shrink what real time was part of is to look for another failure
    "suppress_health_check": list(HealthCheck),
}
TestByzantineProxy = in_every_run(ByzantineServices, max_examples=2, **ABOUT)
TestByzantineProxyAtLength = at_length(ByzantineServices, max_examples=20, **ABOUT)
