"""What must hold of a federation of private sums, whatever has happened to it; it is closed, and nothing runs."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crash.differences import accepted, recomputed, rows
from crash.federation import Federation
from crash.private import MIN, PrivateFederation
from ternbus.broker.protocol.merge_log import DroppedUpdate, Entry, MergedSet, PrivateMember, unpack_all
from ternbus.edge.store import outbox
from ternbus.helper.core.opening_log import Opening, checked
from ternbus.helper.store import store as helper_store

Name = tuple[str, bytes, int, bytes]  # device, key id, seq, digest of the message
DROPPED: Final = -1
REASONS: Final = {"below-min"}  # all that honest parties, whom nobody revokes, can bring about


@dataclass(frozen=True, slots=True)
class Fate:
    """Where the log of merges has an update."""

    version: int
    base: int = -1  # of its set
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Story:
    """What the aggregator's log and the helpers' logs say."""

    entries: Sequence[Entry]
    openings: Mapping[str, Sequence[Opening]]  # by helper

    @property
    def sets(self) -> dict[bytes, MergedSet]:
        return {each.digest: each for entry in self.entries for each in entry.sets}

    @property
    def dropped(self) -> list[DroppedUpdate]:
        return [each for entry in self.entries for each in entry.dropped]

    def fates(self) -> dict[Name, list[Fate]]:
        found: dict[Name, list[Fate]] = defaultdict(list)
        for entry in self.entries:
            for merged in entry.sets:
                for member in merged.members:
                    found[_name(member)].append(Fate(entry.version, base=merged.base))
            for gone in entry.dropped:
                found[_name(gone.update)].append(Fate(entry.version, reason=gone.reason))
        return found

    def summary(self) -> str:
        members = sum(len(each.members) for each in self.sets.values())
        opened = ", ".join(f"{name} opened {len(found)}" for name, found in self.openings.items())
        reasons = Counter(each.reason.partition(":")[0] for each in self.dropped)
        return (
            f"{len(self.entries) - 1} versions, {len(self.sets)} sets of {members} updates, {opened}, "
            f"dropped {dict(reasons)}"
        )


def _name(member: PrivateMember) -> Name:
    return member.device, bytes(member.key), member.seq, member.digest


def read(federation: PrivateFederation) -> Story:
    log = federation.folder / "sets.log"
    federation.command("log", "aggregator", "log", "export", federation.home, log)
    return Story(
        [Entry.parse(signed.content) for signed in unpack_all([log.read_bytes()])],
        {name: _openings(federation.device(name), key) for name, key in federation.keys.items()},
    )


def _openings(folder: Path, key: str) -> list[Opening]:
    return list(checked(helper_store.log(folder), bytes.fromhex(key)))


def found(federation: PrivateFederation, story: Story) -> list[str]:
    """Every difference from what must hold, in words."""
    return [
        *_fates(federation, story),
        *_receipts(federation, story),
        *_helpers(federation, story),
        *_devices(federation),
        *_alarms(federation),
        *recomputed(federation),
    ]


def _fates(federation: Federation, story: Story) -> Iterator[str]:
    """Each accepted update is in one version, or dropped with a reason, once."""
    fates = story.fates()
    for name, places in fates.items():
        if len(places) != 1:
            yield f"{name[0]}'s update {name[2]} is in the log {len(places)} times: {places}"
        if any(each.reason and each.reason.partition(":")[0] not in REASONS for each in places):
            yield f"{name[0]}'s update {name[2]} was dropped for no good reason: {places}"
    query = "SELECT device, key, seq, digest, base, merged FROM updates"
    for device, key, seq, digest, base, merged in rows(federation, query):
        places = fates.pop((device, key, seq, digest), [])
        expected = [Fate(merged, base=base)] if merged != DROPPED else [each for each in places[:1] if each.reason]
        if places != expected or not places:
            yield f"{device}'s update {seq} on version {base}, merged in {merged}, is in the log as {places}"
    yield from (f"the log has {name[0]}'s update {name[2]}, the ledger has not" for name in fates)
    counts = {entry.version: sum(len(each.members) for each in entry.sets) for entry in story.entries}
    if counts != dict(rows(federation, "SELECT version, updates FROM versions")):
        yield "the versions do not count each update once"
    if sorted(counts) != list(range(len(counts))):
        yield f"the versions are not 0 to {len(counts) - 1}"


def _receipts(federation: Federation, story: Story) -> Iterator[str]:
    """What a device holds a receipt for is in the log once; what the ledger has, its device was told."""
    fates = story.fates()
    for device in federation.devices:
        held = accepted(federation, device)
        for answer in held:
            places = fates.get((device, bytes(answer.key), answer.seq, answer.digest), [])
            if len(places) != 1 or places[0].base not in {answer.base, -1}:
                yield f"{device} holds a receipt for {answer.seq} on version {answer.base}, the log has {places}"
        bases = Counter(answer.base for answer in held)
        yield from (f"{device} holds {count} receipts for version {base}" for base, count in bases.items() if count > 1)
        newest = max(bases, default=-1)
        kept = rows(federation, f"SELECT base FROM updates WHERE device = '{device}'")
        yield from (
            f"{device} lost the receipt for version {base}" for (base,) in kept if base <= newest and base not in bases
        )


def _helpers(federation: Federation, story: Story) -> Iterator[str]:
    """No update is in two sums; each set is the same in all logs; what was opened was merged, or dropped."""
    merged = story.sets
    dropped = set(rows(federation, f"SELECT device, base FROM updates WHERE merged = {DROPPED}"))
    for name, openings in story.openings.items():
        used = Counter((device, each.base) for each in openings for device, _ in each.members)
        yield from (f"{name} opened two sets with {update}" for update, count in used.items() if count > 1)
        by_digest = {each.digest: each for each in openings}
        if len(by_digest) != len(openings):
            yield f"{name} wrote a set down twice"
        for opening in openings:
            devices = [device for device, _ in opening.members]
            if len(devices) < MIN:
                yield f"{name} opened a set of {devices}"
            if opening.digest not in merged and not dropped.issuperset((device, opening.base) for device in devices):
                yield f"{name} opened a set of {devices} on version {opening.base} that is neither merged nor dropped"
        for digest, each in merged.items():
            found = by_digest.get(digest)
            if found is None:
                yield f"{name} never opened the set on version {each.base} that was merged"
            elif (found.base, found.context, {device for device, _ in found.members}) != (
                each.base, each.context, {member.device for member in each.members},
            ):  # fmt: skip
                yield f"{name} opened another set on version {each.base} than what was merged"


def _devices(federation: Federation) -> Iterator[str]:
    """The devices have followed to the aggregator's model."""
    ((version, digest),) = rows(federation, "SELECT version, digest FROM versions ORDER BY version DESC LIMIT 1")
    for device in federation.devices:
        state = outbox.summary(federation.device(device)).state
        if (state.head_version, state.head_digest) != (version, digest):
            yield f"{device} has version {state.head_version}, the aggregator {version}, or another model"
        if state.outstanding is not None:
            yield f"{device} has an update that nobody has answered"


def _alarms(federation: Federation) -> Iterator[str]:
    """Nobody was told to restore a helper that has forgotten nothing."""
    for path in sorted((federation.folder / "logs").iterdir()):
        if "ternbus helper restored" in path.read_text(errors="replace"):
            yield f"{path} says that a helper has forgotten sets"
