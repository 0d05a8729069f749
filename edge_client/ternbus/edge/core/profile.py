"""A device's profile: identity, role, task and options, constant while the process runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build
from ternbus.broker.protocol.identity import Identity, KeyId, enroll_proof, key_id
from ternbus.broker.protocol.messages import DEVICE_STATES, Enroll, Grant, Receipt, Status
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import ELEMENTS_MAX, Schema
from ternbus.broker.protocol.topics import Address
from ternbus.broker.sums import bfv, masks
from ternbus.broker.sums.words import Layout, Words
from ternbus.edge.core.actions import Publish
from ternbus.edge.core.state import OutstandingUpdate, Seal
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.sum_policy import SumPolicy

Role = Literal["join", "train", "evaluate", "export"]
ENROLL_SEQ: Final = 1
OFFLINE: Final = DEVICE_STATES[-1]
MISFIT_BYTES: Final = 16 * 2**20


class Box(Protocol):
    """`masks.box`: a seed, sealed to a helper's key and bound to one update."""

    def __call__(
        self, box_key: bytes, seed: bytes, *, context: bytes, device: bytes, helper: bytes, seq: int
    ) -> bytes: ...


class Encrypt(Protocol):
    """`bfv.encrypt`: the ciphertexts of words under a helper's public key."""

    def __call__(self, public: bytes, layout: Layout, words: Words) -> bytes: ...


def subscriptions(federation: str, device: str, *, private: bool = False) -> tuple[str, ...]:
    """The topic filters of every connection; parts of snapshots and deltas are subscribed to later, by name.

    The terms of private sums are for a device that takes part in them.
    """
    every = (
        topics.status(federation),
        topics.head(federation),
        topics.down(federation, device, "#"),
        f"{topics.root(federation)}/all/delta/#",
    )
    return (*every, f"{topics.root(federation)}/all/{topics.TERMS}/#") if private else every


def schema_mismatch(schema: Schema, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """A text with the first difference between the federation's schema and the task's tensors; empty if equal."""
    theirs = {tensor.name: tensor.shape for tensor in schema.tensors}
    for name in {**theirs, **tensors}:
        if theirs.get(name) != tensors.get(name):
            return (
                f"the task's model is not the federation's: tensor {name!r} is {tensors.get(name, 'missing')} in the "
                f"task and {theirs.get(name, 'missing')} in the federation; choose another --task"
            )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The maximum length in bytes of a federation's schema and of its snapshots; longer ones are not read."""

    schema: int
    snapshot: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[int, ...]]) -> "ModelSize":
        """The size of the task's model and a reserve, so that an error can name the tensor that does not fit.

        Without tensors, only the protocol limits the size.
        """
        if not tensors:
            return cls(schema=MISFIT_BYTES, snapshot=MISFIT_BYTES + 4 * ELEMENTS_MAX)
        schema = Schema.bytes_max(tensors)
        return cls(
            schema=schema + MISFIT_BYTES // 16,
            snapshot=schema + 4 * sum(map(math.prod, tensors.values())) + MISFIT_BYTES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The identity, role, task and options of a device; it builds and checks the device's frames."""

    federation: str
    device: str
    identity: Identity
    aggregator_public: bytes
    seal: Seal = field(repr=False)  # a sealed box to the aggregator's key; it is random, so the shell provides it
    role: Role
    code: str = field(default="", repr=False)  # of the invitation, until enrollment
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of the task's model, by name
    metadata: Mapping[str, str] = field(default_factory=dict)  # of those tensors, for a model file
    default_plan: Mapping[str, object] = field(default_factory=dict)
    policy: PrivacyPolicy | None = None  # the differential privacy that the device's owner requires
    limits: TrainingLimits = field(default_factory=TrainingLimits)  # of one training, by the device's owner
    software: str = ""
    versions: int | None = None  # number of versions to contribute to, or to evaluate; None: no limit
    timeout_s: float | None = None  # longest wait for broker or aggregator; None: no limit
    reports: bool = False  # publish evaluations of versions on the held-out data
    classes: Mapping[str, int] = field(default_factory=dict)  # its samples by class, to publish with them
    fine_tune: float = 0.0  # epochs on the device's own data before it stops; 0: none
    stays: bool = False  # while the federation is closed, until it is resumed
    trains_next: bool = False  # it joins to train: by a plan that it cannot follow it does not spend its invitation
    statistics: int | None = None  # requests for statistics a day that its owner allows; None: none are answered
    sums: SumPolicy | None = None  # what its owner pins of private sums; with it the device sends no other updates
    box: Box = field(default=masks.box, repr=False)  # random, as ``seal`` is
    is_elastic: bool = False  # it trains, or evaluates, sub-networks of the widths of a search
    encrypt: Encrypt = field(default=bfv.encrypt, repr=False)  # likewise

    @property
    def evaluates(self) -> bool:
        """Whether it evaluates versions, on the task's test data or on the held-out data."""
        return self.role == "evaluate" or (self.role == "train" and self.reports)

    @property
    def is_private(self) -> bool:
        """Whether it takes part in private sums, or joins to do so."""
        return self.sums is not None and (self.role == "train" or self.trains_next)

    @property
    def key(self) -> KeyId:
        return self.identity.key_id

    @property
    def aggregator_key(self) -> KeyId:
        return key_id(self.aggregator_public)

    def checked(self, topic: str, frame: Frame) -> Address:
        """The address of a frame that the aggregator published, to all or to this device.

        Raises `ProtocolError` for any other frame, with the first of the protocol's checks that fails.
        """
        address = topics.parse(topic)
        topics.check(frame, address)
        if address.group == "up" or address.device not in {None, self.device}:
            raise ProtocolError("not-ours", topic[:80])
        if frame.key != self.aggregator_key:
            raise ProtocolError("unknown-key", "not the aggregator's key")
        frame.check_authentic(self.aggregator_public)
        return address

    @property
    def model_size(self) -> ModelSize:
        return ModelSize.of(self.tensors)

    def size_fault(self, snapshot_bytes: int) -> str:
        """A text that says why this device does not read a snapshot of this length; empty if it does."""
        most = self.model_size.snapshot
        if snapshot_bytes <= most:
            return ""
        return (
            f"the task's model is not the federation's: its snapshot has {snapshot_bytes} bytes, but one of the "
            f"task's model has at most {most}; choose another --task"
        )

    def schema_fault(self, schema: Schema, before: bytes) -> str:
        """A text that says why this device cannot use the federation's schema; empty if it can.

        ``before`` is the encoded schema from when the device joined; empty if it joins now.
        """
        if before not in {b"", schema.encoded}:
            return "the federation's schema has changed: run `ternbus edge leave`, then `ternbus edge join` again"
        return schema_mismatch(schema, self.tensors)

    def status(self, state: str, *, seq: int, session: int, base: int = -1, failing: str = "") -> Publish:
        message = Status(state=state, session=session, base=base, software=self.software, failing=failing)
        return self._publish(Status.KIND, seq, message.meta(), retain=True)

    def enroll(self) -> Publish:
        """The enrollment; each call returns the same bytes."""
        public = self.identity.public
        proof = enroll_proof(self.code, self.federation, self.device, public)
        return self._publish(Enroll.KIND, ENROLL_SEQ, Enroll(public_key=public).meta(), body=proof)

    def message(self, kind: str, seq: int, meta: Mapping[str, object], *, body: bytes = b"") -> Publish:
        """A message of one part, that is not retained."""
        return self._publish(kind, seq, meta, body=body)

    def update(self, update: OutstandingUpdate) -> list[Publish]:
        """All parts of an update; each call returns the same bytes."""
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
