"""From the ledger back to a running state: the last snapshot, and every merge since then done again."""

import json
from dataclasses import replace

import numpy as np

from aggregator.core import Core
from aggregator.ledger import Ledger, unsigned
from aggregator.model import Accepted, Model
from aggregator.optimizer import ServerState
from aggregator.press import Kept
from aggregator.registry import ACTIVE, REVOKED, Answer, Member, Registry
from aggregator.settings import OptimizerSettings, Settings
from broker import topics
from broker.errors import ConfigError
from broker.identity import Identity, KeyId
from broker.messages import SnapshotRef
from broker.schema import Schema, type_f32
from broker.ternary import Block


def recover(ledger: Ledger, settings: Settings, identity: Identity, software: str) -> Core:
    """The core as it was when its last record became durable."""
    schema = ledger.schema()
    version, parts, content_bytes, place = json.loads(ledger.fact("snapshot"))
    kept = Kept(
        state=ledger.fact("state"),
        snapshot=SnapshotRef(version=version, parts=parts, content_bytes=content_bytes, place=place),
        sizes=dict(ledger.db.execute("SELECT topic, length(payload) FROM frames").fetchall()),
        head_frame=ledger.frame(topics.head(settings.federation)),
        slots=int(ledger.fact("slots")),
        optimizer=_optimizer(ledger),
    )
    return Core(
        settings=settings,
        identity=identity,
        schema=schema,
        model=recover_model(ledger, settings, schema),
        registry=_registry(ledger, settings),
        kept=kept,
        seq=int(ledger.fact("seq")),
        session=int(ledger.fact("session")),
        software=software,
    )


def recover_model(ledger: Ledger, settings: Settings, schema: Schema) -> Model:
    """Published vector, server state and buffer.

    The published vector follows the deltas as they were sent, so its bits never depend on this replay; what the
    server's own vector has beyond it is recomputed from the updates.
    """
    then = replace(settings, optimizer=_optimizer(ledger))  # the settings may have been changed since
    start, target, momentum = ledger.db.execute("SELECT version, target, momentum FROM server").fetchone()
    server = ServerState(_vector(target), None if momentum is None else _vector(momentum))
    model = Model(settings=then, schema=schema, version=start, published=ledger.vector(start), server=server)
    made = ledger.db.execute(
        "SELECT version, digest, codec, encoding, body FROM versions WHERE version > ? ORDER BY version", (start,)
    ).fetchall()
    for version, digest, codec, encoding, body in made:
        _refill(ledger, model, "merged = ?", (version,))
        model.step_server()
        model.publish(Block.read(schema, codec, encoding, body))
        model.buffer = []
        if model.digest != digest:
            raise ConfigError(f"{ledger.path}: version {version} does not have its digest; restore it from a backup")
    model.settings = settings
    _refill(ledger, model, "merged IS NULL", ())
    return model


def _optimizer(ledger: Ledger) -> OptimizerSettings:
    name, learning_rate, momentum = json.loads(ledger.fact("optimizer"))
    return OptimizerSettings(name=name, learning_rate=learning_rate, momentum=momentum)


def _refill(ledger: Ledger, model: Model, where: str, values: tuple[int, ...]) -> None:
    rows = ledger.db.execute(
        "SELECT device, staleness, samples, discount, codec, encoding, segment, place, size, checksum"  # noqa: S608 - our own text
        " FROM updates"
        f" WHERE {where} ORDER BY id",
        values,
    )
    for device, staleness, samples, worth, codec, encoding, *place in rows:
        block = Block.read(model.schema, codec, encoding, ledger.body(*place))
        model.accept(Accepted(device=device, staleness=staleness, samples=samples), block, worth)


def _vector(content: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.frombuffer(content, dtype=type_f32).astype(np.float32)


def _registry(ledger: Ledger, settings: Settings) -> Registry:
    registry = Registry(settings.federation, codes=ledger.codes())
    for name, public, proof, state in ledger.db.execute("SELECT name, public, proof, state FROM devices"):
        registry.members[name] = Member(name=name, public=public, proof=proof, revoked=state == REVOKED)
    rows = ledger.db.execute("SELECT device, key, public, state, seq, outcome, reason, metrics_seq FROM keys")
    for device, key, public, state, seq, outcome, reason, metrics_seq in rows:
        member = registry.members[device]
        if key == member.key:
            member.answer = Answer(seq=unsigned(seq), outcome=outcome, reason=reason)
            member.metrics_seq = unsigned(metrics_seq)
        elif state != ACTIVE:
            member.old_keys[KeyId(key)] = (public, state)
    oldest = int(ledger.fact("version")) - settings.staleness.max
    for device, base in ledger.db.execute("SELECT device, max(base) FROM updates GROUP BY device"):
        registry.members[device].highest_base = base
    for device, base in ledger.db.execute("SELECT device, base FROM updates WHERE base >= ?", (oldest,)):
        registry.members[device].bases.add(base)
    for (device,) in ledger.db.execute("SELECT DISTINCT device FROM metrics WHERE split = 'test'"):
        registry.members[device].evaluates = registry.members[device].highest_base < 0
    return registry
