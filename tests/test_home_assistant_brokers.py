"""Home Assistant's view on real brokers: a reader with a certificate reads it, and nothing else, and writes nothing."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.brokers import WITHIN_S
from support.small_world import Device, initial_model
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import records
from ternbus.aggregator.home_assistant_settings import HomeAssistantSettings
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.service import Service
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker import cli
from ternbus.broker.errors import ConfigError
from ternbus.broker.link.link import Arrived, Connected, Link, LinkEvent, Published, Refused
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY, Tls
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.server import refusals, tls_service
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

pytestmark = pytest.mark.slow

LAB = "lab"  # the federation of `Device`
READER = "aggregator_read_ha"
CONFIGS = "homeassistant/+/+/+/config"  # as Home Assistant subscribes
VIEW = f"ternbus/1/{LAB}/view/#"
RUN = CliRunner()


def create(directory: Path, url: str, **settings: object) -> None:
    chosen: dict[str, object] = {"home_assistant.discovery_prefix": "homeassistant", "home_assistant.every_s": 1.0}
    model = initial_model()
    administration.create(directory, federation=LAB, broker=url, model=model, settings={**chosen, **settings})


def enrolled(directory: Path) -> Device:
    schema = Schema.of({name: array.shape for name, array in initial_model().items()})
    device = Device("pi", schema)
    ledger = Ledger(directory / LEDGER)
    ledger.write([records.DeviceEnrolled(device="pi", public=device.identity.public, proof=bytes(32))])
    ledger.close()
    return device


@contextmanager
def running(directory: Path) -> Iterator[Service]:
    """The aggregator, in a thread."""
    errors: list[BaseException] = []
    service = Service(directory, "ternbus test", lambda _, **__: None)

    def run() -> None:
        try:
            service.run()
        except BaseException as error:  # noqa: BLE001 - it is looked at in another thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(WITHIN_S)
    assert errors == []


@dataclass
class Client:
    """A link and the newest message of each topic that it has been sent."""

    link: Link
    events: "queue.SimpleQueue[LinkEvent]"
    filters: list[str] = field(default_factory=list)
    held: dict[str, bytes] = field(default_factory=dict)

    def subscribe(self, *filters: str) -> None:
        self.filters += filters
        self.link.subscribe(filters)

    def until(self, done: Callable[[dict[str, bytes]], object]) -> None:
        """Read what comes until something holds; nothing for a while: nats-server may lack what it was just given."""
        deadline = time.monotonic() + WITHIN_S
        while not done(self.held):
            assert time.monotonic() < deadline
            try:
                self._take(self.events.get(timeout=2.0))
            except queue.Empty:
                self.link.subscribe(self.filters)

    def given(self, *filters: str) -> list[Arrived]:
        """What the broker sends at once on these filters: it does what one client asks for in order."""
        self.link.subscribe(filters)
        self.link.publish("homeassistant/status", b"")
        found: list[Arrived] = []
        while not isinstance(event := self.events.get(timeout=WITHIN_S), Published | Refused):
            assert isinstance(event, Arrived)
            found.append(event)
        return found

    def take_rest(self) -> None:
        """What is there already."""
        with suppress(queue.Empty):
            while True:
                self._take(self.events.get_nowait())

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, Arrived):
            self.held[event.topic] = event.payload
            self.link.acknowledge([event.token])

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.held.get(topics.view(LAB, name)) or "{}")
        return found


@contextmanager
def client(url: str, name: str, tls: Tls | None = None) -> Iterator[Client]:
    events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(url, client_id=name, username=name, deliver=events.put, tls=tls)
    link.connect(f"ternbus/1/{LAB}/up/{name}/status", b"")
    assert isinstance(events.get(timeout=WITHIN_S), Connected)
    try:
        yield Client(link, events)
    finally:
        link.disconnect(flush_s=0.0)


@dataclass(frozen=True, kw_only=True)
class Home:
    """A broker with TLS, an aggregator's directory, a device, and a reader's certificate."""

    bus: BrokerDirectory
    broker: RunningBroker
    directory: Path
    device: Device
    tls: dict[str, Tls]

    @contextmanager
    def client(self, name: str) -> Iterator[Client]:
        with client(self.broker.url, name, self.tls[name]) as found:
            yield found


def tls_in(folder: Path) -> Tls:
    return Tls(ca=folder / CA, certificate=folder / CERTIFICATE, key=folder / TLS_KEY)


def admitted(bus: BrokerDirectory, out: Path, name: str) -> Tls:
    done = RUN.invoke(cli.app, ["admit", str(bus.folder), name, "--read", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert f"client id aggregator_read_{name}, for {bus.url}" in done.stdout
    return tls_in(out / name)


@pytest.fixture(params=[Engine.MOSQUITTO, Engine.NATS], ids=str)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    bus = BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0, engine=request.param)
    directory = tmp_path / "aggregator"
    create(directory, bus.url, **{"transport.authority": str(bus.folder)})
    tls = {READER: admitted(bus, tmp_path, "ha")}
    made = RUN.invoke(cli.app, ["certificate", str(bus.folder), "pi", "--federation", LAB, "--out", str(tmp_path)])
    assert made.exit_code == 0, made.output
    tls["pi"] = tls_in(tmp_path / "pi")
    with tls_service.start(bus) as broker:
        yield Home(bus=bus, broker=broker, directory=directory, device=enrolled(directory), tls=tls)


def test_a_reader_follows_a_device_until_it_is_revoked_and_the_view_is_turned_off(home: Home) -> None:
    config, state = topics.discovery("homeassistant", LAB, "pi"), topics.view(LAB, "pi")
    with home.client(READER) as reader:
        with running(home.directory):
            reader.subscribe(CONFIGS, VIEW)
            reader.until(lambda held: held.get(config) and held.get(state))
            assert json.loads(reader.held[config])["state_topic"] == state
            assert reader.state("pi")["state"] == "offline"
            with home.client("pi") as device:
                device.link.publish(home.device.topic("status"), home.device.status("training"), retain=True)
                reader.until(lambda _: reader.state("pi")["state"] == "training")
                reader.until(lambda _: reader.state("aggregator")["devices_online"] == 1)
            administration.revoke(home.directory, "pi", "test")
            reader.until(lambda held: held[config] == held[state] == b"")
        reader.until(lambda _: reader.state("aggregator")["availability"] == "offline")
        settings = administration.load_settings(home.directory)
        off = HomeAssistantSettings()
        text = configuration.dumps(replace(settings, home_assistant=off))
        (home.directory / administration.TOML).write_text(text)
        with running(home.directory):
            reader.until(lambda held: not any(held.values()))
    with running(home.directory), home.client(READER) as reader:
        assert [each for each in reader.given(CONFIGS, VIEW) if each.payload] == []


def test_a_running_broker_knows_a_new_reader_soon(home: Home, tmp_path: Path) -> None:
    with running(home.directory), home.client(READER) as reader:
        reader.subscribe(VIEW)
        reader.until(lambda _: reader.state("pi") and reader.state("aggregator"))
        tls = admitted(home.bus, tmp_path, "second")
        deadline = time.monotonic() + WITHIN_S
        while True:  # until mosquitto has read its access list again
            with client(home.broker.url, "aggregator_read_second", tls) as second:
                if any(each.payload for each in second.given(VIEW)):
                    return
            assert time.monotonic() < deadline


def test_a_reader_reads_nothing_else_and_writes_nothing(home: Home) -> None:
    """The device's status and the model are there to be read, and a device of the federation would hear the reader."""
    with running(home.directory), home.client("pi") as device, home.client(READER) as reader:
        reader.subscribe(VIEW)
        reader.until(lambda held: topics.view(LAB, "pi") in held)
        device.subscribe(topics.head(LAB), f"ternbus/1/{LAB}/down/pi/#")
        device.until(lambda held: topics.head(LAB) in held)
        device.link.publish(home.device.topic("status"), home.device.status("idle"), retain=True)
        reader.until(lambda _: reader.state("pi")["state"] == "idle")
        denied = [f"ternbus/1/{LAB}/all/#", f"ternbus/1/{LAB}/up/#", f"ternbus/1/{LAB}/down/#"]
        reader.subscribe(*denied)
        written = [
            topics.head(LAB), topics.view(LAB, "pi"), topics.discovery("homeassistant", LAB, "pi"),
            topics.down(LAB, "pi", "receipt"), topics.up(LAB, READER, "status"), "homeassistant/status",
        ]  # fmt: skip
        for topic in written:
            reader.link.publish(topic, b"forged", retain=True)
        device.link.publish(home.device.topic("status"), home.device.status("training"), retain=True)
        reader.until(lambda _: reader.state("pi")["state"] == "training")  # all that was asked before is done
        assert all(topic.startswith(f"ternbus/1/{LAB}/view/") for topic in reader.held)
        assert b"forged" not in reader.held.values()
        device.take_rest()
        assert b"forged" not in device.held.values()
    counted = home.bus.folder / refusals.FILE
    deadline = time.monotonic() + WITHIN_S
    while {row["reason"] for row in json.loads(counted.read_text())["refused"] if row["client"] == READER} != {
        "read-denied", "write-denied",
    }:  # fmt: skip
        assert time.monotonic() < deadline


def test_a_reader_of_one_federation_reads_no_state_of_another(home: Home, tmp_path: Path) -> None:
    home.bus.issue("aggregator-other", "other")
    credentials, of = home.bus.admit("neighbour", "other")
    assert of == "other"
    for name, text in (("ca", credentials.authority), ("cert", credentials.certificate), ("key", credentials.key)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    tls = Tls(ca=tmp_path / "ca", certificate=tmp_path / "cert", key=tmp_path / "key")
    with (
        running(home.directory),
        home.client(READER) as reader,
        client(home.broker.url, "aggregator_read_neighbour", tls) as neighbour,
    ):
        reader.subscribe(VIEW)
        reader.until(lambda _: reader.state("pi") and reader.state("aggregator"))
        assert neighbour.given(VIEW) == []


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS], ids=str)
def test_a_broker_without_tls_lets_it_be_read(engine: Engine, tmp_path: Path) -> None:
    with start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        directory = tmp_path / "aggregator"
        create(directory, broker.url)
        enrolled(directory)
        with running(directory), client(broker.url, "home-assistant") as reader:
            reader.subscribe(CONFIGS, VIEW)
            reader.until(lambda held: topics.discovery("homeassistant", LAB, "pi") in held and reader.state("pi"))


def test_a_reader_is_admitted_by_what_it_may_do_and_to_one_federation(tmp_path: Path) -> None:
    bus = BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0)
    command = ["admit", str(bus.folder), "ha", "--out", str(tmp_path)]
    failed = RUN.invoke(cli.app, command)
    assert isinstance(failed.exception, ConfigError)
    assert "Add --read" in str(failed.exception)
    with pytest.raises(ConfigError, match="which federation"):
        bus.admit("ha", None)
    bus.issue("aggregator-lab", "lab")
    assert bus.admit("ha", None)[1] == "lab"
    with pytest.raises(ConfigError, match="no federation 'home'; it has lab"):
        bus.admit("ha", "home")
    bus.issue("aggregator-home", "home")
    with pytest.raises(ConfigError, match="it has home, lab"):
        bus.admit("other", None)
    with pytest.raises(ConfigError, match="already in federation"):
        bus.admit("ha", "home")
    with pytest.raises(ConfigError, match="invalid reader name"):
        bus.admit("A reader", "lab")
