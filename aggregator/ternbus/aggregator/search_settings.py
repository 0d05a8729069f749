"""The section [search] of aggregator.toml: the arms of a search, which devices try, and how the best is found."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgpack

from ternbus.aggregator.plan_settings import PLAN_BYTES_MAX
from ternbus.aggregator.sections import key, section
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import arms as protocol
from ternbus.broker.protocol.arms import DEVICE_CLASSES_MAX, WIDTH, Arms
from ternbus.broker.protocol.messages import ARMS_MAX

HALVING, FEDEX = "successive-halving", "fedex"
WIDTHS_MAX: Final = 8  # an evaluator's metrics of each fit into one message
SEARCH_DOC: Final = """\
Arms of the plan, each tried by some devices for each version; those with held-out data judge; see docs/search.md.
arms = [{ learning_rate = 0.01 }, { learning_rate = 0.1 }]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """Which plans devices try, and how the best is found while they train (docs/search.md)."""

    arms: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata={
            "doc": f"2 to {ARMS_MAX} tables, each with some of {', '.join(protocol.KEYS)}, in place of the plan's"
        },
    )
    method: str = key(
        HALVING,
        f"{HALVING}: each rung drops the worse half of the arms; {FEDEX}: each rung makes better ones more frequent",
        one_of=(HALVING, FEDEX),
    )
    budget: int = key(8, "versions that are judged in a rung, at least", low=2, high=100_000)
    metric: str = key("", "metric that judges; empty = the loss, or of widths the primary one")
    classes: tuple[str, ...] = key((), "beginnings of device names; each has a search of its own, as all others have")
    latency_s: float = key(
        0.0, "longest training that an arm may take on a class of devices, in s; 0 = no limit", low=0, high=1e7
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of devices; the last one, of all others, has no beginning."""
        return (*self.classes, "")

    @property
    def is_of_widths(self) -> bool:
        """Whether it searches the widths of one model."""
        return all(WIDTH in arm for arm in self.arms)

    def with_weights(self, weights: tuple[tuple[int, ...], ...]) -> Arms:
        """The arms as a plan has them; ``weights`` by class and arm."""
        return Arms(arms=self.arms, weights=tuple(zip(self.names, weights, strict=True)))

    @classmethod
    def from_table(cls, table: object, where: str) -> "SearchSettings | None":
        """Of the table in aggregator.toml; None where it is absent, or has no arms. Raises `ConfigError`."""
        if table is None:
            return None
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} must be a table")
        rest = {name: value for name, value in table.items() if name != "arms"}
        found: SearchSettings = section(cls, rest, where)
        arms = _arms(table.get("arms", []), f"{where}.arms")
        if not arms:
            if rest:
                raise ConfigError(f"{where} has no arms: add {where}.arms, or leave the section out")
            return None
        if len(found.classes) != len(set(found.classes)) or "" in found.classes:
            raise ConfigError(
                f"{where}.classes = {list(found.classes)} must be different beginnings of names, none empty"
            )
        if len(found.names) > DEVICE_CLASSES_MAX:
            raise ConfigError(f"{where}.classes has {len(found.classes)} entries: at most {DEVICE_CLASSES_MAX - 1}")
        made = replace(found, arms=arms)
        try:
            made.with_weights(((1,) * len(arms),) * len(made.names))
        except ProtocolError as error:
            raise ConfigError(f"{where}.{error.detail}") from error
        return made

    def check(self, plan: Mapping[str, Any], where: str, *, is_private: bool, dp: str) -> None:
        """Refuse what a search cannot go with; ConfigError says why."""
        if is_private:
            raise ConfigError(
                f"{where}: with private sums no update is seen alone, so nobody can say what an arm is worth; leave "
                "out [search] or [private]"
            )
        if dp != "none":
            raise ConfigError(
                f'{where}: with plan.dp = "{dp}" devices train by one plan, by which their epsilon is accounted; leave '
                "out [search], or search before, without dp, on data that need none"
            )
        if plan.get("seal") and (self.latency_s or not self.is_of_widths):
            raise ConfigError(
                f"{where}: with plan.seal = true devices do not say what a training gained, nor how long it took; "
                "leave out [search] or seal"
            )
        if self.is_of_widths and len(self.arms) > WIDTHS_MAX:
            raise ConfigError(f"{where}.arms has {len(self.arms)} widths, of at most {WIDTHS_MAX}")
        widest = self.with_weights(((protocol.WEIGHT_MAX,) * len(self.arms),) * len(self.names))
        if (size_bytes := len(msgpack.packb({**plan, **widest.meta()}))) > PLAN_BYTES_MAX:
            raise ConfigError(
                f"{where}: plan and arms take {size_bytes} bytes, at most {PLAN_BYTES_MAX}: every head carries them; "
                "use fewer arms or classes, or a shorter plan"
            )
        for place, arm in enumerate(self.arms):
            if WIDTH in arm and (len(arm) > 1 or not self.is_of_widths):
                raise ConfigError(
                    f"{where}.arms[{place}]: a search of widths compares sub-networks of one model, so each arm states "
                    "its width and nothing else"
                )


def _arms(rows: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f"{where} = {rows!r} must be a list of tables, such as [{{ learning_rate = 0.01 }}]")
    for place, row in enumerate(rows):
        if not row:
            raise ConfigError(
                f"{where}[{place}] states nothing; an arm that is the plan itself states the plan's value"
            )
        for name in row:
            if name not in protocol.KEYS:
                raise ConfigError(f"{where}[{place}].{name} is unknown; known are {', '.join(protocol.KEYS)}")
        if row in rows[:place]:
            raise ConfigError(f"{where}[{place}] = {dict(row)} is there twice")
    if len(rows) == 1:
        raise ConfigError(f"{where} has one arm: there is nothing to choose; write it into [plan]")
    return tuple(dict(row) for row in rows)
