"""The initial state of a simulated federation: the aggregator's core and ledger, and the devices."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Final

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import first_version, records, registry
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.core.registry import Invited, Registry
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import ledger as durable
from ternbus.aggregator.store import maintenance
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.messages import ARMS_MAX
from ternbus.broker.protocol.schema import Schema, Vector, to_vector
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.sums.bfv import SecretKey
from ternbus.broker.sums.terms import AGGREGATOR, BFV
from ternbus.edge.core.follower import InitialModel
from ternbus.edge.core.profile import Profile
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.subnetwork import NarrowTask, is_narrowing, narrow
from ternbus.edge.learn.task import Task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import PrivacyPolicy
from ternbus.edge.plan.sum_policy import SumPolicy
from ternbus.edge.plan.tensors import Tensors
from ternbus.helper.core.profile import Profile as HelperProfile
from ternbus.lab.scenario.private import Private
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.memory_broker import Line
from ternbus.lab.virtual.memory_ledger import Ledger, MemoryLedger
from ternbus.lab.virtual.training import InProcess, Place, Placing, Widths, pairs
from ternbus.lab.virtual.virtual_device import Body

FEDERATION: Final = "lab"
EVALUATOR: Final = "evaluator"  # the sender of the simulation's test metrics
SOFTWARE: Final = "ternbus lab simulate"
URL: Final = "mqtt://localhost"  # required by the settings, but not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """An aggregator's ledger, a function that opens its core, and the invitation codes of devices and of helpers."""

    ledger: Ledger
    core: Callable[[], Core]
    codes: Mapping[str, str] = field(repr=False)
    helper_codes: Mapping[str, str] = field(repr=False)


def on_disk(
    folder: Path,
    names: Sequence[str],
    model: Tensors,
    chosen: Mapping[str, object],
    *,
    helpers: Sequence[str] = (),
    dense: Sequence[str] = (),
    kinds: TensorKinds | None = None,
) -> Setup:
    """A setup with a real aggregator directory, which `ternbus aggregator` can read afterwards."""
    _check(chosen)
    administration.create(
        folder, federation=FEDERATION, broker=URL, model=model, settings=chosen, dense=dense, kinds=kinds
    )
    invited = {each.device: each.code for each in administration.invite(folder, *names, helpers=helpers)}
    ledger = durable.Ledger(folder / LEDGER)
    maintenance.simulate(ledger.db)
    enrolled = records.DeviceEnrolled(
        device=EVALUATOR, public=Identity.generate().public, proof=b"", role=registry.EVALUATOR
    )
    ledger.write([enrolled], 0.0)
    return Setup(
        ledger=ledger,
        core=lambda: administration.open_core(folder, ledger, SOFTWARE),
        codes={name: invited[name] for name in names},
        helper_codes={name: invited[name] for name in helpers},
    )


def _check(chosen: Mapping[str, object]) -> None:
    """Raise ConfigError where a canary waits for the evaluator, which is no device here."""
    group = chosen.get("canary.group", ())
    if isinstance(group, list | tuple) and EVALUATOR in group:
        raise ConfigError(
            f"canary.group names {EVALUATOR}, which evaluates no candidate in a simulation: name devices that hold data"
        )


def without_disk(
    seed: int,
    names: Sequence[str],
    model: Tensors,
    chosen: Mapping[str, object],
    *,
    helpers: Sequence[str] = (),
    schema: Schema,
    kinds: TensorKinds,
    made_by: Callable[..., Model] = Model,
) -> Setup:
    """A setup in memory; the seed determines all keys and codes."""
    _check(chosen)
    table = configuration.with_overrides({"federation": FEDERATION, "broker": URL}, configuration.new_home(chosen))
    settings = configuration.from_table(table, "[aggregator]")
    identity = Identity(drawn(seed, "aggregator"))
    codes, helper_codes = ({name: drawn(seed, f"code of {name}").hex() for name in each} for each in (names, helpers))
    core, frames = _first_core(
        settings,
        identity,
        schema,
        to_vector(schema, model),
        kinds=kinds,
        codes=codes,
        helper_codes=helper_codes,
        made_by=made_by,
    )
    return Setup(ledger=MemoryLedger(frames), core=lambda: core, codes=codes, helper_codes=helper_codes)


def _first_core(
    settings: Settings,
    identity: Identity,
    schema: Schema,
    vector: Vector,
    *,
    kinds: TensorKinds,
    codes: Mapping[str, str],
    helper_codes: Mapping[str, str],
    made_by: Callable[..., Model],
) -> tuple[Core, list[tuple[str, bytes]]]:
    """The core of an aggregator at version 0, and its retained frames."""
    first = first_version.make(settings, identity, schema, vector)
    core = Core(
        settings=settings,
        identity=identity,
        schema=schema,
        model=made_by(
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
        helper_codes={name: Invited(code=code) for name, code in helper_codes.items()},
        search=Search.of(settings.search, 0),
    )
    return core, [*first.frames.frames]


def bodies(
    scenario: Scenario,
    task: Task,
    model: Tensors,
    aggregator: bytes,
    codes: Mapping[str, str],
    *,
    place: Place | Placing | None = None,
) -> list[Body]:
    """The devices of the aggregator with the public key ``aggregator``: their keys, data, speeds and lines.

    They train at ``place``, by default in this process.
    """
    own = pairs(scenario, task, model)
    policy = PrivacyPolicy.of(Plan.from_meta({**task.default_plan, **scenario.chosen_plan}))
    is_elastic = is_narrowing(task)
    if place is None or callable(place):
        place = (place or InProcess)(own, Widths(scenario, task))
    shapes = {name: tuple(array.shape) for name, array in model.items()}
    costs = lru_cache(ARMS_MAX)(partial(_cost, task, sum(array.size for array in model.values())))
    initial_model = InitialModel(tensors=model)
    paces = scenario.speeds.draw(scenario.devices, scenario.seed, [*codes])
    sums = None if scenario.private is None else _pins(scenario.private, scenario.seed)
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
                sums=sums,
                is_elastic=is_elastic and width == 1 and index not in scenario.behaviours,
            ),
            initial_model=initial_model,
            begin=partial(place.begin, index),
            trainer=trainer,
            held=held,
            seconds=_seconds(scenario, name, pace),
            cost=costs,
            line=_line(scenario.simulate),
        )
        for index, ((name, code), (trainer, held), pace, width) in enumerate(
            zip(codes.items(), own, paces, scenario.widths, strict=True)
        )
    ]


def helper_profiles(scenario: Scenario, aggregator: bytes, codes: Mapping[str, str]) -> list[HelperProfile]:
    """The helpers of the aggregator with the public key ``aggregator``, which admit whatever devices it names."""
    if scenario.private is None:
        return []
    least = scenario.private.min
    return [
        HelperProfile(
            federation=FEDERATION,
            helper=name,
            identity=identity,
            aggregator_public=aggregator,
            random=_random(scenario.seed, name),
            roster=AGGREGATOR,
            min=least,
            code=codes[name],
            software=SOFTWARE,
            bfv=SecretKey.generate() if scenario.private.kind == BFV else None,
        )
        for name, identity in _helpers(scenario.private, scenario.seed).items()
    ]


def private_settings(scenario: Scenario) -> dict[str, object]:
    """The aggregator's settings, with dotted keys, by the simulated helpers' keys; empty without private sums."""
    if scenario.private is None:
        return {}
    keys = {name: each.public.hex() for name, each in _helpers(scenario.private, scenario.seed).items()}
    return {"private.helpers": keys}


def _helpers(about: Private, seed: int) -> dict[str, Identity]:
    return {name: Identity(drawn(seed, name)) for name in about.names}


def _pins(about: Private, seed: int) -> SumPolicy:
    helpers = tuple(each.public for each in _helpers(about, seed).values())
    return SumPolicy(helpers=helpers, min=about.min, kind=about.kind)


def _random(seed: int, name: str) -> Callable[[int], bytes]:
    """A helper's random numbers, for box keys that protect nothing."""
    number = count()
    return lambda size: drawn(seed, f"{name} {next(number)}")[:size]


def _cost(task: Task, size: int, width: float) -> float:
    """How long a training of a sub-network takes, of the whole model's: the share of its parameters."""
    narrowed = narrow(task, width)
    if not isinstance(narrowed, NarrowTask):
        return 1.0
    return sum(math.prod(shape) for shape in narrowed.shapes.values()) / size


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
