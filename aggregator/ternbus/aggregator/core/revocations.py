"""The list of revoked keys as a signed, retained message, which a restored aggregator reads to catch up."""

from dataclasses import dataclass

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.events import Action, Log, Publish, Save
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.registry import Registry
from ternbus.aggregator.core.versions import PublishedState
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity


@dataclass(slots=True, kw_only=True)
class Revocations:
    """Publishes what the registry has revoked, and takes in what the broker retains of this aggregator's lists."""

    federation: str
    identity: Identity
    registry: Registry
    frames: FrameWriter
    published: PublishedState
    _asked: int = 0  # pages that were asked for on this connection

    def subscriptions(self) -> tuple[str, ...]:
        """What to subscribe to at a connect: the pages that there are, and one more."""
        self._asked = len(list(revocations.pages(self.registry.revoked_keys()))) + 1
        return tuple(topics.revocations(self.federation, page) for page in range(self._asked))

    def publish(self) -> list[Action]:
        """All pages again, if keys were added since; they are saved before anybody can read them."""
        keys = self.registry.revoked_keys()
        if len(keys) == self.published.revoked:
            return []
        self.published.revoked = len(keys)
        reserved, messages = self.frames.revocations(keys)
        self.published.sizes |= {topic: len(payload) for topic, payload in messages}
        retained = Save(record=records.FramesRetained(frames=tuple(messages)))
        return [
            *reserved,
            retained,
            *(Publish(topic=topic, payload=payload, retain=True) for topic, payload in messages),
        ]

    def arrived(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        """Take in a page that this aggregator signed once: a key in it stays void, whatever the ledger says of it."""
        if not event.payload:
            return []
        frame = parse(event.payload)
        topics.check(frame, address)
        frame.check_authentic(self.identity.public)
        if frame.parts != 1:
            raise ProtocolError("bad-body", "a page of revocations has one part")
        page = address.page or 0
        more = [events.Subscribe(filters=(topics.revocations(self.federation, page + 1),))]
        actions: list[Action] = [*more] if page + 1 >= self._asked else []
        self._asked = max(self._asked, page + 2) if actions else self._asked
        if lacking := revocations.read(frame.body) - self.registry.revoked_keys():
            for device, public in sorted(lacking):
                self.registry.revoke_key(device, public)
            names = ", ".join(sorted({device for device, _ in lacking}))
            actions += [
                Save(record=records.KeysRevoked(keys=tuple(sorted(lacking)))),
                Log(text=f"revoked, as this aggregator's own list on the broker says: {names}"),
            ]
        return [*actions, *self.publish()]
