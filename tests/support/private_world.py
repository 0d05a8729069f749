"""A federation with private sums and its helpers' messages, over the core and the real ledger."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.small_world import BROKER_URL, LAB, Bench, initial_model
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import membership, private_rows
from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import Enroll, Status
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import OWN, Card, Terms, context, digest_of

CODE = "a-code-of-a-helper"


@dataclass(slots=True)
class HelperSide:
    """A helper's name, key and counter; it makes the frames that a true or a false one would send."""

    name: str
    identity: Identity = field(default_factory=Identity.generate)
    seq: int = 0

    def topic(self, kind: str) -> str:
        return topics.help_of(LAB, self.name, kind)

    def frame(
        self, kind: str, meta: dict[str, Any], *, body: bytes = b"", seq: int | None = None, **about: Any
    ) -> bytes:
        self.seq = self.seq + 1 if seq is None else seq
        whole = {"federation": LAB, "sender": self.name, **about}
        return build(self.identity, kind=kind, seq=self.seq, meta=meta, body=body, **whole)

    def enroll(self, code: str = CODE, *, public: bytes | None = None, seq: int | None = None) -> bytes:
        own = self.identity.public if public is None else public
        return self.frame(
            "enroll", Enroll(public_key=own).meta(), body=enroll_proof(code, LAB, self.name, own), seq=seq
        )

    def status(self, state: str = "idle", session: int = 1, count: int = -1, *, seq: int | None = None) -> bytes:
        return self.frame("status", Status(state=state, session=session, count=count).meta(), seq=seq)

    def card(self, number: int = 1, *, seq: int | None = None, signer: Identity | None = None, **changes: Any) -> bytes:
        about: dict[str, Any] = {"federation": LAB, "helper": self.name, "public": self.identity.public}
        about |= {"box_key": digest_of(f"{self.name} {number}".encode()), "number": number, "roster": OWN, "min": 2}
        made = Card(**{**about, **changes}).signed(signer or self.identity)
        return self.frame("card", {}, body=made.body, seq=seq)


def make_private(directory: Path, helpers: Sequence[HelperSide], **settings: object) -> Path:
    """An aggregator's directory; settings as ``merge__buffer_size=6``."""
    chosen = {name.replace("__", "."): value for name, value in settings.items()}
    keys = {helper.name: helper.identity.public.hex() for helper in helpers}
    chosen = {"private.helpers": keys, "private.min": 2, "merge.buffer_size": 4, **chosen}
    administration.create(directory, federation=LAB, broker=BROKER_URL, model=initial_model(), settings=chosen)
    return directory


class PrivateBench(Bench):
    """An aggregator's core whose federation has private sums."""

    @property
    def sums(self) -> PrivateSums:
        assert self.core.sums is not None
        return self.core.sums

    @property
    def context(self) -> ContextOf | None:
        """Of the newest version."""
        return self.sums.contexts.get(self.version)

    def invite_helper(self, name: str, code: str = CODE, expires_at: float = 1e12) -> None:
        private_rows.invite(self.ledger.db, {name: code}, 0.0, expires_at)
        codes = private_rows.codes(self.ledger.db)
        self.handle(events.InvitationsRead(codes=membership.codes(self.ledger.db), helpers=codes))

    def say(self, helper: HelperSide, *payloads: bytes) -> list[events.Action]:
        """Deliver a helper's frames on the topics that they belong to."""
        actions = []
        for payload in payloads:
            actions += self.receive(helper.topic(parse(payload).kind), payload)
        return actions

    def enroll_helper(self, helper: HelperSide) -> list[events.Action]:
        self.invite_helper(helper.name)
        return self.say(helper, helper.enroll())

    def ready(self, *helpers: HelperSide) -> None:
        """All helpers enrol, say that they are online, and send their cards."""
        for helper in helpers:
            self.enroll_helper(helper)
            self.say(helper, helper.status(count=0), helper.card())

    def check_published(self) -> Terms:
        """Compare what a device finds, head and terms, with the context of the newest version; returns the terms."""
        head = parse(self.retained[topics.head(LAB)])
        parts: list[Frame] = []
        content = b""
        while not parts or len(parts) < parts[0].parts:
            frame = parse(self.retained[topics.terms(LAB, len(parts))])
            frame.check_authentic(self.identity.public)
            assert (frame.kind, frame.part) == ("terms", len(parts))
            assert not parts or (frame.seq, frame.parts) == (parts[0].seq, parts[0].parts)
            parts.append(frame)
            content += frame.body
        assert topics.terms(LAB, len(parts)) not in self.retained
        assert head.meta["plan"]["terms"] == digest_of(content)
        found = self.sums.contexts[head.meta["version"]]
        assert found.context == context(
            version=head.meta["version"],
            model=head.meta["digest"],
            plan=digest_of(plan_bytes(head.meta_bytes)),
            terms=digest_of(content),
        )
        assert found.terms_bytes == content
        return Terms.parse(content)
