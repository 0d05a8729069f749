"""The plan in aggregator.toml, with the checks that devices make and those of the task's own keys."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import msgpack

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.arms import ARMS, WEIGHTS
from ternbus.broker.protocol.task_plan import TaskPlan

PLAN_BYTES_MAX: Final = 8192  # half of what a header may have
PLAN_DOC: Final = """\
What devices are asked to do; every key may be left out.
local_epochs, local_steps, batch_size, learning_rate, momentum, weight_decay, proximal_mu (FedProx),
clip_sigma (TernGrad's clipping, 2.5; 0 = off), codec ("ternary" or "float32"), error_feedback (bool), seal (bool),
seed; Ternbus' own devices also take optimizer, schedule, local_seconds, participation and others: see docs/tasks.md
"""
CHECK_DOC: Final = """\
By what the plan is checked, besides the documented keys. A file without this table, as earlier versions wrote it, is
only warned about keys that nobody knows.
"""


def _names(doc: str) -> Any:
    return field(default=(), metadata={"doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCheck:
    """What is known of the federation's task, and what the operator allows beyond it."""

    task_keys: tuple[str, ...] = _names("keys that the task takes, from the model's file")
    allowed_keys: tuple[str, ...] = _names("further keys that may be in the plan (--allow-plan-key)")
    default_plan: Mapping[str, Any] = field(default_factory=dict)  # with it devices complete the plan

    @classmethod
    def settings(cls, task: TaskPlan, allowed: Sequence[str] = ()) -> dict[str, object]:
        """The settings of a new federation, with dotted keys."""
        # TOML has neither null nor integers beyond 64 bits; a default plan may have both
        default = {name: value for name, value in task.default.items() if isinstance(value, str) or _is_number(value)}
        return {
            "plan_check.task_keys": list(task.keys),
            "plan_check.allowed_keys": list(allowed),
            "plan_check.default_plan": default,
        }

    @classmethod
    def from_table(cls, table: object, where: str) -> "PlanCheck | None":
        """Of the table in aggregator.toml; None where there is none. Raises `ConfigError`."""
        if table is None:
            return None
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} must be a table")
        known = [entry.name for entry in fields(cls)]
        for key in table:
            if key not in known:
                raise ConfigError(f"{where}.{key} is unknown; known are {', '.join(known)}")
        names = {key: _texts(table.get(key, []), f"{where}.{key}") for key in known[:2]}
        default = table.get("default_plan", {})
        if not isinstance(default, Mapping):
            raise ConfigError(f"{where}.default_plan must be a table")
        try:
            TaskPlan(keys=names["task_keys"], default=default)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from error
        return cls(**names, default_plan=dict(default))


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{where} = {value!r} must be a list of strings")
    return tuple(value)


def read(table: object, check: PlanCheck | None, where: str) -> dict[str, Any]:
    """The plan of a table; `ConfigError` where a device would refuse it, or nobody knows one of its keys."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table")
    plan: dict[str, Any] = {}
    for key, value in table.items():
        if key in (ARMS, WEIGHTS):
            raise ConfigError(f"{where}.{key} is what a search makes: write [search] with its arms instead")
        known = plan_keys.KEYS.get(key)
        if known is not None and (fault := known.fault(value)):
            raise ConfigError(f"{where}.{key} is {value!r}, {fault}")
        plan[key] = _plain(value, f"{where}.{key}")  # as it is: 1 stays 1 on the wire
    size_bytes = len(msgpack.packb(plan))
    if size_bytes > PLAN_BYTES_MAX:
        raise ConfigError(f"{where} takes {size_bytes} bytes, at most {PLAN_BYTES_MAX}: every head carries it")
    if check is not None and (doubtful := doubts(plan, check)):
        raise ConfigError(f"{where}.{doubtful[0]}")
    return plan


def doubts(plan: Mapping[str, Any], check: PlanCheck | None) -> list[str]:
    """Why devices would not follow the plan, or not all of it; texts that begin with the name of a key.

    Without a check, what a task knows, and completes the plan with, is not known either.
    """
    about = check or PlanCheck()
    found = [
        f"{each} A task names its own keys in plan_keys. Other keys are allowed by --allow-plan-key at "
        "`aggregator init`, plan_check.allowed_keys in aggregator.toml, and allow_plan_keys in a scenario"
        for each in plan_keys.unknown(plan, (*about.task_keys, *about.allowed_keys))
    ]
    if fault := plan_keys.fault({**about.default_plan, **plan}):
        found.append(fault)
    return found


def published(plan: Mapping[str, Any], check: PlanCheck | None, max_staleness: int) -> Mapping[str, Any]:
    """The plan of the head: `statistics_rate` is 1 where no update may be stale and nobody states another.

    All updates of a merge then come from one version, and the mean of their statistics is that of the devices.
    """
    stated = "statistics_rate" in plan or (check is not None and "statistics_rate" in check.default_plan)
    return plan if stated or max_staleness > 0 else {**plan, "statistics_rate": 1}


def _plain(value: object, where: str) -> object:
    """A value of an unknown plan key: whatever msgpack carries unchanged."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, str) or _is_number(item) for item in items):
        return value
    raise ConfigError(f"{where} = {value!r}: use a string, a number of 64 bits, true, false or a flat list of these")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and is_plain(value)


def is_plain(number: int | float) -> bool:
    """Whether it is finite and within 64 bits, as every number on the wire is."""
    return math.isfinite(number) if isinstance(number, float) else -(2**63) <= number < 2**63
