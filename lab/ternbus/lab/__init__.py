"""The lab: a whole federation on one machine, as real processes or simulated in virtual time, and its report.

The names below are public: scripts and notebooks use them to simulate federations. Everything else is private and may
change.
"""

from typing import TYPE_CHECKING

from ternbus.broker.exports import exports

if TYPE_CHECKING:
    from ternbus.lab.report.progress import Lines
    from ternbus.lab.scenario.availability import Availability
    from ternbus.lab.scenario.scenario import End, Fault, Hostile, Local, Narrow, Scenario, Simulated, Speeds
    from ternbus.lab.virtual.simulate import Simulation
    from ternbus.lab.virtual.training import Workers
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "ternbus.lab.report.progress": ["Lines"],
            "ternbus.lab.scenario.availability": ["Availability"],
            "ternbus.lab.scenario.scenario": [
                "End",
                "Fault",
                "Hostile",
                "Local",
                "Narrow",
                "Scenario",
                "Simulated",
                "Speeds",
            ],
            "ternbus.lab.virtual.simulate": ["Simulation"],
            "ternbus.lab.virtual.training": ["Workers"],
        },
    )

__all__ = [
    "Availability",
    "End",
    "Fault",
    "Hostile",
    "Lines",
    "Local",
    "Narrow",
    "Scenario",
    "Simulated",
    "Simulation",
    "Speeds",
    "Workers",
]
