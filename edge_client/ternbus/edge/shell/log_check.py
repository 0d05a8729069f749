"""The check of the aggregator's log of merges against a device's receipts."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.files import chunks
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import (
    UNKNOWN_DIGEST,
    Audit,
    Contribution,
    Entry,
    MergedSet,
    PrivateMember,
    unpack_all,
)
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.shell.directory import Settings
from ternbus.edge.store.outbox import RECEIPTS_MAX

SHOWN: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged update of the device; ``share`` is its part of the version's total weight."""

    seq: int
    base: int
    version: int
    weight: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """An accepted update that the log says is in no version, and why; ``version`` has the entry."""

    seq: int
    base: int
    version: int
    reason: str


@dataclass(slots=True)
class LogCheck:
    """The result of the check for one device. Without ``faults`` the log agrees with every receipt."""

    entries: int = 0
    version: int = -1
    merged: list[Merged] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # accepted, but not merged up to the log's last version
    unlogged: list[int] = field(default_factory=list)  # accepted, and perhaps merged before the log begins
    unknown_bytes: list[int] = field(default_factory=list)  # merged, but log or receipt has no digest of the message
    other_keys: int = 0  # updates under the device's name with keys that this directory never had
    faults: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        return {
            "ok": not self.faults,
            "faults": self.faults,
            "entries": self.entries,
            "version": self.version,
            "merged": [asdict(each) for each in self.merged],
            "dropped": [asdict(each) for each in self.dropped],
            "waiting": self.waiting,
            "unlogged": self.unlogged,
            "unknown_bytes": self.unknown_bytes,
            "other_keys": self.other_keys,
        }

    def report(self, device: str) -> str:
        lines = [f"fault: {fault}" for fault in self.faults]
        same = len(self.merged) - len(self.unknown_bytes)
        lines.append(
            f"{device}: {same} accepted updates are in the log as sent, {len(self.waiting)} are not merged "
            f"yet; the log ends at version {self.version}"
        )
        if self.dropped:
            counts = Counter(each.reason.partition(":")[0] for each in self.dropped)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            lines.append(f"{len(self.dropped)} more were dropped, as the log says: {reasons}")
            lines += [f"  update {each.seq} on version {each.base}: {each.reason}" for each in self.dropped[-SHOWN:]]
        if self.unknown_bytes:
            lines.append(
                f"{len(self.unknown_bytes)} more are in the log, and were sent or accepted by a Ternbus that kept no "
                "digest: whether they are there as they were sent cannot be checked"
            )
        if self.unlogged:
            lines.append(
                f"{len(self.unlogged)} more were accepted before the aggregator kept a log, and cannot be checked"
            )
        if self.other_keys:
            lines.append(
                f"{self.other_keys} more updates have keys that this directory never had; they cannot be checked here"
            )
        lines += [
            f"  update {each.seq} on version {each.base}: in version {each.version} with weight {each.weight:g}, "
            f"{100 * each.share:.1f} % of it"
            for each in self.merged[-SHOWN:]
        ]
        if max(len(self.merged), len(self.dropped)) > SHOWN:
            lines.append(f"  (the last {SHOWN}; --json lists all)")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Place:
    """The version in which the log has an update of the device."""

    version: int
    total: float
    update: Contribution
    dropped: str = ""  # why it is in no version


@dataclass(frozen=True, slots=True)
class _Extent:
    """Which versions a log is about; -1 for no merge."""

    begins: int
    first_merge: int
    newest_merge: int
    has_sets: bool  # of private updates, which may wait for company through several merges
    turns: Sequence[tuple[int, bool]]  # versions in ascending order, and whether it is a rollback: else a merge

    def withdrawn_by(self, version: int) -> int | None:
        """The rollback that came before any merge after this version: it dropped the updates that waited then."""
        after = bisect_right(self.turns, (version, True))
        back, is_rollback = self.turns[after] if after < len(self.turns) else (None, False)
        return back if is_rollback else None


_Places = dict[tuple[KeyId, int], list[_Place]]


def check(log: Path, settings: Settings, state: State, answers: Sequence[AnsweredUpdate]) -> LogCheck:
    """Check a log file against the device's state and its receipts, ``answers``, in any order."""
    audit = Audit(public=bytes.fromhex(settings.aggregator_key), federation=settings.federation)
    places: _Places = defaultdict(list)
    merges: list[int] = []
    rollbacks: list[int] = []
    has_sets = False
    try:
        for signed in unpack_all(chunks(log)):
            entry = audit.take(signed)
            if entry is not None and (entry.updates or entry.sets):
                merges.append(entry.version)
                has_sets |= bool(entry.sets)
            if entry is not None and entry.rollback is not None:
                rollbacks.append(entry.version)
            if entry is not None:
                _collect(entry, settings.device, places)
    except ProtocolError as error:
        audit.faults.append(error.detail)
    faults = audit.finish((state.head_version, state.head_digest or None))
    result = LogCheck(entries=audit.entries, version=audit.last[0] if audit.readable else -1, faults=faults)
    begins = audit.begins if audit.readable else 0
    turns = sorted([*((each, False) for each in merges), *((each, True) for each in rollbacks)])
    extent = _Extent(begins, min(merges, default=-1), max(merges, default=-1), has_sets, turns)
    for answered in sorted(answers, key=lambda each: (each.base, each.seq)):
        if answered.outcome == "accepted":
            _check_accepted(answered, places.get((answered.key, answered.seq), []), extent, result)
    _check_unknown(places, state, answers, result)
    return result


def _collect(entry: Entry, device: str, places: _Places) -> None:
    own = [each for each in entry.updates if each.device == device]
    own += [_part_of(each, member) for each in entry.sets for member in each.members if member.device == device]
    dropped = [each for each in entry.dropped if each.update.device == device]
    if own or dropped:
        for each in own:
            places[each.key, each.seq].append(_Place(entry.version, entry.weight, each))
        for gone in dropped:
            update = _contribution(gone.update, 0.0)
            places[update.key, update.seq].append(_Place(entry.version, entry.weight, update, gone.reason))


def _part_of(merged: MergedSet, member: PrivateMember) -> Contribution:
    """A member of a set: nobody can tell its weight from the others', so each is given an equal part."""
    return _contribution(member, merged.weight / len(merged.members))


def _contribution(member: PrivateMember, weight: float) -> Contribution:
    return Contribution(device=member.device, key=member.key, seq=member.seq, digest=member.digest, weight=weight)


def _check_accepted(answered: AnsweredUpdate, places: list[_Place], extent: _Extent, result: LogCheck) -> None:
    """An accepted update must be in exactly one version, at the latest in the first merge after its receipt.

    One that waited when versions were withdrawn is in none. A private one may wait through several merges; it is in
    exactly one version, or was dropped once.

    Two exceptions hold where the log begins later, since a ledger of an older format was migrated: updates merged
    before are in no entry, and those that waited then are in the first merge without a digest.
    """
    name = f"update {answered.seq} on version {answered.base}"
    match places:
        case []:
            if answered.version < extent.begins:
                result.unlogged.append(answered.seq)
            elif (back := extent.withdrawn_by(answered.version)) is not None:
                reason = "rollback: the versions that it was made on were withdrawn"
                result.dropped.append(Dropped(seq=answered.seq, base=answered.base, version=back, reason=reason))
            elif extent.newest_merge > answered.version and not extent.has_sets:
                result.faults.append(f"{name} was accepted at version {answered.version}, but is in no later version")
            else:
                result.waiting.append(answered.seq)
        case [place]:
            logged_late = extent.begins > 0 and place.version == extent.first_merge
            if not answered.digest or (logged_late and place.update.digest == UNKNOWN_DIGEST):
                result.unknown_bytes.append(answered.seq)
            elif place.update.digest != answered.digest:
                result.faults.append(f"{name} is in version {place.version}, but its digest differs from what was sent")
                return
            if place.dropped:
                gone = Dropped(seq=answered.seq, base=answered.base, version=place.version, reason=place.dropped)
                result.dropped.append(gone)
                return
            weight = place.update.weight
            share = weight / place.total if place.total else 0.0
            about = Merged(seq=answered.seq, base=answered.base, version=place.version, weight=weight, share=share)
            result.merged.append(about)
        case _:
            versions = " and ".join(str(place.version) for place in places)
            result.faults.append(f"{name} was merged more than once: in versions {versions}")


def _check_unknown(places: _Places, state: State, answers: Sequence[AnsweredUpdate], result: LogCheck) -> None:
    """The device must know each update under its name: by a receipt or, if that was lost, by the digest."""
    known = {(each.key, each.seq): b"" if each.outcome == "accepted" else each.digest for each in answers}
    if state.outstanding is not None:
        known[state.key, state.outstanding.seq] = b""
    for (key, seq), found in places.items():
        digest = known.get((key, seq))
        if digest is None and key != state.key:
            result.other_keys += len(found)
        elif len(answers) < RECEIPTS_MAX and (digest is None or digest not in {b"", found[0].update.digest}):
            result.faults.append(f"version {found[0].version} has update {seq}, which this device did not send")
