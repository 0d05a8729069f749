"""The initial state of a simulated federation: the aggregator's core and ledger, and the devices."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Final

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import first_version, records, registry
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.core.registry import Invited, Registry
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import ledger as durable
from ternbus.aggregator.store import maintenance
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.schema import Schema, Vector, to_vector
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.edge.core.follower import InitialModel
from ternbus.edge.core.profile import Profile
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.task import Task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.scenario.scenario import Scenario, Simulated
from ternbus.lab.virtual.memory_broker import Line
from ternbus.lab.virtual.memory_ledger import Ledger, MemoryLedger
from ternbus.lab.virtual.training import InProcess, Place, pairs
from ternbus.lab.virtual.virtual_device import Body

FEDERATION: Final = "lab"
EVALUATOR: Final = "evaluator"  # the sender of the simulation's test metrics
SOFTWARE: Final = "ternbus lab simulate"
URL: Final = "mqtt://localhost"  # required by the settings, but not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """An aggregator's ledger, a function that opens its core, and the invitation code of each device."""

    ledger: Ledger
    core: Callable[[], Core]
    codes: Mapping[str, str] = field(repr=False)


def on_disk(
    folder: Path,
    names: Sequence[str],
    model: Tensors,
    chosen: Mapping[str, object],
    *,
    dense: Sequence[str] = (),
    kinds: TensorKinds | None = None,
) -> Setup:
    """A setup with a real aggregator directory, which `ternbus aggregator` can read afterwards."""
    administration.create(
        folder, federation=FEDERATION, broker=URL, model=model, settings=chosen, dense=dense, kinds=kinds
    )
    codes = {invitation.device: invitation.code for invitation in administration.invite(folder, *names)}
    ledger = durable.Ledger(folder / LEDGER)
    maintenance.simulate(ledger.db)
    enrolled = records.DeviceEnrolled(
        device=EVALUATOR, public=Identity.generate().public, proof=b"", role=registry.EVALUATOR
    )
    ledger.write([enrolled], 0.0)
    return Setup(ledger=ledger, core=lambda: administration.open_core(folder, ledger, SOFTWARE), codes=codes)


def without_disk(
    seed: int,
    names: Sequence[str],
    model: Tensors,
    chosen: Mapping[str, object],
    *,
    schema: Schema,
    kinds: TensorKinds,
) -> Setup:
    """A setup in memory; the seed determines all keys and codes."""
    table = configuration.with_overrides({"federation": FEDERATION, "broker": URL}, configuration.new_home(chosen))
    settings = configuration.from_table(table, "[aggregator]")
    identity = Identity(drawn(seed, "aggregator"))
    codes = {name: drawn(seed, f"code of {name}").hex() for name in names}
    core, frames = _first_core(settings, identity, schema, to_vector(schema, model), kinds=kinds, codes=codes)
    return Setup(ledger=MemoryLedger(frames), core=lambda: core, codes=codes)


def _first_core(
    settings: Settings,
    identity: Identity,
    schema: Schema,
    vector: Vector,
    *,
    kinds: TensorKinds,
    codes: Mapping[str, str],
) -> tuple[Core, list[tuple[str, bytes]]]:
    """The core of an aggregator at version 0, and its retained frames."""
    first = first_version.make(settings, identity, schema, vector)
    core = Core(
        settings=settings,
        identity=identity,
        schema=schema,
        model=Model(
            settings=settings,
            schema=schema,
            version=0,
            published=vector,
            server=first.snapshot.server,
            digest=first.version.digest,
            kinds=kinds,
        ),
        registry=Registry(settings.federation, codes={name: Invited(code=code) for name, code in codes.items()}),
        published=first.published(settings),
        seq=first.seq,
        session=0,
        software=SOFTWARE,
        sums=PrivateSums.of(settings, schema),
    )
    return core, [*first.frames.frames]


def bodies(
    scenario: Scenario,
    task: Task,
    model: Tensors,
    aggregator: bytes,
    codes: Mapping[str, str],
    *,
    place: Place | None = None,
) -> list[Body]:
    """The devices of the aggregator with the public key ``aggregator``: their keys, data, speeds and lines.

    They train at ``place``, by default in this process.
    """
    own = pairs(scenario, task, model)
    policy = PrivacyPolicy.of(Plan.from_meta({**task.default_plan, **scenario.plan}))
    place = place or InProcess([trainer for trainer, _ in own])
    shapes = {name: tuple(array.shape) for name, array in model.items()}
    initial_model = InitialModel(tensors=model)
    paces = scenario.speeds.draw(scenario.devices, scenario.seed)
    return [
        Body(
            profile=Profile(
                federation=FEDERATION,
                device=name,
                identity=Identity(drawn(scenario.seed, name)),
                aggregator_public=aggregator,
                seal=lambda plain: seal(aggregator, plain),
                role="train",
                code=code,
                tensors=shapes,
                default_plan=dict(task.default_plan),
                policy=policy,
                software=SOFTWARE,
                reports=held is not None,
                classes=class_counts_of(trainer),
                fine_tune=scenario.local.fine_tune if held is not None else 0.0,
            ),
            initial_model=initial_model,
            begin=partial(place.begin, index),
            trainer=trainer,
            held=held,
            seconds=_seconds(scenario, name, pace),
            line=_line(scenario.simulate),
        )
        for index, ((name, code), (trainer, held), pace) in enumerate(zip(codes.items(), own, paces, strict=True))
    ]


def _seconds(scenario: Scenario, name: str, pace: float) -> Callable[[], float]:
    """A function that draws the duration of each training of a device."""
    jitter = scenario.simulate.jitter
    generator = random.Random(f"{scenario.seed}/{name}")  # noqa: S311 - reproducible on purpose, no secret
    return lambda: pace * math.exp(jitter * generator.gauss(0, 1)) if jitter else pace


def _line(about: Simulated) -> Line:
    up, down = (1e6 * rate if rate else math.inf for rate in (about.up_mbit_s, about.down_mbit_s))
    return Line(up_bits_s=up, down_bits_s=down, latency_s=about.latency_s)


def drawn(seed: int, what: str) -> bytes:
    """32 pseudo-random bytes that depend on the arguments only; for keys that protect nothing."""
    return blake2b(f"{seed}/{what}".encode(), digest_size=32).digest()
