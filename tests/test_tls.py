"""A broker with TLS as `broker init` makes it: attacks from the network, and a federation over it."""

import fcntl
import gc
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from support.brokers import WITHIN_S, Inbox
from ternbus.broker.errors import LinkError
from ternbus.broker.link.events import Arrived, Connected, Published
from ternbus.broker.link.link import Link
from ternbus.broker.link.tls import Tls
from ternbus.broker.server import certificates, nats, nats_streams, tls_service
from ternbus.broker.server.certificates import Authority
from ternbus.broker.server.directory import BrokerDirectory, Credentials
from ternbus.broker.server.running import Engine, RunningBroker, choose, reserve, start

pytestmark = [
    pytest.mark.slow,
    # paho leaves the socket of a handshake that fails to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]
LAB, OTHER = "ternbus/1/lab", "ternbus/1/other"


@dataclass(frozen=True, kw_only=True)
class Bus:
    """A running broker with two federations, and what its members have in hand."""

    home: BrokerDirectory
    broker: RunningBroker
    folder: Path

    def tls_of(self, issued: Credentials, name: str) -> Tls:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file, text in (("ca", issued.authority), ("certificate", issued.certificate), ("key", issued.key)):
            (folder / file).write_text(text)
            (folder / file).chmod(0o600)
        return Tls(ca=folder / "ca", certificate=folder / "certificate", key=folder / "key")

    def member(self, name: str, federation: str = "lab") -> Tls:
        return self.tls_of(self.home.issue(name, federation), name)

    def kept(self, name: str) -> Tls:
        """The certificate and key that a member was given first."""
        folder = self.folder / name
        return Tls(ca=folder / "ca", certificate=folder / "certificate", key=folder / "key")

    @contextmanager
    def linked(self, name: str, tls: Tls | None = None, *, root: str = LAB) -> Iterator[tuple[Link, Inbox]]:
        inbox = Inbox()
        link = Link(self.broker.url, client_id=name, username=name, deliver=inbox.put, tls=tls or self.kept(name))
        link.connect(f"{root}/up/{name}/status", b"offline")
        inbox.next(Connected)
        try:
            yield link, inbox
        finally:
            link.disconnect(flush_s=0.0)

    def address(self) -> tuple[str, int]:
        return self.broker.endpoint.host, self.broker.endpoint.port

    def shown(self) -> int:
        """The serial number of the certificate that the broker shows now."""
        context = self.kept("pi-1").context()
        with (
            socket.create_connection(self.address(), timeout=WITHIN_S) as plain,
            context.wrap_socket(plain, server_hostname=self.broker.endpoint.host) as secured,
        ):
            shown: Any = secured.getpeercert()
        return int(shown["serialNumber"], 16)


@pytest.fixture(params=[Engine.MOSQUITTO, Engine.NATS], ids=str)
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    home = BrokerDirectory.create(
        tmp_path / "bus", names=["127.0.0.1", "bus.example.org"], port=0, engine=request.param
    )
    folder = tmp_path / "members"
    folder.mkdir()
    members = {name: home.issue(name, "lab") for name in ("pi-1", "pi-2", "aggregator_help_bureau", "aggregator-lab")}
    members |= {name: home.issue(name, "other") for name in ("pi-9", "aggregator-other")}
    with tls_service.start(home) as broker:
        bus = Bus(home=home, broker=broker, folder=folder)
        for name, credentials in members.items():
            bus.tls_of(credentials, name)
        yield bus


def publish(link: Link, inbox: Inbox, topic: str, payload: bytes, *, retain: bool = False) -> bool:
    """Whether the broker says that it took it; nats-server says so of what it drops."""
    link.publish(topic, payload, retain=retain)
    return isinstance(inbox.settled(), Published)


def subscribe(link: Link, inbox: Inbox, own: str, *filters: str) -> list[Arrived]:
    """Subscribe, and wait until the broker has done it: it does what one client asks for in order.

    Return what arrived meanwhile.
    """
    link.subscribe(filters)
    link.publish(own, b"")
    return [event for event in inbox.until_settled() if isinstance(event, Arrived)]


def awaited(look: Callable[[], bool]) -> None:
    """Wait until a running broker has taken up what was written for it."""
    deadline = time.monotonic() + WITHIN_S
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # between two looks


def test_the_members_of_a_federation_talk_over_tls_1_3(bus: Bus) -> None:
    with bus.linked("aggregator-lab") as (aggregator, heard), bus.linked("pi-1") as (device, inbox):
        subscribe(device, inbox, f"{LAB}/up/pi-1/offer", f"{LAB}/down/pi-1/#", f"{LAB}/all/head")
        subscribe(aggregator, heard, f"{LAB}/down/x/receipt", f"{LAB}/up/#")
        assert publish(device, inbox, f"{LAB}/up/pi-1/update", b"update")
        assert heard.until(Arrived).payload == b"update"
        aggregator.publish(f"{LAB}/all/head", b"head", retain=True)
        aggregator.publish(f"{LAB}/down/pi-1/receipt", b"receipt")
        assert {inbox.next(Arrived).payload for _ in range(2)} == {b"head", b"receipt"}


def test_what_nats_server_keeps_for_devices_that_are_away_is_bounded(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """By its authorization service's user, the only one that may."""
    assert [record.message for record in caplog.get_records("setup")] == []
    if bus.broker.software.engine is Engine.NATS:
        port = nats.own_port(bus.broker.directory, bus.broker.pid)
        assert port is not None
        nats_streams.bound(port, lambda _: {"verbose": False})  # a user without a name
        assert "without a bound" in caplog.text


def test_without_a_certificate_nobody_comes_in(bus: Bus) -> None:
    only_ca = Tls(ca=bus.kept("pi-1").ca)
    with pytest.raises(LinkError), bus.linked("pi-1", only_ca):
        pass


def test_a_foreign_authoritys_certificate_lets_nobody_in(bus: Bus, tmp_path: Path) -> None:
    forged = Authority.create("Ternbus broker 127.0.0.1").client("pi-1", "lab")
    for name, text in (("certificate", forged.certificate), ("key", forged.key)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    tls = Tls(ca=bus.kept("pi-1").ca, certificate=tmp_path / "certificate", key=tmp_path / "key")
    with pytest.raises(LinkError), bus.linked("pi-1", tls):
        pass


def test_an_expired_certificate_lets_nobody_in(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "CLIENT_DAYS", -1)
    with pytest.raises(LinkError), bus.linked("late", bus.member("late")):
        pass


def test_a_device_believes_no_broker_of_another_authority(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text(Authority.create("Ternbus broker 127.0.0.1").pair.certificate)
    mine = bus.kept("pi-1")
    tls = Tls(ca=tmp_path / "ca", certificate=mine.certificate, key=mine.key)
    with pytest.raises(LinkError, match="the broker's certificate is not trusted"), bus.linked("pi-1", tls):
        pass
    gc.collect()  # see pytestmark: here, not in another test


def test_tls_1_2_is_not_spoken(bus: Bus) -> None:
    context = bus.kept("pi-1").context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(bus.address(), timeout=WITHIN_S) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol.version|unsupported protocol"),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_without_tls_nothing_is_spoken(bus: Bus) -> None:
    with pytest.raises(LinkError, match="the port is for MQTT with TLS; use mqtts://"):
        Link(f"mqtt://127.0.0.1:{bus.address()[1]}", client_id="pi-1", deliver=Inbox().put).connect("a", b"")


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_broker_without_tls_is_named_to_a_client_with_tls(engine: Engine, tmp_path: Path) -> None:
    with (
        start(choose(engine), host="127.0.0.1", port=0, directory=tmp_path) as plain,
        pytest.raises(LinkError, match=r"the port is (for MQTT without TLS|not for TLS)"),
    ):
        Link(f"mqtts://127.0.0.1:{plain.endpoint.port}", client_id="pi-1", deliver=Inbox().put).connect("a", b"")
    gc.collect()


def test_nobody_takes_over_anothers_session(bus: Bus) -> None:
    """nats-server refuses the connection; mosquitto takes the certificate's name for the client id."""
    with bus.linked("pi-1") as (device, inbox), bus.linked("aggregator-lab") as (aggregator, heard):
        subscribe(device, inbox, f"{LAB}/up/pi-1/offer", f"{LAB}/down/pi-1/#")
        publish(aggregator, heard, f"{LAB}/down/pi-1/receipt", b"before")
        before = inbox.next(Arrived)
        device.acknowledge([before.token])
        assert before.payload == b"before"
        with suppress(LinkError), bus.linked("pi-1", bus.kept("pi-2")) as (intruder, loot):
            subscribe(intruder, loot, f"{LAB}/up/pi-2/offer", f"{LAB}/down/pi-1/#")
            publish(aggregator, heard, f"{LAB}/down/pi-1/receipt", b"during")
            assert loot.arrivals_within(1, timeout_s=0.3) == []
            assert inbox.next(Arrived).payload == b"during"
        assert device.connected
        publish(aggregator, heard, f"{LAB}/down/pi-1/receipt", b"after")
        assert inbox.next(Arrived).payload == b"after"


def test_a_device_writes_nowhere_but_to_its_own_topics(bus: Bus) -> None:
    with (
        bus.linked("aggregator-lab") as (lab, heard),
        bus.linked("aggregator-other", root=OTHER) as (other, overheard),
        bus.linked("pi-1") as (device, inbox),
    ):
        subscribe(lab, heard, f"{LAB}/down/x/receipt", f"{LAB}/up/#", f"{LAB}/all/#")
        subscribe(other, overheard, f"{OTHER}/down/x/receipt", f"{OTHER}/up/#", f"{OTHER}/all/#")
        for topic in (
            f"{LAB}/up/pi-2/update", f"{LAB}/all/head", f"{LAB}/all/delta/0/0", f"{LAB}/down/pi-2/receipt",
            f"{LAB}/down/pi-1/receipt", f"{OTHER}/up/pi-1/update", f"{OTHER}/all/head", f"{LAB}/up/update", "elsewhere",
        ):  # fmt: skip
            publish(device, inbox, topic, b"forged")
        assert publish(device, inbox, f"{LAB}/up/pi-1/update", b"mine")
        arrived = heard.until(Arrived)
        assert (arrived.topic, arrived.payload) == (f"{LAB}/up/pi-1/update", b"mine")
        assert overheard.arrivals_within(1, timeout_s=0.3) == []


def test_a_device_retains_nothing_below_its_name_but_the_protocols_topics(bus: Bus) -> None:
    """Or it fills the broker's memory, a megabyte a topic; and what a stranger to the protocol writes is refused."""
    beyond = [
        f"{LAB}/up/pi-1",
        *(f"{LAB}/up/pi-1/{rest}" for rest in ("a", "update/0", "status/a", "a/b/c", "statuses")),
    ]
    own = [f"{LAB}/up/pi-1/{kind}" for kind in ("enroll", "metrics", "offer", "status", "update")]
    with bus.linked("pi-1") as (device, inbox):
        for topic in beyond:
            publish(device, inbox, topic, bytes(1000), retain=True)
        for topic in own:
            assert publish(device, inbox, topic, b"mine", retain=True)
    with bus.linked("aggregator-lab") as (aggregator, heard):
        found = heard.stored(aggregator, own)
        assert {arrived.payload for arrived in found.values()} == {b"mine"}
        kept = subscribe(aggregator, heard, f"{LAB}/down/x/receipt", f"{LAB}/up/#", *beyond[:7])
        kept += heard.arrivals_within(99, timeout_s=0.5)
        assert {arrived.topic for arrived in kept} - {f"{LAB}/up/aggregator-lab/status"} <= set(own)
    bus.broker.stop()
    (row,) = [
        row
        for row in json.loads((bus.home.folder / "refusals.json").read_text())["refused"]
        if (row["client"], row["reason"]) == ("pi-1", "write-denied")
    ]
    assert row["count"] == len(beyond)


def test_an_aggregator_retains_nothing_but_the_protocols_topics(bus: Bus) -> None:
    beyond = [f"{LAB}/all/{rest}" for rest in ("a", "head/a", "delta/0", "delta/0/0/0")] + [f"{LAB}/down/pi-1/a"]
    own = [f"{LAB}/all/{rest}" for rest in ("head", "status", "delta/31/0", "snapshot/1/65534")]
    with bus.linked("aggregator-lab") as (aggregator, heard):
        for topic in beyond:
            publish(aggregator, heard, topic, bytes(1000), retain=True)
        for topic in own:
            assert publish(aggregator, heard, topic, b"ours", retain=True)
    with bus.linked("pi-1") as (device, inbox):
        found = inbox.stored(device, own)
        assert {arrived.payload for arrived in found.values()} == {b"ours"}
        kept = subscribe(device, inbox, f"{LAB}/up/pi-1/offer", f"{LAB}/all/#", f"{LAB}/down/pi-1/#")
        kept += inbox.arrivals_within(99, timeout_s=0.5)
        assert {arrived.topic for arrived in kept} <= set(own)


def test_a_device_reads_nothing_but_what_is_for_it_and_for_all(bus: Bus) -> None:
    with bus.linked("aggregator-lab") as (lab, heard), bus.linked("aggregator-other", root=OTHER) as (other, theirs):
        publish(other, theirs, f"{OTHER}/all/head", b"of others", retain=True)
        with bus.linked("pi-2") as (device, inbox):
            greedy = [f"{LAB}/down/pi-1/#", f"{LAB}/up/#", f"{LAB}/down/+/receipt", f"{OTHER}/all/head", "#"]
            found = subscribe(device, inbox, f"{LAB}/up/pi-2/offer", *greedy, f"{LAB}/down/pi-2/#")
            publish(lab, heard, f"{LAB}/down/pi-1/receipt", b"for pi-1")
            publish(lab, heard, f"{LAB}/down/pi-2/receipt", b"for pi-2")
            while b"for pi-2" not in {each.payload for each in found}:
                found.append(inbox.next(Arrived))
            found += inbox.arrivals_within(9, timeout_s=0.5)
        allowed = (f"{LAB}/all/", f"{LAB}/down/pi-2/")
        assert [each.topic for each in found if not each.topic.startswith(allowed)] == []


def test_an_aggregator_rules_only_its_own_federation(bus: Bus) -> None:
    with bus.linked("aggregator-other", root=OTHER) as (intruder, loot), bus.linked("pi-1") as (device, inbox):
        subscribe(device, inbox, f"{LAB}/up/pi-1/offer", f"{LAB}/down/pi-1/#", f"{LAB}/all/head")
        subscribe(intruder, loot, f"{OTHER}/down/x/receipt", f"{LAB}/up/#")
        publish(intruder, loot, f"{LAB}/all/head", b"forged", retain=True)
        publish(intruder, loot, f"{LAB}/down/pi-1/receipt", b"forged")
        publish(device, inbox, f"{LAB}/up/pi-1/update", b"secret")
        assert inbox.arrivals_within(1, timeout_s=0.3) == []
        assert loot.arrivals_within(1, timeout_s=0.3) == []


def test_who_gets_a_certificate_may_come_in_while_the_broker_runs(bus: Bus) -> None:
    tls = bus.member("pi-3")
    with bus.linked("aggregator-lab") as (aggregator, heard), bus.linked("pi-3", tls) as (device, inbox):
        subscribe(aggregator, heard, f"{LAB}/down/x/receipt", f"{LAB}/up/pi-3/#")
        awaited(lambda: publish(device, inbox, f"{LAB}/up/pi-3/update", b"here"))
        assert heard.until(Arrived).payload == b"here"


def test_a_renewal_breaks_nobody(bus: Bus) -> None:
    old = bus.shown()
    with bus.linked("pi-2") as (device, inbox):
        changed = bus.home.renew(everything=True)
        assert {file.name for file in changed} >= {"server.pem", "pi-1.pem", "aggregator-lab.pem"}
        awaited(lambda: bus.shown() != old)
        if bus.broker.software.engine is Engine.MOSQUITTO:  # nats-server disconnects everybody once
            assert publish(device, inbox, f"{LAB}/up/pi-2/update", b"still here")
    with bus.linked("pi-2"):  # with what it was given at first
        pass
    before = bus.kept("pi-2")
    with bus.linked("pi-2", Tls(ca=before.ca, certificate=bus.home.issued("pi-2"), key=before.key)):
        pass


def test_a_flood_of_refused_publications_is_counted_to_the_last_and_fills_no_disk(bus: Bus) -> None:
    flood = 2000
    with bus.linked("pi-1") as (device, inbox):
        for _ in range(flood):
            publish(device, inbox, f"{LAB}/up/pi-2/update", b"forged")
    bus.broker.stop()
    (row,) = json.loads((bus.home.folder / "refusals.json").read_text())["refused"]
    assert (row["client"], row["reason"], row["count"]) == ("pi-1", "write-denied", flood)
    assert row["detail"] == f"{LAB}/up/pi-2/update"
    denied = [line for line in bus.broker.last_lines(10**6).splitlines() if "pi-2" in line]
    assert len(denied) == 4  # the first, tenth, hundredth, thousandth


def test_nats_own_port_lets_nobody_in(bus: Bus) -> None:
    if bus.broker.software.engine is not Engine.NATS:
        pytest.skip("mosquitto has none")
    port = nats.own_port(bus.home.folder, bus.broker.pid)
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S) as trial, trial.makefile("rwb") as stream:
        stream.readline()
        stream.write(b'CONNECT {"verbose":false}\r\nSUB > 1\r\nPING\r\n')
        stream.flush()
        assert stream.readline().startswith(b"-ERR 'Authorization Violation'")


# A broker that others run: TLS for the broker only, and passwords.


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(its URL, its authority's certificate) of a nats-server whose users `us` and `pi` have a password."""
    folder, port = tmp_path / "foreign", reserve("127.0.0.1", 0)
    folder.mkdir()
    authority = Authority.create("Somebody")
    pair = authority.server(["127.0.0.1"])
    (folder / "server.pem").write_text(pair.certificate + pair.key)
    users = '{user: us, password: "correct horse"}, {user: pi, password: "correct horse"}'
    text = nats.configuration(host="127.0.0.1", port=port, data=folder).replace(
        "mqtt {",
        f'authorization {{ users: [{users}] }}\nmqtt {{\n  tls {{cert_file: "server.pem", key_file: "server.pem"}}',
    )
    (folder / "nats.conf").write_text(text)
    command = [str(nats.find()), "-c", "nats.conf"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while "Server is ready" not in process.stderr.readline():
                assert process.poll() is None
            yield f"mqtts://127.0.0.1:{port}", authority.pair.certificate
        finally:
            process.kill()


def test_passwords_open_a_broker_that_others_run(foreign: tuple[str, str], tmp_path: Path) -> None:
    url, ca = foreign
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "ca.pem").write_text(ca)
    (tmp_path / "password").write_text("correct horse\n")
    (tmp_path / "password").chmod(0o600)
    run_all(tmp_path, command("edge", "init-model", "digits-numpy", "model.safetensors"))
    login = ["--password-file", "password", "--username"]
    init = ["aggregator", "init", "agg", "--federation", "lab", "--broker", url, "--model", "model.safetensors"]
    said_by(tmp_path, *init, "--tls", "trust", *login, "us")
    said_by(tmp_path, "aggregator", "invite", "agg", "pi-1", "--out", ".")
    with subprocess.Popen(command("aggregator", "run", "agg"), cwd=tmp_path, env=environment()) as aggregator:
        try:
            run_all(tmp_path, command("edge", "join", "pi-1.toml", "pi-1", "--task", "digits-numpy", *login, "pi"))
            run_all(tmp_path, command("edge", "run", "pi-1", "--versions", "1"))
        finally:
            aggregator.terminate()
    assert aggregator.returncode == 0
    (tmp_path / "password").write_text("wrong\n")
    assert "Not authorized" in said_by(tmp_path, "edge", "leave", "pi-1", "--yes", code=1)


# A whole federation, with the commands that people type.


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ternbus", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_all(folder: Path, *commands: list[str]) -> None:
    """Run commands side by side; each must end well."""
    running = [
        subprocess.Popen(
            each, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for each in commands
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=90)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()


def said_by(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done
    return done.stderr if code else done.stdout


def test_a_broker_by_hand(tmp_path: Path) -> None:
    init = ["broker", "init", "bus", "--name", "127.0.0.1", "--port", "0"]
    assert "next: ternbus broker up bus" in said_by(tmp_path, *init)
    assert said_by(tmp_path, *init, code=2).endswith("already contains a broker; choose another directory\n")
    assert "run: ternbus broker up bus" in said_by(tmp_path, "broker", "refusals", "bus", code=2)
    assert "has no broker with TLS" in said_by(tmp_path, "broker", "refusals", "nowhere", code=2)
    up = command("broker", "up", "bus", "--json")
    with subprocess.Popen(up, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["url"].startswith("mqtts://127.0.0.1:")
            issue = ["broker", "certificate", "bus", "aggregator-lab", "pi-1", "--federation", "lab"]
            issue += ["--out", "certificates"]
            assert said_by(tmp_path, *issue) == "certificates/aggregator-lab\ncertificates/pi-1\n"
            assert said_by(tmp_path, "broker", "renew", "bus").endswith("tls/server.pem\n")
            process.send_signal(signal.SIGTERM)
            assert process.wait(WITHIN_S) == 0
        finally:
            process.kill()
    found = json.loads(said_by(tmp_path, "broker", "status", "bus", "--json"))["certificates"]
    assert {(row["name"], row["federation"], row["days_left"] > 360) for row in found} >= {
        ("127.0.0.1", "", True),
        ("aggregator-lab", "lab", True),
        ("pi-1", "lab", True),
    }
    assert "pi-1" in said_by(tmp_path, "broker", "status", "bus")
    assert said_by(tmp_path, "broker", "refusals", "bus").endswith(": 0 refused\n")
    assert "--host and --port do not apply to a broker with TLS" in said_by(
        tmp_path, "broker", "up", "bus", "--port", "1", code=2
    )
    (tmp_path / "bus" / "tls" / "ca.key").chmod(0o644)
    assert "run: chmod 600" in said_by(tmp_path, "broker", "up", "bus", code=2)


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_killed_broker_up_leaves_a_whole_log_and_a_free_place(engine: Engine, tmp_path: Path) -> None:
    BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0, engine=engine)
    up = command("broker", "up", "bus")
    for _ in range(2):  # at once: the second waits for the broker of the first
        with subprocess.Popen(up, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert b"ready on mqtts://" in process.stdout.readline()
            process.kill()
    lock = (tmp_path / "bus" / "lock").open("wb")
    awaited(lambda: is_free(lock))
    lock.close()
    assert said_by(tmp_path, "broker", "refusals", "bus").endswith(": 0 refused\n")
    if engine is Engine.NATS:  # mosquitto says nothing of its end at this level
        assert "Server Exiting" in (tmp_path / "bus" / "broker.log").read_text()


def is_free(lock: IO[bytes]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def join(name: str, partition: str) -> list[str]:
    options = ["--task", "digits-numpy", "--partition", partition]
    return command("edge", "join", f"home/invitations/{name}.toml", name, *options)


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_federation_over_tls_takes_no_more_commands_than_one_without(engine: Engine, tmp_path: Path) -> None:
    run_all(tmp_path, command("edge", "init-model", "digits-numpy", "model.safetensors"))
    options = ["--tls", "--port", "0", "--engine", engine, "--model", "model.safetensors"]
    invite = ["--invite", "pi-1", "--invite", "pi-2"]
    start = command("aggregator", "up", "home", *options, *invite)
    with subprocess.Popen(start, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as aggregator:
        try:
            assert aggregator.stderr is not None
            said = [aggregator.stderr.readline() for _ in range(3)]
            assert "ready on mqtts://127.0.0.1:" in said[0]
            devices = ["pi-1", "pi-2"]
            run_all(tmp_path, *(join(name, f"iid:{index}/2") for index, name in enumerate(devices)))
            run_all(tmp_path, *(command("edge", "run", name, "--versions", "3") for name in devices))
            status = subprocess.run(
                command("aggregator", "status", "home", "--json"),
                cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            aggregator.send_signal(signal.SIGTERM)
            _, complaints = aggregator.communicate(timeout=60)
        finally:
            aggregator.kill()
    found = json.loads(status.stdout)
    assert aggregator.returncode == 0, complaints
    assert "refused" not in complaints
    assert found["version"] >= 3
    assert found["counts"]["accepted"] == found["counts"]["merged"] == 6
    assert {name for name, row in found["devices"].items() if row["updates"] == 3} == {"pi-1", "pi-2"}
    secrets = [*(tmp_path / "home").rglob("*.key"), *(tmp_path / "home" / "invitations").iterdir()]
    secrets += [tmp_path / name / file for name in devices for file in ("device.key", "certificate.key", "edge.toml")]
    assert len(secrets) >= 13
    assert {file: oct(file.stat().st_mode & 0o777) for file in secrets if file.stat().st_mode & 0o077} == {}


def test_a_helper_reads_its_own_topics_and_no_update_and_no_device_reads_or_writes_a_helper_s(bus: Bus) -> None:
    user, theirs = "aggregator_help_bureau", f"{LAB}/help/bureau"
    with bus.linked("aggregator-lab") as (server, heard), bus.linked("pi-1") as (device, device_inbox):
        assert subscribe(server, heard, f"{LAB}/all/status", f"{LAB}/help/+/answer") == []
        with bus.linked(user) as (helper, inbox):
            assert publish(helper, inbox, f"{theirs}/card", b"card", retain=True)
            assert publish(server, heard, f"{theirs}/ask", b"ask", retain=True)
            for forbidden in (f"{LAB}/help/other/answer", f"{theirs}/ask", f"{LAB}/up/pi-1/status", f"{LAB}/all/head"):
                publish(helper, inbox, forbidden, b"forged", retain=True)
            for forbidden in (f"{theirs}/answer", f"{theirs}/ask", f"{LAB}/all/terms/0"):
                publish(device, device_inbox, forbidden, b"forged", retain=True)
            assert publish(server, heard, f"{LAB}/all/terms/0", b"terms", retain=True)
            assert publish(device, device_inbox, f"{LAB}/up/pi-1/status", b"status", retain=True)
            stored = inbox.stored(helper, [f"{theirs}/card", f"{theirs}/ask"])
            assert {topic: each.payload for topic, each in stored.items()} == {
                f"{theirs}/card": b"card",
                f"{theirs}/ask": b"ask",
            }
            assert subscribe(helper, inbox, f"{theirs}/status", f"{LAB}/up/pi-1/status") == []
            stored = device_inbox.stored(device, [f"{LAB}/all/terms/0"])
            assert [each.payload for each in stored.values()] == [b"terms"]
            assert subscribe(device, device_inbox, f"{LAB}/up/pi-1/offer", f"{theirs}/ask", f"{theirs}/card") == []
        assert heard.arrivals_within(1, 0.5) == []  # nobody else answered in a helper's name
