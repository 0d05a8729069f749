"""The log of merges: read from the ledger, checked against it, and exported to a file."""

from collections.abc import Iterator
from pathlib import Path

from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store import merge_log
from ternbus.aggregator.store.ledger import Ledger, reading
from ternbus.broker.errors import ConfigError, CorruptError, ProtocolError
from ternbus.broker.files import chunks, read_key, replacing
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.merge_log import Audit, Entry, Signed, unpack, unpack_all
from ternbus.broker.protocol.model_messages import Head

Published = tuple[int, bytes | None]


def verify(source: Path, public: bytes | None, head: Published | None) -> Audit:
    """Check a directory's log beside its ledger and its head, or a file that `export` wrote, by ``public`` alone."""
    if source.is_dir():
        with reading(source) as ledger:
            own = Identity(read_key(source / KEY)).public if public is None else public
            return verify_ledger(ledger, own, head)
    if public is None:
        raise ConfigError("checking a file needs the aggregator's public key: add --key HEX (every invitation has it)")
    audit = Audit(public=public)
    try:
        for signed in unpack_all(chunks(source)):
            audit.take(signed)
    except ProtocolError as error:
        audit.faults.append(error.detail)
    audit.finish(head)
    return audit


def verify_ledger(ledger: Ledger, public: bytes, head: Published | None) -> Audit:
    """The chain, and whether the other tables and the head that was published say the same."""
    audit = Audit(public=public, federation=ledger.fact("federation"))
    compared_from = int(ledger.fact(merge_log.COMPARED_FROM) or 0)
    for part in merge_log.parts(ledger):
        try:
            for version, packed in part:
                audit.faults += _faults(ledger, audit, version, packed, compared_from)
        except CorruptError as error:  # an archive
            audit.faults.append(str(error))
    try:
        frame = parse(ledger.frame(topics.head(audit.federation)))
        frame.check_authentic(public)
        published = Head.from_meta(frame.meta)
        audit.finish(head or (published.version, published.digest))
    except (ProtocolError, CorruptError) as error:
        audit.finish(head)
        why = error.reason if isinstance(error, ProtocolError) else "it is damaged"
        audit.faults.append(f"the head that was published last is not signed by this key ({why})")
    return audit


def _faults(ledger: Ledger, audit: Audit, version: int, packed: bytes, compared_from: int) -> list[str]:
    """What is wrong with an entry in the ledger, beside what the audit notes itself."""
    try:
        entry = audit.take(unpack(packed))
    except ProtocolError as error:
        return [f"version {version} is damaged: {error.detail}"]
    if entry is not None and entry.version != version:
        return [f"version {entry.version} stands in the place of version {version}"]
    if entry is not None and entry.version >= compared_from:
        return list(_differences(ledger, entry))
    return []


def _differences(ledger: Ledger, entry: Entry) -> Iterator[str]:
    if merge_log.digest(ledger, entry.version) != entry.digest:
        yield f"version {entry.version} has another digest in the ledger than in the log"
    found = merge_log.merged(ledger, entry.version)
    logged = {(device, bytes(key), seq, digest) for device, key, seq, digest in entry.named}
    if entry.is_late_beginning:
        return  # it names none of the version's updates
    for device, _, seq, _ in sorted(found - logged):
        yield f"version {entry.version} holds update {seq} of {device} in the ledger, and not in the log"
    for device, _, seq, _ in sorted(logged - found):
        yield f"version {entry.version} holds update {seq} of {device} in the log, and not in the ledger"
    for dropped in entry.dropped:
        update = dropped.update
        if not merge_log.is_dropped(ledger, update):
            yield f"version {entry.version} says that update {update.seq} of {update.device} was dropped: it was not"


def entries(source: Path, version: int | None = None) -> Iterator[tuple[Entry, Signed]]:
    """What a directory's log or an exported file says, unchecked; ConfigError where it cannot be read."""
    try:
        for signed in _signed(source, version):
            entry = Entry.parse(signed.content)
            if version in {None, entry.version}:
                yield entry, signed
    except ProtocolError as error:
        raise ConfigError(f"{source}: {error.detail}; `ternbus aggregator log verify` lists all faults") from error


def _signed(source: Path, version: int | None = None) -> Iterator[Signed]:
    if not source.is_dir():
        yield from unpack_all(chunks(source))
        return
    with reading(source) as ledger:
        for _, packed in merge_log.entries(ledger, version):
            yield unpack(packed)


def export(directory: Path, out: Path) -> None:
    """Write the log as it is now: entries one behind the other, so that a later export begins with this one."""
    with reading(directory) as ledger, replacing(out) as partial, partial.open("wb") as file:
        for _, packed in merge_log.entries(ledger):
            file.write(packed)
