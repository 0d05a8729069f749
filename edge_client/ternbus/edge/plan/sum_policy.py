"""What the owner of a device pins of private sums: helpers, the smallest sum, the roster; and what each refuses.

An aggregator that named the helpers could be its own, so a device with a policy sends nothing but private updates, to
its owner's helpers, whatever heads and terms say. See docs/protocol.md, section 16.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import is_public_key
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.plan_keys import NO_DP, SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import AGGREGATOR, BFV, HELPERS_MAX, KINDS, MASK, OWN, ROSTERS, Terms
from ternbus.broker.sums.words import DEVICES_MAX
from ternbus.edge.plan.plan import Plan

MIN: Final = 5
NOT_PRIVATE: Final = (
    'its codec is "private", and this device was not joined with --private: to train, it needs a new invitation, then '
    "`ternbus edge leave` and `ternbus edge join … --private --helper KEY`"
)
Numbers = Mapping[bytes, int]  # the highest number of a box key that was seen of each pinned helper


@dataclass(frozen=True, slots=True, kw_only=True)
class SumPolicy:
    """The owner's pins: Ed25519 keys of helpers, devices in a sum, and "own" where helpers must admit devices.

    Of the devices in a sum, ``colluding`` may work together with whoever sees it: their draws are no noise. ``kind`` is
    that of the sums.
    """

    helpers: tuple[bytes, ...]
    min: int = MIN
    roster: str = AGGREGATOR
    colluding: int = 0
    kind: str = MASK

    @classmethod
    def of(cls, helpers: Iterable[str], least: int, roster: str, colluding: int = 0, *, kind: str = MASK) -> Self:
        """The policy with keys as hex digits. Raises `ConfigError` for what is none."""
        keys = tuple(helpers)
        if wrong := [key for key in keys if not is_public_key(key)]:
            raise ConfigError(
                f"the key of a helper is {wrong[0]!r}, not 64 hex digits: copy it from `ternbus helper status`"
            )
        return cls(helpers=tuple(map(bytes.fromhex, keys)), min=least, roster=roster, colluding=colluding, kind=kind)

    def __post_init__(self) -> None:
        if not 1 <= len(self.helpers) <= HELPERS_MAX or len(set(self.helpers)) != len(self.helpers):
            raise ConfigError(
                f"private sums need 1 to {HELPERS_MAX} different helpers: give --helper KEY once for each"
            )
        if not 2 <= self.min <= DEVICES_MAX:
            raise ConfigError(f"--private-min is {self.min}: give a number of devices from 2 to {DEVICES_MAX}")
        if not 0 <= self.colluding < self.min:
            raise ConfigError(
                f"--private-colluding is {self.colluding}: give a number of devices below --private-min, {self.min}"
            )
        if self.roster not in ROSTERS:
            raise ConfigError(f"--private-roster is {self.roster!r}: write one of {', '.join(ROSTERS)}")
        if self.kind not in KINDS:
            raise ConfigError(f"--private-kind is {self.kind!r}: write one of {', '.join(KINDS)}")
        if self.kind == BFV and len(self.helpers) > 1:
            raise ConfigError(f"--private-kind {BFV} takes one helper, which holds the key: give one --helper KEY")

    def plan_fault(self, plan: Plan) -> str:
        """The reason why this device does not train by a plan; empty if it does."""
        if plan.codec != PRIVATE:
            return f'its owner requires private sums (--private), the plan has the codec "{plan.codec}"'
        return ""

    def pins_fault(self, terms: Terms) -> str:
        """The reason why these terms are not what the owner has pinned, beside their kind; empty if they are."""
        cards = {helper.card.public: helper.card for helper in terms.helpers}
        if missing := [key for key in self.helpers if key not in cards]:
            return (
                f"the helper {missing[0].hex()}, which its owner has pinned, is not in the terms; compare the key with "
                "`ternbus helper status`, or ask the operator of the aggregator to add it"
            )
        if terms.min < self.min:
            return f"the terms allow sums of {terms.min} devices, and its owner requires {self.min} (--private-min)"
        if self.roster == OWN and (others := [key for key in self.helpers if cards[key].roster != OWN]):
            return (
                f"the helper {cards[others[0]].helper!r} lets the aggregator say which devices there are, and its "
                "owner requires a roster of the helper's own (--private-roster own)"
            )
        return ""

    def terms_fault(self, terms: Terms, schema: Schema, plan: Plan, seen: Numbers) -> str:
        """The reason why this device makes no update by these terms; empty if it does."""
        cards = {helper.card.public: helper.card for helper in terms.helpers}
        if terms.kind != self.kind:
            return (
                f'the terms have the kind "{terms.kind}", and its owner joined for "{self.kind}" (--private-kind): an '
                f'owner who wants the other writes private_kind = "{terms.kind}" into edge.toml'
            )
        if fault := self.pins_fault(terms):
            return fault
        for key in self.helpers:
            card = cards[key]
            if card.number < seen.get(key, 0):
                return (
                    f"the helper {card.helper!r} has the box key {card.number}, and number {seen[key]} was seen "
                    "before: an old copy of its folder may be in use, whose operator runs `ternbus helper restored`"
                )
        if not terms.fits(schema):
            return "the terms are for a model of other tensors than the federation's"
        wanted = (SUM, plan.dp_theta, plan.dp_norm) if plan.dp == SUM else (NO_DP, 0.0, 0.0)
        if (terms.dp, terms.theta, terms.norm) != wanted:
            return (
                f"the terms have dp, theta and norm {terms.dp}, {terms.theta:g} and {terms.norm:g}, by the plan "
                f"{wanted[0]}, {wanted[1]:g} and {wanted[2]:g}"
            )
        return ""

    def honest(self, terms: Terms) -> int:
        """The devices of the smallest sum by accepted terms whose draws are noise for everybody else."""
        return terms.min - self.colluding

    def seen_in(self, terms: Terms, seen: Numbers) -> dict[bytes, int]:
        """The numbers after accepted terms, of the pinned helpers only."""
        cards = {helper.card.public: helper.card.number for helper in terms.helpers}
        return {key: max(cards[key], seen.get(key, 0)) for key in self.helpers}


def fault(policy: SumPolicy | None, plan: Plan) -> str:
    """The reason why a device with this policy, or with none, does not train by a plan; empty if it does."""
    if policy is not None:
        return policy.plan_fault(plan)
    return NOT_PRIVATE if plan.codec == PRIVATE else ""
