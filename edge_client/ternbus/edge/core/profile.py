"""Who a device is in its federation, and what it came to do: what does not change while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import Identity, KeyId, enroll_proof, key_id
from ternbus.broker.protocol.messages import DEVICE_STATES, Enroll, Grant, Receipt, Status
from ternbus.broker.protocol.parts import cut, message_digest
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.actions import Publish
from ternbus.edge.core.state import OutstandingUpdate, Seal
from ternbus.edge.plan.privacy import PrivacyPolicy

Role = Literal["join", "train", "evaluate"]
ENROLL_SEQ: Final = 1
OFFLINE: Final = DEVICE_STATES[-1]


def subscriptions(federation: str, device: str) -> tuple[str, ...]:
    """What every connection asks for at once; single parts come later, by name."""
    return (
        topics.status(federation),
        topics.head(federation),
        topics.down(federation, device, "#"),
        f"{topics.root(federation)}/all/delta/#",
    )


def misfit(schema: Schema, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """Where the federation's schema and the task's tensors first differ, in words; empty where they agree."""
    theirs = {tensor.name: tensor.shape for tensor in schema.tensors}
    for name in {**theirs, **tensors}:
        if theirs.get(name) != tensors.get(name):
            return (
                f"the task's model is not the federation's: tensor {name!r} is {tensors.get(name, 'missing')} in the "
                f"task and {theirs.get(name, 'missing')} in the federation; choose another --task"
            )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device's identity, its task's shapes, and how long it means to stay."""

    federation: str
    device: str
    identity: Identity
    aggregator_public: bytes
    seal: Seal = field(repr=False)  # boxes bytes for the aggregator; it needs chance, so the service brings it
    role: Role
    code: str = field(default="", repr=False)  # of the invitation, until it is spent
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # what the task's model is made of
    default_plan: Mapping[str, object] = field(default_factory=dict)
    promise: PrivacyPolicy | None = None  # the differential privacy that its owner insists on
    software: str = ""
    versions: int | None = None  # contribute to (or evaluate) so many, then stop
    timeout_s: float | None = None  # stop if somebody is waited for so long
    reports: bool = False  # tell the aggregator what versions are worth on the data that are held out here
    fine_tune: float = 0.0  # before leaving, so many epochs more on the device's own data; 0: none

    @property
    def evaluates(self) -> bool:
        """Whether it tries each version, on the task's test data or on what it holds out itself."""
        return self.role == "evaluate" or (self.role == "train" and self.reports)

    @property
    def key(self) -> KeyId:
        return self.identity.key_id

    @property
    def aggregator_key(self) -> KeyId:
        return key_id(self.aggregator_public)

    def status(self, state: str, *, seq: int, session: int, base: int = -1) -> Publish:
        message = Status(state=state, session=session, base=base, software=self.software)
        return self._publish(Status.KIND, seq, message.meta(), retain=True)

    def enroll(self) -> Publish:
        """The same bytes each time, however often it has to be sent."""
        public = self.identity.public
        proof = enroll_proof(self.code, self.federation, self.device, public)
        return self._publish(Enroll.KIND, ENROLL_SEQ, Enroll(public_key=public).meta(), body=proof)

    def message(self, kind: str, seq: int, meta: Mapping[str, object]) -> Publish:
        """A message without a body."""
        return self._publish(kind, seq, meta)

    def update(self, update: OutstandingUpdate) -> list[Publish]:
        """All parts of an update, the same bytes each time."""
        message = update.message
        frames = cut(
            self.identity,
            federation=self.federation,
            sender=self.device,
            kind=message.KIND,
            seq=update.seq,
            meta=message.meta(),
            body=update.body,
            frame_bytes=update.frame_bytes,
        )
        topic = topics.up(self.federation, self.device, message.KIND)
        return [Publish(topic=topic, payload=frame, seq=update.seq) for frame in frames]

    def digest(self, update: OutstandingUpdate) -> bytes:
        """By what the aggregator's log of merges names this message."""
        return message_digest(parse(part.payload).header for part in self.update(update))

    def is_addressed(self, receipt: Receipt | Grant) -> bool:
        return receipt.device == self.device and receipt.device_key == self.key

    def _publish(
        self, kind: str, seq: int, meta: Mapping[str, object], *, body: bytes = b"", retain: bool = False
    ) -> Publish:
        payload = build(
            self.identity,
            federation=self.federation,
            sender=self.device,
            kind=kind,
            seq=seq,
            meta=meta,
            body=body,
        )
        return Publish(topic=topics.up(self.federation, self.device, kind), payload=payload, seq=seq, retain=retain)
