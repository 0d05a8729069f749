"""The aggregator's state of private sums: helpers, terms, and the context of each base that updates may have."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt

from ternbus.aggregator.private_settings import PrivateSettings
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums import scales
from ternbus.aggregator.sums.helper import Helper
from ternbus.broker.protocol.plan_keys import NO_DP, SUM
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.sums.terms import Terms, context, digest_of
from ternbus.broker.sums.words import DENSE_FACTOR


@dataclass(frozen=True, kw_only=True)
class ContextOf:
    """The one context of all updates on ``base``; ``model`` and ``plan`` are digests."""

    base: int
    model: bytes
    plan: bytes
    terms: Terms
    terms_bytes: bytes = field(repr=False)  # as they are encoded

    @cached_property
    def terms_digest(self) -> bytes:
        return digest_of(self.terms_bytes)

    @cached_property
    def context(self) -> bytes:
        return context(version=self.base, model=self.model, plan=self.plan, terms=self.terms_digest)


@dataclass(slots=True, kw_only=True)
class PrivateSums:
    """``scales`` are those of the next terms; empty until there were any."""

    settings: PrivateSettings
    schema: Schema
    buffer_size: int  # of a merge
    learning_rate: float  # of the plan
    noise: tuple[float, float] = (0.0, 0.0)  # θ and B of the plan's `dp = "sum"`; 0 and 0 without
    helpers: dict[str, Helper] = field(default_factory=dict)
    contexts: dict[int, ContextOf] = field(default_factory=dict)  # by base
    scales: tuple[float, ...] = ()
    revision: int = 0  # it changes with all that the next terms depend on

    @classmethod
    def of(cls, settings: Settings, schema: Schema) -> "PrivateSums | None":
        """Those of a federation at its first start; None where it has none."""
        if settings.private is None:
            return None
        settings.private.check_model(schema)
        keys = settings.private.public_keys
        return cls(
            settings=settings.private,
            schema=schema,
            buffer_size=settings.merge.buffer_size,
            learning_rate=settings.learning_rate,
            noise=settings.sum_noise,
            helpers={name: Helper(name=name, public=public) for name, public in keys.items()},
        )

    def moved(self, counts: npt.NDArray[Any]) -> None:
        """Let the next terms' scales follow a merge; ``counts`` are devices by tensor and octave, 0 in the middle."""
        self.scales = scales.moved(self.scales, counts)
        self.revision += 1

    def waits_for(self) -> dict[str, str]:
        """Why there are no terms, by helper, in words; empty where all helpers are ready."""
        found = {}
        for helper in self.helpers.values():
            if not helper.enrolled:
                found[helper.name] = "it has not enrolled"
            elif helper.card is None:
                found[helper.name] = "it has not sent its card"
            elif helper.card.card.kind != self.settings.kind:
                found[helper.name] = (
                    f"it opens sums of the kind {helper.card.card.kind}, and private.kind is {self.settings.kind}"
                )
            elif helper.card.card.min > self.buffer_size:
                found[helper.name] = (
                    f"it opens sums of at least {helper.card.card.min} devices, and merge.buffer_size is "
                    f"{self.buffer_size}"
                )
        return found

    def next_terms(self, model: Vector) -> Terms | None:
        """The terms of a version that begins now; None while a helper is not ready. ``model`` is the first one's."""
        cards = [helper.card for helper in self.helpers.values() if helper.card is not None]
        if self.waits_for():
            return None
        about = self.settings
        theta, norm = self.noise
        dp = SUM if theta and norm else NO_DP
        factor = 1.0 if dp == SUM else DENSE_FACTOR  # with draws as noise, a wider range is more noise
        self.scales = self.scales or scales.first(self.schema, model, self.learning_rate, factor)
        return Terms(
            kind=about.kind,
            bits=about.bits,
            levels=about.levels,
            helpers=tuple(cards),
            min=max(about.min, *(card.card.min for card in cards)),
            ternary=self.schema.ternary_elements,
            dense=self.schema.dense_elements,
            scales=self.scales,
            samples=about.samples,
            dp=dp,
            theta=theta,
            norm=norm,
            key=cards[0].key,
        )

    def begin(self, begun: ContextOf, oldest: int, held: Collection[int] = ()) -> None:
        """Add a context; forget those of bases below ``oldest``, which are stale, but for ``held`` ones."""
        kept = {base: each for base, each in self.contexts.items() if base >= oldest or base in held}
        self.contexts = {**kept, begun.base: begun}
