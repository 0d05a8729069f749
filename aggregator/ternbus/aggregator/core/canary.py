"""The candidate for the next version: a group evaluates it before anybody else has it, and decides about it.

Updates are accepted meanwhile, and are in the next candidate. Where the group's metrics hold, the candidate is
published, bit for bit as it was evaluated. Otherwise a version without a change takes its place, and its updates are
dropped, as the log of merges says. So devices have a version to train on in both cases.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Log, Save
from ternbus.aggregator.core.registry import DEVICE, Member, Registry
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.merge.model import Prepared
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.plural import counted
from ternbus.broker.protocol.direction import direction_of, primary_of, sign_of
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.merge_log import REASON_BYTES_MAX, DroppedUpdate, PrivateMember
from ternbus.broker.protocol.messages import CLOSED, Metrics
from ternbus.broker.protocol.model_messages import Candidate

RESEND_S: Final = 30.0  # until it is sent once more to who has not reported; it doubles each time
TEST: Final = "test"
ROUNDING: Final = 1e-9  # of a difference: 0.48 is within 0.02 of 0.5


@dataclass(slots=True, kw_only=True)
class Judged:
    """A candidate, and what was reported of it by device."""

    prepared: Prepared
    encoding: str
    body: bytes = field(repr=False)
    reports: dict[str, Metrics] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.prepared.merged.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the candidate is published, and why, in words."""

    holds: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """What a start finds: ``dissolves`` where the ledger has a candidate that the settings of now do not allow."""

    candidate: Judged | None = None
    references: Mapping[str, Metrics] = field(default_factory=dict)
    dissolves: bool = False

    def start(self) -> list[Action]:
        return [Save(record=records.CandidateDissolved())] if self.dissolves else []


@dataclass(slots=True, kw_only=True)
class Canary:
    """At most one candidate at a time; ``references`` are the newest metrics of published versions, by device."""

    settings: Settings
    registry: Registry
    versions: Versions
    candidate: Judged | None = None
    references: dict[str, Metrics] = field(default_factory=dict)
    is_connected: bool = False
    _decide_by: float = 0.0
    _resend_at: float = 0.0
    _resends: int = 0

    @classmethod
    def of(cls, settings: Settings, registry: Registry, versions: Versions, recalled: Recalled) -> "Canary":
        """As a start finds it."""
        return cls(
            settings=settings,
            registry=registry,
            versions=versions,
            candidate=recalled.candidate,
            references=dict(recalled.references),
        )

    @property
    def is_on(self) -> bool:
        return bool(self.settings.canary.group)

    @property
    def judges(self) -> list[Member]:
        """Who can report: members of the group that are not revoked, and whose metrics leave them under this plan."""
        hidden = self.settings.is_dp or bool(self.settings.plan.get("seal"))
        found = (self.registry.members.get(name) for name in dict.fromkeys(self.settings.canary.group))
        return [each for each in found if each is not None and not (each.revoked or (hidden and each.role == DEVICE))]

    @property
    def awaited(self) -> list[str]:
        """Who has not reported."""
        reports = {} if self.candidate is None else self.candidate.reports
        return [member.name for member in self.judges if member.name not in reports]

    @property
    def due(self) -> float | None:
        """When ``verdict`` or ``on_time`` has something to do."""
        if self.candidate is None or not self._can_be_heard:
            return None
        return min(self._decide_by, self._resend_at)

    @property
    def _can_be_heard(self) -> bool:
        """Whether the group can report: without a connection, or once the federation is closed, nobody does."""
        return self.is_connected and self.versions.published.state != CLOSED

    def begin(self, now: float, resend_s: float = RESEND_S) -> None:
        """Wait for reports from now on; send the candidate again then."""
        self._decide_by, self._resends = now + self.settings.canary.patience_s, 0
        self._resend_at = now + resend_s

    def connected(self, now: float) -> None:
        """What was sent before may be lost, and what the group says now comes."""
        self.is_connected = True
        self.begin(now, resend_s=0.0)

    def make(self, prepared: Prepared, encoding: str, body: bytes, now: float) -> list[Action]:
        """Save the candidate, then send it to the group."""
        self.candidate = judged = Judged(prepared=prepared, encoding=encoding, body=body)
        self.begin(now)
        merged = prepared.merged
        made = records.CandidateMade(
            version=merged.version, digest=merged.digest, codec=merged.block.codec, encoding=encoding, body=body
        )
        names = ", ".join(member.name for member in self.judges) or "nobody"
        text = f"candidate {merged.version}, of {counted(merged.updates, 'update')}, is evaluated by {names}"
        fields = {"version": merged.version, "digest": merged.digest.hex(), "updates": merged.updates}
        return [Save(record=made), Log(text=text, event="candidate", fields=fields), *self._send(judged)]

    def _send(self, judged: Judged) -> list[Action]:
        """Send the candidate to who has not reported."""
        merged = judged.prepared.merged
        value = Candidate(
            version=merged.version,
            digest=merged.digest,
            codec=merged.block.codec,
            encoding=judged.encoding,
        )
        return self.versions.frames.candidate(self.awaited, value, judged.body)

    def on_time(self, judged: Judged, now: float) -> list[Action]:
        """Send the candidate again where it was perhaps lost."""
        if now < self._resend_at or not self._can_be_heard:
            return []
        self._resends += 1
        self._resend_at = now + RESEND_S * 2.0 ** min(self._resends, 20)
        return self._send(judged)

    # --- reports

    def report(self, member: Member, frame: Frame) -> list[Action]:
        """Take in metrics that name a candidate; ProtocolError unless they are of this one, by one of the group."""
        frame.check_bodiless()
        metrics = Metrics.from_meta(frame.meta)
        if frame.seq <= member.metrics_seq:
            raise ProtocolError("replayed-metrics", member.name)
        if metrics.split == TEST and member.role == DEVICE:
            raise ProtocolError("not-evaluator", f"{member.name} must be invited with `invite --evaluator` for that")
        if self.candidate is None or metrics.candidate != self.candidate.prepared.merged.digest:
            raise ProtocolError("old-candidate", f"{member.name} has evaluated another candidate than the present one")
        if member.name not in self.awaited:
            raise ProtocolError("not-in-group", f"{member.name} has reported, or is not in canary.group")
        member.metrics_seq = frame.seq
        self.candidate.reports[member.name] = metrics
        return [Save(record=records.CandidateEvaluated(device=member.name, seq=frame.seq, metrics=metrics))]

    def observe(self, received: records.MetricsReceived) -> None:
        """Take in metrics of a published version."""
        device, metrics = received.device, received.metrics
        known = self.references.get(device)
        if device in self.settings.canary.group and (known is None or known.version <= metrics.version):
            self.references[device] = metrics

    # --- the verdict

    def verdict(self, judged: Judged, now: float) -> Verdict | None:
        """What becomes of the candidate; None while reports are awaited."""
        found, about = judged.reports, self.settings.canary
        # of who was revoked since, or left the group, a report is none
        reports = {each.name: found[each.name] for each in self.judges if each.name in found}
        if self.awaited or len(reports) < max(about.min_reports, 1):
            if now < self._decide_by or not self._can_be_heard:
                return None
            needed = about.min_reports or len(set(about.group))
            if len(reports) < needed:
                return Verdict(holds=False, why=f"{len(reports)} of {needed} reports in {about.patience_s:g} s")
        changes = {device: self._change(device, metrics) for device, metrics in reports.items()}
        tests = [each for device, each in changes.items() if reports[device].split == TEST]
        local = [each for device, each in changes.items() if reports[device].split != TEST]
        # of an even number the lower middle: a mean of both would be whatever a hostile device makes it
        worst = min([*tests, *([median_low(local)] if local else [])])
        told = "; ".join(self._told(reports))
        return Verdict(holds=worst >= -about.tolerance - ROUNDING, why=told)

    def _change(self, device: str, metrics: Metrics) -> float:
        """By how much the metric has become better; 0 where there is nothing to compare it with."""
        before = self._reference(device, metrics)
        name = self._metric(before, metrics.values)
        if name not in metrics.values:
            return -float("inf")
        if before.get(name) is None:
            return 0.0
        return sign_of(direction_of(name, metrics.better)) * (metrics.values[name] - before[name])

    def _reference(self, device: str, metrics: Metrics) -> Mapping[str, float]:
        """The device's metrics of the newest published version that it has evaluated."""
        known = self.references.get(device)
        if known is None or known.split != metrics.split or known.version < self.versions.published.floor:
            return {}
        return known.values

    def _metric(self, before: Mapping[str, float], values: Mapping[str, float]) -> str:
        return self.settings.canary.metric or primary_of(before or values) or ""

    def _told(self, reports: Mapping[str, Metrics]) -> Iterator[str]:
        for device, metrics in sorted(reports.items()):
            before = self._reference(device, metrics)
            name = self._metric(before, metrics.values)
            if name not in metrics.values:
                yield f"{device} could not evaluate it"
                continue
            after = f" after {before[name]:.4g}" if name in before else ""
            shown = name[:40] if name.isprintable() else "the metric"
            yield f"{shown} {metrics.values[name]:.4g}{after} by {device}"

    def dissolve(self) -> list[Action]:
        """Let the candidate's updates wait as before: in the buffer, whose sum the caller makes anew."""
        judged, self.candidate = self.candidate, None
        if judged is None:
            return []
        self.versions.model.buffer[:0] = judged.prepared.updates
        return [Save(record=records.CandidateDissolved())]


def dropped(judged: Judged, why: str) -> list[DroppedUpdate]:
    """What the log of merges says of the updates of a candidate that is withdrawn."""
    reason = f"canary: {why}".encode()[:REASON_BYTES_MAX].decode(errors="ignore")
    return [
        DroppedUpdate(
            update=PrivateMember(device=each.device, key=each.key, seq=each.seq, digest=each.digest), reason=reason
        )
        for each in judged.prepared.updates
    ]


def withdrawn_line(judged: Judged, why: str) -> Log:
    """What the operator is told."""
    version, updates = judged.version, len(judged.prepared.updates)
    text = f"candidate {version} is withdrawn, {counted(updates, 'update')} dropped: {why}"
    return Log(text=text, level=WARNING, event="withdrawn", fields={"version": version, "updates": updates, "why": why})
