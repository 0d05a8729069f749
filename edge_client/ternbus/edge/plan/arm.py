"""The plan of one arm of a search: the federation's plan, with the keys of the arm over it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ternbus.broker.protocol.arms import KEYS, OVERRIDES, WIDTH
from ternbus.edge.plan.plan import Plan


def with_arm(plan: Plan, arm: Mapping[str, Any], *, is_elastic: bool) -> Plan | None:
    """The plan for a training by the arm.

    None if the arm has a key that this device does not know, or a width below 1 and the device is not elastic.
    An arm's `local_epochs` takes the place of the plan's `local_steps`. The owner's limits, which the plan has, stay.
    """
    if not arm.keys() <= KEYS.keys() or (arm.get(WIDTH, 1) < 1 and not is_elastic):
        return None
    over = {name: arm[name] for name in OVERRIDES if name in arm}
    if "local_epochs" in over:
        over.setdefault("local_steps", None)
    return replace(plan, **over, width=arm.get(WIDTH, plan.width))
