"""The table `[private]` of a scenario: private sums, and the helpers that open them."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from ternbus.aggregator.private_settings import PrivateSettings
from ternbus.broker.errors import ConfigError
from ternbus.broker.sums.terms import HELPERS_MAX
from ternbus.lab.scenario.toml_table import Table, within

PREFIX: Final = "helper-"  # helper-0, helper-1, … as devices are device-0, device-1, …
_DEFAULT: Final = PrivateSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Private:
    """Private sums, opened by so many helpers; every device pins all of them, and `min`.

    The other keys are those of `[private]` in aggregator.toml.
    """

    helpers: int = 1
    min: int = _DEFAULT.min
    bits: int = _DEFAULT.bits
    levels: int = _DEFAULT.levels
    samples: float = _DEFAULT.samples
    kind: str = _DEFAULT.kind

    def __post_init__(self) -> None:
        within("private.helpers", self.helpers, 1, HELPERS_MAX)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{PREFIX}{number}" for number in range(self.helpers))

    def settings(self, keys: Mapping[str, str] | None = None) -> dict[str, object]:
        """The aggregator's settings, with dotted keys; ``keys`` are the helpers' public keys as hex digits, by name.

        Without ``keys`` they are made up, which is enough to check everything else.
        """
        made_up = {name: blake2b(name.encode(), digest_size=32).hexdigest() for name in self.names}
        return {
            "private.helpers": dict(made_up if keys is None else keys),
            "private.bits": self.bits,
            "private.levels": self.levels,
            "private.min": self.min,
            "private.samples": self.samples,
            "private.kind": self.kind,
        }

    def check_devices(self, devices: int) -> None:
        """Raise `ConfigError` where so few devices are no sum."""
        if self.min > devices:
            raise ConfigError(
                f"private.min = {self.min}: a sum has the updates of so many devices or more, and devices = {devices}; "
                "use a smaller private.min, or more devices"
            )


def parse(table: Table) -> Private:
    """The table `[private]` of a scenario that has one."""
    given = {
        "helpers": table.whole("helpers"),
        "min": table.whole("min"),
        "bits": table.whole("bits"),
        "levels": table.whole("levels"),
        "samples": table.number("samples"),
        "kind": table.text("kind"),
    }
    table.refuse_unknown()
    return Private(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above
