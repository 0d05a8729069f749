"""Recovery of private updates and sets from the ledger, also of merged ones."""

from collections.abc import Iterator

from ternbus.aggregator.core.sets import Held
from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate
from ternbus.aggregator.merge.staleness import discount
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import unsigned
from ternbus.aggregator.sums.decode import SetSum, decode
from ternbus.aggregator.sums.private_sets import (
    ABANDONED,
    OPENED,
    OpenedSet,
    PrivateSet,
    PrivateUpdate,
    read_words,
)
from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import DroppedUpdate, Entry, PrivateMember
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.sets import SetMember


def held(ledger: Ledger, settings: Settings, schema: Schema, sums: PrivateSums) -> Held:
    """What the ledger has of private updates that no version contains."""
    found = Held(waiting=list(_updates(ledger, sums, "p.set_digest IS NULL", ())), dropped=list(_dropped(ledger)))
    rows = ledger.db.execute("SELECT digest, base, staleness, state, sum FROM sets WHERE merged IS NULL ORDER BY rowid")
    for digest, base, staleness, state, total in rows.fetchall():
        about = context_of(ledger, sums, base)
        if state == ABANDONED:
            found.abandoned[digest] = tuple(each.card.helper for each in about.terms.helpers)
            continue
        members = tuple(_updates(ledger, sums, "p.set_digest = ?", (digest,)))
        made = PrivateSet(about=about, staleness=staleness, members=members, state=state)
        if made.digest != digest:
            raise ledger.corrupt(f"a set of updates on version {base} is not as it was made")
        if state == OPENED:
            worth = discount(settings.staleness, staleness)
            found.opened.append(OpenedSet.of(made, worth, _sum(ledger, schema, about, len(members), total)))
        else:
            found.sets.append(made)
    return found


def merged(
    ledger: Ledger, settings: Settings, schema: Schema, sums: PrivateSums, version: int
) -> Iterator[BufferedUpdate]:
    """What a version's sets came to, in the order of its merge, which is that of its entry in the log of merges."""
    found = {}
    rows = ledger.db.execute("SELECT digest, base, staleness, devices, sum FROM sets WHERE merged = ?", (version,))
    for digest, base, staleness, devices, total in rows.fetchall():
        about = context_of(ledger, sums, base)
        opened = OpenedSet(
            about=about,
            digest=digest,
            staleness=staleness,
            discount=discount(settings.staleness, staleness),
            members=(),
            sum=_sum(ledger, schema, about, devices, total),
        )
        found[digest] = opened.buffered
    named = [each.digest for each in Entry.parse(ledger.entry(version).content).sets]
    if set(named) != found.keys():
        raise ledger.corrupt(f"the log of merges names other sets than those of version {version}")
    return (found[digest] for digest in named)


def context_of(ledger: Ledger, sums: PrivateSums, base: int) -> ContextOf:
    """The context of a set in the ledger."""
    about = sums.contexts.get(base)
    if about is None:
        raise ledger.corrupt(f"the context of private updates on version {base} is not there")
    return about


def _sum(ledger: Ledger, schema: Schema, about: ContextOf, devices: int, total: bytes) -> SetSum:
    try:
        return decode(about.terms, schema, about.terms.layout.read(total), devices)
    except ProtocolError as error:
        raise ledger.corrupt(f"the sum of a set on version {about.base} is not as it was written") from error


def _updates(ledger: Ledger, sums: PrivateSums, where: str, values: tuple[bytes, ...]) -> Iterator[PrivateUpdate]:
    rows = ledger.db.execute(
        "SELECT u.device, u.key, u.seq, u.base, u.digest, u.staleness, u.samples, u.discount, u.codec, u.encoding,"  # noqa: S608 - our own text
        " u.epsilon, u.segment, u.place, u.size, u.checksum, p.context, p.header, p.signature, p.min, k.public,"
        " s.state"
        " FROM private_updates p JOIN updates u ON u.id = p.update_id JOIN keys k ON k.device = u.device"
        " AND k.key = u.key LEFT JOIN sets s ON s.digest = p.set_digest"
        f" WHERE u.merged IS NULL AND {where} ORDER BY u.id",
        values,
    )
    for row in rows:
        device, key, seq, base, digest, staleness, samples, worth, codec, encoding, epsilon = row[:11]
        context, header, signature, least, public, state = row[15:]
        update = AcceptedUpdate(
            device=device,
            key=KeyId(key),
            seq=unsigned(seq),
            base=base,
            digest=digest,
            staleness=staleness,
            samples=samples,
            discount=worth,
            codec=codec,
            encoding=encoding,
            epsilon=epsilon,
        )
        terms = context_of(ledger, sums, base).terms
        yield PrivateUpdate(
            update=update,
            context=context,
            min=least,
            member=SetMember(public=public, header=header, signature=signature),
            size_bytes=row[13],
            words=None if state == OPENED else read_words(terms, ledger.body(*row[11:15])),
        )


def _dropped(ledger: Ledger) -> Iterator[DroppedUpdate]:
    rows = ledger.db.execute(
        "SELECT u.device, u.key, u.seq, u.digest, p.why FROM private_updates p JOIN updates u ON u.id = p.update_id"
        " WHERE p.why != '' AND p.logged IS NULL ORDER BY u.id"
    )
    for device, key, seq, digest, why in rows:
        named = PrivateMember(device=device, key=KeyId(key), seq=unsigned(seq), digest=digest)
        yield DroppedUpdate(update=named, reason=why)
