"""Recovery of the core's state from the ledger: the last snapshot, and each merge since, computed again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from ternbus.aggregator.core import pace
from ternbus.aggregator.core.canary import Judged, Recalled
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.core.registry import ACTIVE, REVOKED, Answer, Member, Registry
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.sets import Held
from ternbus.aggregator.core.versions import PublishedState
from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate, Journal
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.merge.influence import Influence
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.store import (
    best_versions,
    candidate_rows,
    influence_rows,
    membership,
    merge_log,
    private_rows,
    search_rows,
    set_recovery,
    soundness,
    statistics_rows,
    status,
)
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.rows import CLOSING, FLOOR, SHOWN, unsigned
from ternbus.aggregator.store.schema import DROPPED, STATED
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.errors import ConfigError
from ternbus.broker.path_errors import quoted
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.direction import primary_of
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity, KeyId
from ternbus.broker.protocol.model_messages import SnapshotRef
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import Block


def recover(ledger: Ledger, settings: Settings, identity: Identity, software: str) -> Core:
    """The core as it was when its last record became durable; CorruptError where what it is made of was changed."""
    soundness.check_start(ledger, settings, identity.public)
    _check_archived(ledger, settings)
    ledger.keep = settings.versions.keep
    ledger.leaving = partial(best_versions.keep, ledger, settings.versions.keep_best)
    schema = ledger.schema()
    sums = private_rows.recover(ledger.db, settings, schema)
    version, parts, content_bytes, place = json.loads(ledger.fact("snapshot"))
    published = PublishedState(
        state=ledger.fact("state"),
        snapshot=SnapshotRef(version=version, parts=parts, content_bytes=content_bytes, place=place),
        snapshot_seq=parse(ledger.frame(topics.snapshot(settings.federation, place, 0))).seq,
        sizes=dict(ledger.db.execute("SELECT topic, length(payload) FROM frames").fetchall()),
        head_frame=ledger.frame(topics.head(settings.federation)),
        slots=int(ledger.fact("slots")),
        recipe=Recipe.loads(ledger.fact("recipe")),
        log_hash=ledger.last_entry().hash,
        terms_seq=_terms_seq(ledger, settings.federation),
        revoked=_published_revocations(ledger, settings.federation),
        floor=int(ledger.fact(FLOOR) or 0),
        shown=set(json.loads(ledger.fact(SHOWN) or "[]")),
    )
    model = recover_model(ledger, settings, schema, sums)
    candidate = _candidate(ledger, settings, schema, model)
    return Core(
        settings=settings,
        identity=identity,
        schema=schema,
        model=model,
        registry=_registry(ledger, settings),
        published=published,
        seq=int(ledger.fact("seq")),
        session=int(ledger.fact("session")),
        software=software,
        directory=quoted(ledger.path.parent),
        influence=influence_rows.recalled(ledger.db) if settings.merge.is_bounded else Influence(),
        sums=sums,
        helper_codes=private_rows.codes(ledger.db),
        held=Held() if sums is None else set_recovery.held(ledger, settings, schema, sums),
        recalled=Recalled(
            candidate=candidate,
            references=candidate_rows.references(ledger.db, settings.canary.group),
            dissolves=candidate is None and ledger.fact(candidate_rows.CANDIDATE) is not None,
        ),
        statistics=statistics_rows.read(ledger.db),
        is_closing=ledger.fact(CLOSING) is not None,
        search=_search(ledger, settings),
    )


def _search(ledger: Ledger, settings: Settings) -> Search:
    state = search_rows.read(ledger.db)
    judges = state is not None and state.settings.is_of_widths  # of rates, updates say what they gain
    found = search_rows.judgements(ledger.db, state.since) if state is not None and judges else ()
    return Search.of(settings.search, ledger.version, state, found)


def _candidate(ledger: Ledger, settings: Settings, schema: Schema, model: Model) -> Judged | None:
    """The candidate, with what came after it left in the buffer; None without one, or after a change of settings."""
    last = candidate_rows.last_of(ledger.db)
    if last is None or not settings.canary.group or Recipe.loads(ledger.fact("recipe")) != Recipe.of(settings):
        return None
    model.refill(_updates(ledger, schema, "merged IS NULL AND id <= ?", (last,)))
    try:
        candidate = candidate_rows.recover(ledger.db, model)
    except ValueError as error:
        raise ledger.corrupt(str(error)) from error
    model.refill(_updates(ledger, schema, "merged IS NULL AND id > ?", (last,)))
    return candidate


def _check_archived(ledger: Ledger, settings: Settings) -> None:
    """Whatever is not stale must be known, or it could be accepted twice: the setting may have been raised."""
    archives = merge_log.archives(ledger)
    if archives and ledger.version - settings.staleness.max < (before := archives[-1].before):
        raise ConfigError(
            f"{ledger.path.parent}: staleness.max = {settings.staleness.max} reaches below version {before}, where "
            f"updates are archived; set it to at most {ledger.version - before}"
        )


def _terms_seq(ledger: Ledger, federation: str) -> int:
    frame = ledger.frame(topics.terms(federation, 0))
    return parse(frame).seq if frame else 0


def _published_revocations(ledger: Ledger, federation: str) -> int:
    page = keys = 0
    while frame := ledger.frame(topics.revocations(federation, page)):
        keys += len(revocations.read(parse(frame).body))
        page += 1
    return keys


def recover_model(ledger: Ledger, settings: Settings, schema: Schema, sums: PrivateSums | None = None) -> Model:
    """Published vector, server state and buffer.

    The published vector follows the deltas as they were sent, so its bits never depend on this replay; what the
    server's own vector has beyond it is recomputed from the updates.
    """
    recipe = Recipe.loads(ledger.fact("recipe"))  # the settings may have been changed since
    then = replace(settings, merge=recipe.merge, optimizer=recipe.optimizer)
    start, server = ledger.server()
    kinds = ledger.kinds()
    model = Model(
        settings=then,
        schema=schema,
        version=start,
        published=ledger.vector(start),
        server=server,
        kinds=kinds if recipe.averages_statistics else TensorKinds(),
        summing=ExactSum if recipe.exact_sums else Accumulator,
    )
    for version, digest, block in ledger.deltas(schema, start, ledger.version):
        if sums is None:
            model.refill(_updates(ledger, schema, "merged = ?", (version,)))
        else:
            model.refill(set_recovery.merged(ledger, settings, schema, sums, version))
        if model.buffer:  # a version of no update is none of the optimizer's
            model.step_server()
        model.publish(block)
        ledger.check_digest(version, digest, model.digest)
    model.settings, model.kinds, model.summing = settings, kinds, ExactSum
    model.refill(Waiting(ledger, schema) if sums is None else ())
    return model


@dataclass(frozen=True, slots=True)
class Waiting(Journal):
    """What the buffer holds, in the order in which it came."""

    ledger: Ledger
    schema: Schema

    def __iter__(self) -> Iterator[BufferedUpdate]:
        return _updates(self.ledger, self.schema, "merged IS NULL", ())

    def of(self, device: str) -> Iterator[BufferedUpdate]:
        return _updates(self.ledger, self.schema, "merged IS NULL AND device = ?", (device,))


def _updates(ledger: Ledger, schema: Schema, where: str, values: tuple[int | str, ...]) -> Iterator[BufferedUpdate]:
    rows = ledger.db.execute(
        "SELECT device, key, seq, base, digest, staleness, samples, discount, codec, encoding, epsilon,"  # noqa: S608 - our own text
        " norm, stated,"
        f" (SELECT value FROM facts WHERE name = '{search_rows.ARM}' || id),"
        " segment, place, size, checksum"
        " FROM updates"
        f" WHERE {where} ORDER BY id",
        values,
    )
    for row in rows:
        device, key, seq, base, digest, staleness, samples, discount, codec, encoding, epsilon, norm, stated = row[:13]
        arm = search_rows.arm_of(row[13])
        update = AcceptedUpdate(
            device=device,
            key=KeyId(key),
            seq=unsigned(seq),
            base=base,
            digest=digest,
            staleness=staleness,
            samples=samples,
            discount=discount,
            codec=codec,
            encoding=encoding,
            epsilon=epsilon,
            norm=norm,
            stated=stated,
            **arm,
        )
        yield update, Block.read(schema, codec, encoding, ledger.body(*row[14:]))


def _registry(ledger: Ledger, settings: Settings) -> Registry:
    registry = Registry(settings.federation, codes=membership.codes(ledger.db))
    rows = ledger.db.execute("SELECT name, public, proof, state, why, role FROM devices")
    for name, public, proof, state, why, role in rows:
        registry.members[name] = Member(
            name=name, public=public, proof=proof, revoked=state == REVOKED, revoked_why=why, role=role
        )
    rows = ledger.db.execute(
        "SELECT device, key, public, state, seq, outcome, reason, metrics_seq, highest_base FROM keys"
    )
    for device, key, public, state, seq, outcome, reason, metrics_seq, highest_base in rows:
        member = registry.members[device]
        member.highest_base = max(member.highest_base, highest_base)
        if state != ACTIVE:
            registry.retired.add(public)
        if key == member.key:
            member.answer = Answer(seq=unsigned(seq), outcome=outcome, reason=reason)
            member.metrics_seq = unsigned(metrics_seq)
        else:
            member.old_keys[KeyId(key)] = (public, state)
    oldest = max(ledger.version - settings.staleness.max, int(ledger.fact(FLOOR) or 0))
    # an update is merged into a version above its base, if at all
    late = ledger.db.execute(
        "SELECT device, base FROM updates WHERE (merged > ?1 OR merged = ?2 OR merged IS NULL) AND base >= ?1",
        (oldest, DROPPED),
    )
    for device, base in late:
        registry.members[device].bases.add(base)
    for device, size in ledger.db.execute("SELECT device, sum(size) FROM updates WHERE merged IS NULL GROUP BY device"):
        registry.members[device].waiting_bytes = size
    for device, size in ledger.db.execute("SELECT device, sum(length(entries)) FROM metrics GROUP BY device"):
        registry.members[device].metrics_bytes = size
    for member in registry.members.values():
        if member.highest_base < 0 and not member.evaluates:  # so it has few other metrics, if any
            sent = "SELECT 1 FROM metrics WHERE device = ? AND split = 'test' LIMIT 1"
            member.evaluates = ledger.db.execute(sent, (member.name,)).fetchone() is not None
    _recall_pace(ledger, registry)
    if settings.home_assistant.discovery_prefix:
        _recall_shown(ledger, registry)
    return registry


def _recall_shown(ledger: Ledger, registry: Registry) -> None:
    """What others are shown of devices, until these say it again; it decides nothing."""
    for name, row in status.read_ledger(ledger, 1)["devices"].items():
        member = registry.members[name]
        member.seen_at, member.epsilon, member.loss = row["seen_at"], row["epsilon"], row["loss"]
    newest = "SELECT device, entries, max(received_at) FROM metrics WHERE split != ? GROUP BY device"
    for device, entries, _ in ledger.db.execute(newest, (STATED,)):
        values = json.loads(entries)
        if (primary := primary_of(values)) is not None:
            registry.members[device].metric = primary, values[primary]


def _recall_pace(ledger: Ledger, registry: Registry) -> None:
    """How often devices have sent updates, of those that were online at the end: nobody waits for the others."""
    online = ledger.db.execute("SELECT name FROM devices WHERE status NOT IN ('', 'offline')").fetchall()
    for (device,) in online:
        rows = ledger.db.execute(
            "SELECT received_at FROM updates WHERE device = ? ORDER BY base DESC LIMIT ?", (device, pace.RECENT + 1)
        ).fetchall()
        registry.members[device].pace.recall([moment for (moment,) in reversed(rows)])
