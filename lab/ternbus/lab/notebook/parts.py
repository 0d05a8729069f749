"""How one table of samples is divided among simulated devices: the partitions of a scenario, as functions."""

from dataclasses import dataclass
from typing import Any

from ternbus.broker.errors import ConfigError
from ternbus.lab.notebook.simulated import is_number
from ternbus.lab.scenario import partitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A partition by its scenario's name, such as "dirichlet:0.5", and the number of devices; None: one each owner.

    Raises `ConfigError` for a partition that is none.
    """

    partition: str
    devices: int | None = None
    column: str | None = None  # that `by` divides by
    keep: bool = True  # whether that column stays among the inputs

    def __post_init__(self) -> None:
        partitions.check(self.partition)
        if self.devices is not None and (type(self.devices) is not int or self.devices < 1):
            raise ConfigError(f"devices is {self.devices!r}, but must be a whole number from 1")


def iid(devices: int = partitions.DEVICES) -> Parts:
    """Equal random parts for so many devices."""
    return Parts(partition="iid", devices=devices)


def dirichlet(alpha: float, devices: int = partitions.DEVICES) -> Parts:
    """Parts with unequal mixes of classes: the smaller alpha, the more unequal (Hsu et al. 2019)."""
    return Parts(partition=f"dirichlet:{_number('dirichlet', alpha)}", devices=devices)


def quantity(alpha: float, devices: int = partitions.DEVICES) -> Parts:
    """Random parts of unequal size: the smaller alpha, the more unequal (Li et al. 2022)."""
    return Parts(partition=f"quantity:{_number('quantity', alpha)}", devices=devices)


def shards(count: int, devices: int = partitions.DEVICES) -> Parts:
    """Parts of `count` shards each, so of about so many classes (McMahan et al. 2017, section 3)."""
    return Parts(partition=f"shards:{count}", devices=devices)


def by(column: str, *, keep: bool = False) -> Parts:
    """A device for each value of a column of the inputs' DataFrame, or of the table `owners`.

    The model does not see the column, unless `keep`.
    """
    return Parts(partition=f"by:{column}", column=column, keep=keep)


def natural() -> Parts:
    """A device for each owner, as `owners` or the task says it."""
    return Parts(partition="natural")


def _number(kind: str, alpha: Any) -> str:
    if not is_number(alpha):
        raise ConfigError(f"{kind}() has the alpha {alpha!r}, but it must be a number, as in {kind}(0.5, 20)")
    return f"{float(alpha):g}"


def parts_of(given: object) -> Parts:
    """The partition that was given: one of these functions', or a scenario's name, as "iid"."""
    if isinstance(given, Parts):
        return given
    if callable(given):
        raise ConfigError(f"partition is the function {getattr(given, '__name__', given)}: call it, as iid(20)")
    if not isinstance(given, str):
        raise ConfigError(f"partition is {given!r}: write iid(20), dirichlet(0.5), by('column'), shards(2) or such")
    counted = given != "auto" and not partitions.by_label(given)
    return Parts(partition=given, devices=partitions.DEVICES if counted else None)
