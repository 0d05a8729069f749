"""The aggregator's settings of a scenario, with a plan that is checked before anything starts."""

from collections.abc import Mapping, Sequence

from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.settings import from_table, new_home, with_overrides
from ternbus.broker.protocol.task_plan import TaskPlan
from ternbus.edge.learn.task import Task, task_plan
from ternbus.lab.scenario.scenario import Scenario


def settings(scenario: Scenario, task: Task) -> dict[str, object]:
    """The settings of the scenario, with dotted keys.

    Raises `ConfigError` for a plan that devices would refuse, and for a key that neither Ternbus nor the task knows.
    """
    return settings_of(scenario, task.default_plan, task_plan(task).keys)


def settings_of(scenario: Scenario, default_plan: Mapping[str, object], keys: Sequence[str]) -> dict[str, object]:
    """The same by the task's default plan and the keys that only it knows."""
    check = PlanCheck.settings(TaskPlan(keys=tuple(keys)), scenario.allow_plan_keys)
    chosen = {**scenario.settings(default_plan), **check}
    table = {"federation": "lab", "broker": "mqtt://localhost"}
    from_table(with_overrides(table, new_home(chosen)), f"{scenario.source} and its task")
    return chosen
