"""The check of the aggregator's log of merges against a device's receipts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.files import chunks
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import UNKNOWN_DIGEST, Audit, Contribution, Entry, unpack_all
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.shell.directory import Settings
from ternbus.edge.shell.outbox import RECEIPTS_MAX

SHOWN: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """An update of the device in a version; ``share`` is its part of the version's total weight."""

    seq: int
    base: int
    version: int
    weight: float
    share: float


@dataclass(slots=True)
class LogCheck:
    """What a log holds of one device. Without ``faults`` the aggregator did what it promised."""

    entries: int = 0
    version: int = -1
    merged: list[Merged] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # accepted, and not merged by the log's last version
    unlogged: list[int] = field(default_factory=list)  # accepted, and perhaps merged before the log begins
    unknown_bytes: list[int] = field(default_factory=list)  # merged, but log or receipt has no digest of what was sent
    other_keys: int = 0  # the device's updates under keys that this folder never had
    faults: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        return {
            "ok": not self.faults,
            "faults": self.faults,
            "entries": self.entries,
            "version": self.version,
            "merged": [asdict(each) for each in self.merged],
            "waiting": self.waiting,
            "unlogged": self.unlogged,
            "unknown_bytes": self.unknown_bytes,
            "other_keys": self.other_keys,
        }

    def report(self, device: str) -> str:
        lines = [f"fault: {fault}" for fault in self.faults]
        same = len(self.merged) - len(self.unknown_bytes)
        lines.append(
            f"{device}: {same} accepted updates are in the log as they were sent, {len(self.waiting)} wait "
            f"for a version after its last, {self.version}"
        )
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
                f"{self.other_keys} more are under other keys than this folder had, and cannot be checked here"
            )
        lines += [
            f"  update {each.seq} on version {each.base}: in version {each.version} with weight {each.weight:g}, "
            f"{100 * each.share:.1f} % of it"
            for each in self.merged[-SHOWN:]
        ]
        if len(self.merged) > SHOWN:
            lines.append(f"  (the last {SHOWN}; all of them with --json)")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the log has an update of the device."""

    version: int
    total: float
    update: Contribution


@dataclass(frozen=True, slots=True)
class _Extent:
    """Which versions a log is about; -1 for no merge."""

    begins: int
    first_merge: int
    newest_merge: int


_Places = dict[tuple[KeyId, int], list[_Place]]


def check(log: Path, settings: Settings, state: State, answers: Sequence[AnsweredUpdate]) -> LogCheck:
    """Check a log file against the device's state and its receipts, ``answers``, in any order."""
    audit = Audit(public=bytes.fromhex(settings.aggregator_key), federation=settings.federation)
    places: _Places = defaultdict(list)
    merges: list[int] = []
    try:
        for signed in unpack_all(chunks(log)):
            entry = audit.take(signed)
            if entry is not None and entry.updates:
                merges.append(entry.version)
                _collect(entry, settings.device, places)
    except ProtocolError as error:
        audit.faults.append(error.detail)
    faults = audit.finish((state.head_version, state.head_digest or None))
    result = LogCheck(entries=audit.entries, version=audit.last[0] if audit.readable else -1, faults=faults)
    begins = audit.begins if audit.readable else 0
    extent = _Extent(begins, min(merges, default=-1), max(merges, default=-1))
    for answered in sorted(answers, key=lambda each: (each.base, each.seq)):
        if answered.outcome == "accepted":
            _check_accepted(answered, places.get((answered.key, answered.seq), []), extent, result)
    _check_unknown(places, state, answers, result)
    return result


def _collect(entry: Entry, device: str, places: _Places) -> None:
    own = [each for each in entry.updates if each.device == device]
    if own:
        total = sum(each.weight for each in entry.updates)
        for each in own:
            places[each.key, each.seq].append(_Place(entry.version, total, each))


def _check_accepted(answered: AnsweredUpdate, places: list[_Place], extent: _Extent, result: LogCheck) -> None:
    """An accepted update must be in one version, the first merge after its receipt at the latest, as it was sent.

    It need not where the log begins later, since a ledger of an older format was migrated. The updates that waited then
    are in the first merge, without a digest.
    """
    name = f"update {answered.seq} on version {answered.base}"
    match places:
        case []:
            if answered.version < extent.begins:
                result.unlogged.append(answered.seq)
            elif extent.newest_merge > answered.version:
                result.faults.append(f"{name} was accepted by version {answered.version}, and is in no version since")
            else:
                result.waiting.append(answered.seq)
        case [place]:
            logged_late = extent.begins > 0 and place.version == extent.first_merge
            if not answered.digest or (logged_late and place.update.digest == UNKNOWN_DIGEST):
                result.unknown_bytes.append(answered.seq)
            elif place.update.digest != answered.digest:
                result.faults.append(f"{name} is in version {place.version} with another digest than what was sent")
                return
            weight = place.update.weight
            share = weight / place.total if place.total else 0.0
            about = Merged(seq=answered.seq, base=answered.base, version=place.version, weight=weight, share=share)
            result.merged.append(about)
        case _:
            versions = " and ".join(str(place.version) for place in places)
            result.faults.append(f"{name} was merged more than once: in versions {versions}")


def _check_unknown(places: _Places, state: State, answers: Sequence[AnsweredUpdate], result: LogCheck) -> None:
    """The device must know each update in its name: by a receipt or, where that was lost, by the digest."""
    known = {(each.key, each.seq): b"" if each.outcome == "accepted" else each.digest for each in answers}
    if state.outstanding is not None:
        known[state.key, state.outstanding.seq] = b""
    for (key, seq), found in places.items():
        digest = known.get((key, seq))
        if digest is None and key != state.key:
            result.other_keys += len(found)
        elif len(answers) < RECEIPTS_MAX and (digest is None or digest not in {b"", found[0].update.digest}):
            result.faults.append(f"version {found[0].version} holds update {seq} in our name, of which we know nothing")
