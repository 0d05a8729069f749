"""The settings that a merge depends on, as the ledger keeps them."""

import json
from dataclasses import asdict, dataclass
from typing import Self

from ternbus.aggregator.settings import MergeSettings, OptimizerSettings, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a merge depends on besides its updates; whoever makes one again needs the same."""

    merge: MergeSettings
    optimizer: OptimizerSettings
    averages_statistics: bool = True  # False: the optimizer moves them, too, as it did before there were kinds
    exact_sums: bool = True  # False: sums of updates have the bits of the order in which they came

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """By which merges under these settings are made."""
        return cls(merge=settings.merge, optimizer=settings.optimizer)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Self:
        """What ``dumps`` made."""
        found = {"averages_statistics": False, "exact_sums": False, **json.loads(text)}
        parts = {"merge": MergeSettings(**found["merge"]), "optimizer": OptimizerSettings(**found["optimizer"])}
        return cls(**found | parts)
