"""The part of a plan that a task brings, in the metadata of its initial model's file, for whoever writes the plan."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys

KEYS: Final = "plan_keys"  # names in the metadata
DEFAULT: Final = "default_plan"
ITEMS_MAX: Final = 1000
NAME_CHARS: Final = 100
AGAIN: Final = "make the file again with `ternbus edge init-model`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """``keys`` are those that only this task knows. ``default`` has the documented keys of the task's default plan.

    Raises `ConfigError` for anything else, and for more than 1,000 keys.
    """

    keys: tuple[str, ...] = ()
    default: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names: Collection[object] = self.keys  # from a file or a task's author: of any type
        if len(names) > ITEMS_MAX:
            raise ConfigError(f"{KEYS} has {len(names)} names of plan keys: it may have at most {ITEMS_MAX}")
        for name in names:
            if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS or not name.isprintable():
                raise ConfigError(
                    f"{KEYS} has {repr(name)[:NAME_CHARS]}, which is no name of a plan key: it must be a printable "
                    f"text of at most {NAME_CHARS} characters"
                )
        if unknown := [name for name in self.default if name not in plan_keys.KEYS]:
            raise ConfigError(f"{DEFAULT}: {unknown[0]!r} is not a documented key of a plan")
        if fault := plan_keys.fault(self.default):
            raise ConfigError(f"{DEFAULT}: {fault}")

    @classmethod
    def of(cls, keys: Collection[str], default: Mapping[str, Any]) -> Self:
        """What a task's ``plan_keys`` and ``default_plan`` are, without the default of its own keys.

        Raises `ConfigError` for a default plan that a device would refuse, or with a key that nobody knows.
        """
        if isinstance(keys, str) or not isinstance(keys, Collection):
            raise ConfigError(f"{KEYS} is {keys!r}: it must be a list of names of plan keys")
        made = cls(keys=tuple(keys), default={name: default[name] for name in plan_keys.KEYS if name in default})
        if found := plan_keys.unknown(default, made.keys):
            raise ConfigError(f"{DEFAULT}: {found[0]} A task names its own keys in plan_keys")
        return made

    def metadata(self) -> dict[str, str]:
        """For the model's file."""
        default = {name: value for name, value in self.default.items() if value is not None}
        return {KEYS: json.dumps(self.keys), DEFAULT: json.dumps(default)}

    @classmethod
    def from_metadata(cls, about: Mapping[str, str], source: object) -> Self:
        """What ``metadata`` made; of a file without it, nothing. `ConfigError`, which names ``source``, for others."""
        try:
            keys, default = json.loads(about.get(KEYS, "[]")), json.loads(about.get(DEFAULT, "{}"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the metadata of {source} is not JSON: {error}; {AGAIN}") from error
        if not isinstance(keys, list) or not isinstance(default, dict):
            raise ConfigError(f"the metadata of {source} has no list {KEYS} and object {DEFAULT}; {AGAIN}")
        try:
            return cls(keys=tuple(keys), default=default)
        except ConfigError as error:
            raise ConfigError(f"the metadata of {source}: {error}; {AGAIN}") from error
