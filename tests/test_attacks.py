"""Every attack of the threats table in docs/security.md, against one running federation with TLS, on both brokers.

Two honest devices train all the while. Each attack is refused, with a reason where an operator looks for it; in the end
the honest ones are at the same digest as the aggregator. In the attacker's hands are: nothing; an enrolled device, its
certificate and its key; and, for what only the broker or the thief of the aggregator's certificate can do, that one.
"""

import gc
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stranger.servers import Aggregator, until
from support.brokers import Inbox
from support.noise_trainer import MODEL
from support.shell_device import WITHIN_S, Device, tls_of
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import status as aggregator_status
from ternbus.broker import cli
from ternbus.broker.errors import LinkError
from ternbus.broker.link.events import Arrived, Connected
from ternbus.broker.link.link import Link, LinkEvent
from ternbus.broker.link.tls import Tls
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity, enroll_proof
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Enroll, Receipt, Status, Update
from ternbus.broker.protocol.model_messages import Delta, Head
from ternbus.broker.server import tls_service
from ternbus.broker.server.certificates import Authority
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.refusals import NO_NAME
from ternbus.broker.server.running import Engine

pytestmark = [
    pytest.mark.slow,
    # paho leaves the socket of a handshake that fails to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]
LAB = "lab"
HONEST = ("honest-1", "honest-2")
SETTINGS: dict[str, object] = {
    "merge.buffer_size": 2,
    "merge.max_wait_s": 2,
    "downlink.slots": 32,
    "downlink.codec": "float32",
    "limits.frame_bytes": 4096,  # a snapshot has two parts
}


class Siege:
    """The federation, and what its attacker has."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        self.bus = BrokerDirectory.create(folder / "bus", names=["127.0.0.1"], port=0, engine=engine)
        self.broker = tls_service.start(self.bus)
        save_safetensors(folder / "model.safetensors", MODEL, {})
        self.aggregator = Aggregator(
            folder / "aggregator",
            federation=LAB,
            broker=self.bus.folder,
            model=folder / "model.safetensors",
            settings=SETTINGS,
        )
        self.aggregator.start()
        names = (*HONEST, "late", "rogue", "guest")
        self.invitations = {each.device: each for each in administration.invite(self.aggregator.folder, *names)}
        self.honest = [Device(folder / name, self.invitations[name]) for name in HONEST]
        self.rogue = Identity.generate()
        self.tls = {name: self.tls_of(name) for name in ("rogue", "guest")}
        home = self.aggregator.folder
        self.tls["aggregator-lab"] = Tls(
            ca=home / "ca.pem", certificate=home / "certificate.pem", key=home / "certificate.key"
        )
        self.seq = 0
        until(lambda: self.version >= 2, WITHIN_S, "no version")
        with self.linked("rogue") as (link, inbox):
            assert self.enroll(link, inbox, self.invitations["rogue"], self.rogue).outcome == "enrolled"
            link.subscribe([topics.head(LAB)])
            self.old_head = self.next(inbox, topics.head(LAB))

    def tls_of(self, name: str) -> Tls:
        folder = self.folder / f"stolen-{name}"
        folder.mkdir()
        tls = tls_of(folder, self.invitations[name])
        assert tls is not None
        return tls

    @property
    def version(self) -> int:
        return int(self.status()["version"])

    def status(self) -> dict[str, Any]:
        return aggregator_status.read(self.aggregator.folder)

    def refused(self, reason: str) -> int:
        """How often the aggregator says that it refused something for this reason."""
        administration.flush_counts(self.aggregator.folder)
        return int(self.status()["counts"]["invalid"].get(reason, 0))

    def dropped(self, reason: str) -> list[int]:
        return [device.core.dropped[reason] for device in self.honest]

    def until_counted(self, reason: str, before: list[int]) -> None:
        """Wait until each honest device has counted one more refusal for this reason."""
        until(
            lambda: all(now > then for now, then in zip(self.dropped(reason), before, strict=True)),
            WITHIN_S,
            f"no {reason} counted",
        )

    def address(self) -> tuple[str, int]:
        return self.broker.endpoint.host, self.broker.endpoint.port

    def turned_away(self) -> dict[tuple[str, str], int]:
        """What the broker's operator is shown of what it refused: how often, by client and reason."""
        shown = CliRunner().invoke(cli.app, ["refusals", str(self.bus.folder), "--json"])
        assert shown.exit_code == 0, shown.output
        return {(row["client"], row["reason"]): row["count"] for row in json.loads(shown.stdout)["refused"]}

    def denied(self, client: str) -> tuple[int, int]:
        """(what it asked to read, what it wrote) that was not its own."""
        found = self.turned_away()
        return found.get((client, "read-denied"), 0), found.get((client, "write-denied"), 0)

    def turns_away(self, client: str, reason: str, attack: Callable[[], object]) -> None:
        """Attack until the broker's operator is shown that this client was refused for this reason.

        Of a handshake mosquitto says something only where it still finds the connection there, so not each time.
        """
        before = self.turned_away().get((client, reason), 0)

        def counted() -> bool:
            attack()
            return self.turned_away().get((client, reason), 0) > before

        until(counted, WITHIN_S, f"no {reason} of {client} was counted")

    @contextmanager
    def linked(self, name: str, tls: Tls | None = None, client_id: str | None = None) -> Iterator[tuple[Link, Inbox]]:
        inbox = Inbox()

        def deliver(event: LinkEvent) -> None:
            inbox.put(event)
            if isinstance(event, Arrived):
                link.acknowledge([event.token])

        link = Link(
            self.bus.url, client_id=client_id or name, username=name, deliver=deliver, tls=tls or self.tls[name]
        )
        topic = topics.status(LAB) if name.startswith(AGGREGATOR) else topics.up(LAB, name, "status")
        link.connect(topic, b"gone")
        inbox.until(Connected)
        try:
            yield link, inbox
        finally:
            link.disconnect(flush_s=5.0)

    def next(self, inbox: Inbox, topic: str) -> bytes:
        while True:
            event = inbox.until(Arrived)
            if event.topic == topic and event.payload:
                return event.payload

    def frame(self, kind: str, meta: Any, *, key: Identity | None = None, **about: Any) -> bytes:
        """Signed by the rogue unless somebody else is named; right but for what is asked for."""
        self.seq += 1
        whole = {"federation": LAB, "sender": "rogue", "seq": self.seq, **about}
        return build(key or self.rogue, kind=kind, meta=meta, **whole)

    def enroll(self, link: Link, inbox: Inbox, invitation: Invitation, key: Identity) -> Receipt:
        name = invitation.device
        link.subscribe([topics.down(LAB, name, "#")])
        proof = enroll_proof(invitation.code, LAB, name, key.public)
        about = {"sender": name, "body": proof}
        link.publish(
            topics.up(LAB, name, "enroll"), self.frame("enroll", Enroll(public_key=key.public).meta(), key=key, **about)
        )
        while True:
            receipt = Receipt.from_meta(parse(self.next(inbox, topics.down(LAB, name, "receipt"))).meta)
            if receipt.device_key == key.key_id:
                return receipt

    def steal_the_aggregators_place(self, *messages: tuple[str, bytes]) -> None:
        """With its certificate, which is no key that signs: say this, retained, and be thrown out again."""
        with self.linked("aggregator-lab") as (link, _):
            for topic, payload in messages:
                link.publish(topic, payload, retain=True)

    def named_parts(self) -> dict[str, bytes]:
        """The parts, by topic, of the snapshot that the head names: there may be another, at which nobody looks."""
        with self.linked("rogue") as (link, inbox):
            head, held, named = topics.head(LAB), dict[str, bytes](), list[str]()

            def gathered() -> bool:
                """Asks again: nats-server does not always give all that it holds."""
                link.subscribe([head, *(topics.snapshot(LAB, place, part) for place in (0, 1) for part in (0, 1))])
                held.update((event.topic, event.payload) for event in inbox.rest() if isinstance(event, Arrived))
                if head in held:
                    snapshot = Head.from_meta(parse(held[head]).meta).snapshot
                    named[:] = [topics.snapshot(LAB, snapshot.place, part) for part in range(snapshot.parts)]
                return head in held and held.keys() >= set(named)

            until(gathered, WITHIN_S, "no snapshot")
            return {topic: held[topic] for topic in named}

    def honest_go_on(self, versions: int = 2) -> None:
        before = [device.core.state.accepted for device in self.honest]
        until(
            lambda: all(
                device.core.state.accepted >= b + versions for device, b in zip(self.honest, before, strict=True)
            ),
            WITHIN_S,
            "the honest devices are held up",
        )
        assert [device.ended for device in self.honest] == [None, None]
        assert self.aggregator.alive

    def close(self) -> None:
        for device in self.honest:
            device.service.request_stop("the test is over")
        if self.aggregator.alive:
            self.aggregator.kill()
        self.broker.stop()


@pytest.fixture(scope="module", params=[Engine.MOSQUITTO, Engine.NATS], ids=str)
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    made = Siege(tmp_path_factory.mktemp("attacked"), request.param)
    yield made
    made.close()


def until_more(count: Callable[[], int], before: int, what: str) -> None:
    until(lambda: count() > before, WITHIN_S, what)


# Connections to the broker


def test_without_a_certificate_or_with_a_foreign_one_nobody_comes_in(siege: Siege, tmp_path: Path) -> None:
    forged = Authority.create("Ternbus broker 127.0.0.1").client("rogue", LAB)
    (tmp_path / "certificate").write_text(forged.certificate)
    (tmp_path / "key").write_text(forged.key)
    (tmp_path / "key").chmod(0o600)
    ca = siege.tls["rogue"].ca
    foreign = Tls(ca=ca, certificate=tmp_path / "certificate", key=tmp_path / "key")
    for tls, reason in ((Tls(ca=ca), "no-certificate"), (foreign, "bad-certificate")):

        def attack(tls: Tls = tls) -> None:
            with pytest.raises(LinkError), siege.linked("rogue", tls):
                pass

        siege.turns_away(NO_NAME, reason, attack)
    gc.collect()  # see pytestmark
    siege.honest_go_on(1)


def test_tls_1_2_is_refused(siege: Siege) -> None:
    context = siege.tls["rogue"].context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def attack() -> None:
        with (
            socket.create_connection(siege.address(), timeout=WITHIN_S) as plain,
            pytest.raises(ssl.SSLError, match=r"(?i)protocol.version|unsupported protocol"),
        ):
            context.wrap_socket(plain, server_hostname="127.0.0.1")

    siege.turns_away(NO_NAME, "old-tls", attack)


def test_anothers_topics_are_neither_read_nor_written(siege: Siege) -> None:
    turned_away = siege.denied("rogue")
    with siege.linked("rogue") as (link, inbox):
        foreign = f"{topics.root(LAB)}/up/#", topics.down(LAB, HONEST[0], "#"), "#", f"{topics.root(LAB)}/down/+/#"
        for each in (*foreign, topics.head(LAB)):
            link.subscribe([each])
        before = siege.refused("bad-signature"), siege.refused("unknown-key")
        about = Update(base=siege.version, samples=1, codec="ternary", encoding="raw", sealed=False, metrics={})
        forged = siege.frame("update", about.meta(), sender=HONEST[0], body=b"forged")
        anothers = topics.up(LAB, HONEST[0], "update"), topics.head(LAB), topics.down(LAB, HONEST[0], "receipt")
        for topic in anothers:
            link.publish(topic, forged, retain=True)
        expected = turned_away[0] + len(foreign), turned_away[1] + len(anothers)
        until(lambda: siege.denied("rogue") == expected, WITHIN_S, f"not counted: {siege.denied('rogue')}")
        siege.honest_go_on()
        heard = [event.topic for event in inbox.rest() if isinstance(event, Arrived)]
    assert topics.head(LAB) in heard  # it does hear what is for all
    allowed = (f"{topics.root(LAB)}/all/", topics.down(LAB, "rogue", ""))
    assert [topic for topic in heard if not topic.startswith(allowed)] == []
    assert (siege.refused("bad-signature"), siege.refused("unknown-key")) == before  # nothing of it came through
    assert siege.dropped("wrong-topic") == [0, 0]


def test_nobody_takes_over_anothers_session(siege: Siege) -> None:
    losses = [sum(log.event == "disconnected" for log in device.logs) for device in siege.honest]
    # nats-server keeps it out; mosquitto lets it in under its own name, where it may not read
    reason = "wrong-client-id" if siege.bus.settings().engine is Engine.NATS else "read-denied"

    def attack() -> None:
        with suppress(LinkError), siege.linked("rogue", client_id=HONEST[0]) as (link, inbox):
            link.subscribe([topics.down(LAB, HONEST[0], "#")])
            siege.honest_go_on(1)
            heard = [event.topic for event in inbox.rest() if isinstance(event, Arrived)]
            assert [topic for topic in heard if f"/{HONEST[0]}/" in topic] == []

    siege.turns_away("rogue", reason, attack)
    siege.honest_go_on(1)
    assert [sum(log.event == "disconnected" for log in device.logs) for device in siege.honest] == losses


# What an enrolled device says


def test_what_was_signed_for_another_federation_is_refused(siege: Siege) -> None:
    before = siege.refused("wrong-federation")
    with siege.linked("rogue") as (link, _):
        status = Status(state="idle", session=1)
        link.publish(topics.up(LAB, "rogue", "status"), siege.frame("status", status.meta(), federation="other"))
        until_more(lambda: siege.refused("wrong-federation"), before, "not counted")


def test_a_status_of_an_old_session_is_refused(siege: Siege) -> None:
    before = siege.refused("old-session")
    with siege.linked("rogue") as (link, _):
        topic = topics.up(LAB, "rogue", "status")
        old = siege.frame("status", Status(state="training", session=70).meta())
        for payload in (old, siege.frame("status", Status(state="offline", session=71).meta()), old):
            link.publish(topic, payload)
        until_more(lambda: siege.refused("old-session"), before, "not counted")
    assert siege.status()["devices"]["rogue"]["state"] == "offline"


def test_a_code_is_used_once(siege: Siege) -> None:
    invitation = siege.invitations["guest"]
    before = siege.refused("refused-enroll")
    with siege.linked("guest") as (link, inbox):
        assert siege.enroll(link, inbox, invitation, Identity.generate()).outcome == "enrolled"
        again = siege.enroll(link, inbox, invitation, Identity.generate())
        assert (again.outcome, "spent" in again.reason) == ("refused", True)
        guess = siege.enroll(link, inbox, replace(invitation, code="guessed"), Identity.generate())
        assert guess.outcome == "refused"
    until_more(lambda: siege.refused("refused-enroll"), before + 1, "not counted")


def test_an_expired_code_is_refused(siege: Siege) -> None:
    (invitation,) = administration.invite(siege.aggregator.folder, "sleeper", expires_in_s=0.001)
    before = siege.refused("refused-enroll")
    siege.invitations["sleeper"] = invitation
    with siege.linked("sleeper", siege.tls_of("sleeper")) as (link, inbox):
        late = siege.enroll(link, inbox, invitation, Identity.generate())
    assert (late.outcome, "expired" in late.reason) == ("refused", True), late.reason
    until_more(lambda: siege.refused("refused-enroll"), before, "not counted")


def test_a_revoked_key_is_told_so_and_never_returns(siege: Siege) -> None:
    (invitation,) = administration.invite(siege.aggregator.folder, "traitor")
    siege.invitations["traitor"], key = invitation, Identity.generate()
    before = siege.refused("revoked-key")
    with siege.linked("traitor", siege.tls_of("traitor")) as (link, inbox):
        assert siege.enroll(link, inbox, invitation, key).outcome == "enrolled"
        administration.revoke(siege.aggregator.folder, "traitor", "test", why="stolen")
        update = Update(base=siege.version, samples=1, codec="float32", encoding="raw", sealed=False, metrics={}).meta()
        link.publish(
            topics.up(LAB, "traitor", "update"), siege.frame("update", update, sender="traitor", key=key, body=bytes(4))
        )
        told = Receipt.from_meta(parse(siege.next(inbox, topics.down(LAB, "traitor", "receipt"))).meta)
        assert told.outcome == "revoked"
        (again,) = administration.invite(siege.aggregator.folder, "traitor")
        back = siege.enroll(link, inbox, again, key)
        assert (back.outcome, "does not return" in back.reason) == ("refused", True), back.reason
        assert siege.enroll(link, inbox, again, Identity.generate()).outcome == "enrolled"
    until_more(lambda: siege.refused("revoked-key"), before, "not counted")


# What the broker, or who stole the aggregator's certificate, says


def test_an_old_head_is_refused_and_the_newest_put_back(siege: Siege) -> None:
    before = siege.dropped("old-head")
    siege.steal_the_aggregators_place((topics.head(LAB), siege.old_head))
    siege.until_counted("old-head", before)
    siege.honest_go_on()
    with siege.linked("guest") as (link, inbox):  # in whose session no head waits
        link.subscribe([topics.head(LAB)])
        assert parse(siege.next(inbox, topics.head(LAB))).seq > parse(siege.old_head).seq


def test_a_delta_that_a_device_signed_is_refused(siege: Siege) -> None:
    before = siege.dropped("unknown-key"), siege.dropped("bad-signature")
    version = siege.version + 1
    delta = Delta(version=version, digest=bytes(32), codec="float32", encoding="raw").meta()
    named = siege.frame("delta", delta, sender=AGGREGATOR, body=b"forged")
    genuine = parse(siege.old_head)
    pretended = named.replace(bytes(siege.rogue.key_id), bytes(genuine.key), 1)
    siege.steal_the_aggregators_place(*((topics.delta(LAB, version % 32, 0), each) for each in (named, pretended)))
    for reason, counts in (("unknown-key", before[0]), ("bad-signature", before[1])):
        siege.until_counted(reason, counts)
    siege.honest_go_on()


def test_a_receipt_for_another_device_is_refused(siege: Siege) -> None:
    with siege.linked("guest") as (link, inbox):
        link.subscribe([topics.down(LAB, "guest", "#")])
        link.publish(
            topics.up(LAB, "guest", "enroll"),
            siege.frame("enroll", Enroll(public_key=siege.rogue.public).meta(), sender="guest", body=bytes(32)),
        )
        while parse(genuine := siege.next(inbox, topics.down(LAB, "guest", "receipt"))).meta["outcome"] != "refused":
            pass  # what waited in the session since an earlier test
    before = siege.dropped("not-outstanding")
    siege.steal_the_aggregators_place(*((topics.down(LAB, name, "receipt"), genuine) for name in HONEST))
    until(
        lambda: all(n > b for n, b in zip(siege.dropped("not-outstanding"), before, strict=True)), WITHIN_S, "no count"
    )
    siege.honest_go_on()


def test_swapped_parts_of_a_snapshot_are_refused_and_the_newcomer_comes_in_later(siege: Siege) -> None:
    administration.change_state(siege.aggregator.folder, "pause", "test")
    until(lambda: siege.status()["buffer"] == 0, WITHIN_S, "the buffer is not merged")
    try:
        with siege.aggregator.halted():  # or it puts the parts right before the newcomer looks
            swapped: dict[str, bytes] = {}
            # what the aggregator sent last may name another snapshot, until its place is stolen
            while (found := siege.named_parts()) != swapped:
                one, other = found
                swapped = {one: found[other], other: found[one]}
                siege.steal_the_aggregators_place(*swapped.items())
            late = Device(siege.folder / "late", siege.invitations["late"])
            siege.honest.append(late)
            until(lambda: late.core.dropped["wrong-topic"] >= 1, WITHIN_S, "not counted")
            assert late.core.follower.vector is None
        administration.change_state(siege.aggregator.folder, "resume", "test")
        until(lambda: late.core.state.accepted >= 1, WITHIN_S, "the newcomer does not come in")
    finally:
        administration.change_state(siege.aggregator.folder, "resume", "test")


def test_after_all_that_the_honest_devices_are_at_the_aggregators_digest(siege: Siege) -> None:
    until(lambda: all(device.core.state.accepted >= 5 for device in siege.honest), WITHIN_S, "the devices do not go on")
    administration.change_state(siege.aggregator.folder, "pause", "test")

    def at_rest() -> bool:
        found = siege.status()  # an update that was under way may make one more version after the pause
        return found["buffer"] == 0 and {device.vector_digest for device in siege.honest} == {found["digest"]}

    until(at_rest, WITHIN_S, "not all come to the same digest")
    for device in siege.honest:
        device.stop()
    accepted = siege.status()["devices"]
    assert accepted["rogue"]["updates"] == accepted["guest"]["updates"] == 0
    assert {client for client, _ in siege.turned_away()} == {"rogue", NO_NAME}  # nobody is counted who did nothing
    assert siege.aggregator.terminate() == 0
    assert "Traceback" not in siege.aggregator.log.read_text()
