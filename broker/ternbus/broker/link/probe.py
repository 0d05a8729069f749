"""What a broker can do, tried out as a client: `ternbus doctor` for brokers, and for those who connect to them.

Its own traffic stays below ``ternbus/1/doctor``, a federation that nobody else has, under the client id ``doctor``.
"""

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

from ternbus.broker.checkup import Result, error, failed, ok, warning
from ternbus.broker.errors import ConfigError, FederationError, LinkError
from ternbus.broker.link.connect_errors import UnansweredError
from ternbus.broker.link.connection import MQTT_5
from ternbus.broker.link.link import Arrived, Disconnected, Link, LinkEvent, Published, Refused, Tls
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.endpoint import Endpoint, is_loopback
from ternbus.broker.protocol.frame import FRAME_BYTES

NAME: Final = "doctor"  # client id, federation and device
ANSWER_S: Final = 5.0  # for what a broker answers at once
PACKET_BYTES: Final = FRAME_BYTES + 1024  # of the default frame, with header and topic
SESSION_S: Final = 24 * 3600  # a device that is away for a day finds what it was sent
MOSQUITTO: Final = "mosquitto"

Event = TypeVar("Event", bound=LinkEvent)


def probe(url: str) -> list[Result]:
    """Connect as a stranger, and try out limits, retained messages, sessions and the access list."""
    try:
        return [*_probe(url)]
    except (LinkError, ConfigError) as problem:
        return [failed("broker", str(problem))]


def reach(make_link: Callable[[Callable[[LinkEvent], None]], Link], will_topic: str) -> list[Result]:
    """Connect as a member that does not run now, by its own name and certificate, and look at the limits.

    ``make_link`` makes its link for what is to be given the events.
    """
    began = time.monotonic()
    try:
        link = make_link(Inbox().put)
        link.connect(will_topic, b"")
        results = [ok("broker", f"connected in {1000 * (time.monotonic() - began):.0f} ms"), *_limits(link)]
    except FederationError as problem:
        return [failed("broker", str(problem))]
    link.disconnect(flush_s=0.0)
    return results


class Inbox:
    """The events of a link."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.put = self._events.put

    def next(self, *kinds: type[LinkEvent]) -> LinkEvent | None:
        """The next event of these kinds, or the end of the connection; None if none comes in time."""
        deadline = time.monotonic() + ANSWER_S
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(event, (*kinds, Disconnected)):
                return event
        return None


def _probe(url: str) -> Iterator[Result]:
    inbox = Inbox()
    link = Link(url, client_id=NAME, deliver=inbox.put, tls=Tls() if Endpoint.parse(url).tls else None)
    own = topics.up(NAME, NAME, "status")
    with _connected(link, own) as took_s:
        yield ok("broker", f"connected to {url} in {1000 * took_s:.0f} ms")
        yield from _limits(link)
        yield from _retained(link, inbox, own)
        yield _access(link, inbox, Endpoint.parse(url))
    yield _session(link, own)


@contextmanager
def _connected(link: Link, will_topic: str) -> Iterator[float]:
    began = time.monotonic()
    _connect(link, will_topic)
    try:
        yield time.monotonic() - began
    finally:
        link.disconnect(flush_s=1.0)


def _connect(link: Link, will_topic: str) -> None:
    """Connect, at the second attempt where the first ended without an answer; LinkError where that fails too.

    A client id may come back before nats-server has seen the end of its last connection. The next connection of this
    id it then ends without an answer, after a second, and takes the one after that. No other failure is tried again:
    a port that is silent costs 5 s each time, and a wrong password may shut out the address.
    """
    try:
        link.connect(will_topic, b"")
    except UnansweredError:
        link.connect(will_topic, b"")


def _limits(link: Link) -> Iterator[Result]:
    """What the broker says of itself when it accepts a connection (MQTT 5.0, section 3.2.2.3)."""
    if link.protocol != MQTT_5:
        yield warning(
            "limits",
            "the broker speaks MQTT 3.1.1: it tells no limits, and acknowledges what it refuses",
            "look at its settings: packets of 122,880 bytes, QoS 1, retained messages, persistent sessions",
        )
        return
    yield from judge(link.limits)


def judge(limits: Mapping[str, int]) -> Iterator[Result]:
    """Whether the limits in a CONNACK suffice; a limit that is not there is the protocol's largest."""
    packet_bytes = limits.get("MaximumPacketSize")
    if packet_bytes is not None and packet_bytes < PACKET_BYTES:
        mend = "raise the broker's max_packet_size; until then messages travel in more parts"
        yield warning("packets", f"packets of at most {packet_bytes} bytes; {PACKET_BYTES} are usual", mend)
    else:
        yield ok("packets", "of any size" if packet_bytes is None else f"of at most {packet_bytes} bytes")
    if limits.get("MaximumQoS", 2) < 1:
        yield error("qos", "the broker takes nothing above QoS 0", "allow QoS 1 (mosquitto: max_qos 1)")
    else:
        yield ok("qos", "QoS 1")
    expiry_s = limits.get("SessionExpiryInterval")
    if expiry_s is not None and expiry_s < SESSION_S:
        mend = "let sessions of clients that are away last for days (mosquitto: persistent_client_expiration)"
        yield warning("sessions", f"a session ends {expiry_s} s after its client", mend)
    window = limits.get("ReceiveMaximum")
    if window is not None:
        yield ok("window", f"{window} publications at a time without an acknowledgement")


def _retained(link: Link, inbox: Inbox, topic: str) -> Iterator[Result]:
    """Whether a retained message can be read back."""
    link.publish(topic, b"probe", retain=True)
    if not isinstance(inbox.next(Published, Refused), Published):
        yield ok("retained", "a stranger may not publish, so it was not tried")
        return
    link.subscribe([topic])
    found = inbox.next(Arrived)
    if isinstance(found, Arrived):
        link.acknowledge([found.token])
        yield ok("retained", "the broker holds retained messages")
    else:
        mend = "allow retained messages (mosquitto: retain_available true, max_retained…); or an access list denies it"
        yield warning("retained", "a retained message did not come back", mend)
    link.publish(topic, b"", retain=True)
    inbox.next(Published, Refused)


def _access(link: Link, inbox: Inbox, endpoint: Endpoint) -> Result:
    """Whether a client may write on the topics of another."""
    link.publish(topics.up(NAME, "another", "status"), b"probe")
    answer = inbox.next(Published, Refused)
    if not isinstance(answer, Published) or link.protocol != MQTT_5:
        return ok("access", "denied to a stranger" if not isinstance(answer, Published) else "not told by MQTT 3.1.1")
    text = "any client may write on any device's topics: it cannot forge, and it can disturb"
    if is_loopback(endpoint.host):
        return ok("access", f"{text}; only this machine reaches the broker")
    return warning("access", text, "use a broker with TLS and an access list: ternbus broker init DIR --name HOST")


def _session(link: Link, own: str) -> Result:
    """Whether the broker keeps the session of a client that is away."""
    _connect(link, own)
    present = link.session_present
    link.unsubscribe([own])
    link.disconnect(flush_s=1.0)
    if present:
        return ok("sessions", "kept while a client is away")
    mend = "allow persistent sessions: else a device loses what it is sent while it is away"
    return warning("sessions", "the session was gone after a reconnect", mend)
