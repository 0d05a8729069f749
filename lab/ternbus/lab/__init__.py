"""The lab: a whole federation on one machine, as real processes or simulated in virtual time, and its report.

The names below are public: scripts and notebooks use them to simulate federations, on arrays (`Federation`) or of a
scenario (`Simulation`). Everything else is private and may change.
"""

from typing import TYPE_CHECKING

from ternbus.broker.exports import exports

if TYPE_CHECKING:
    from ternbus.lab.notebook.algorithms import Job, Update
    from ternbus.lab.notebook.asynchronous import ca2fl, fadas
    from ternbus.lab.notebook.bar import Progress
    from ternbus.lab.notebook.baselines import Baseline, Comparison, compare
    from ternbus.lab.notebook.callbacks import BestModel, Callback, EarlyStopping, State
    from ternbus.lab.notebook.clients import ClientError
    from ternbus.lab.notebook.federation import Federation
    from ternbus.lab.notebook.objectives import mae, r2
    from ternbus.lab.notebook.partition import PartitionTable
    from ternbus.lab.notebook.parts import Parts, by, dirichlet, iid, natural, quantity, shards
    from ternbus.lab.notebook.run import Run
    from ternbus.lab.notebook.search import Sweep, Tuning, sweep, tune
    from ternbus.lab.notebook.trackers import MLflow, TensorBoard
    from ternbus.lab.report.progress import Lines
    from ternbus.lab.scenario.availability import Availability
    from ternbus.lab.scenario.end import MetricLimit
    from ternbus.lab.scenario.private import Private
    from ternbus.lab.scenario.scenario import End, Fault, Hostile, Local, Narrow, Scenario, Speeds
    from ternbus.lab.scenario.simulated import Simulated
    from ternbus.lab.virtual.simulate import Simulation
    from ternbus.lab.virtual.workers import Workers
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "ternbus.lab.notebook.algorithms": ["Job", "Update"],
            "ternbus.lab.notebook.asynchronous": ["ca2fl", "fadas"],
            "ternbus.lab.notebook.bar": ["Progress"],
            "ternbus.lab.notebook.baselines": ["Baseline", "Comparison", "compare"],
            "ternbus.lab.notebook.callbacks": ["BestModel", "Callback", "EarlyStopping", "State"],
            "ternbus.lab.notebook.clients": ["ClientError"],
            "ternbus.lab.notebook.federation": ["Federation"],
            "ternbus.lab.notebook.objectives": ["mae", "r2"],
            "ternbus.lab.notebook.partition": ["PartitionTable"],
            "ternbus.lab.notebook.parts": ["Parts", "by", "dirichlet", "iid", "natural", "quantity", "shards"],
            "ternbus.lab.notebook.run": ["Run"],
            "ternbus.lab.notebook.search": ["Sweep", "Tuning", "sweep", "tune"],
            "ternbus.lab.notebook.trackers": ["MLflow", "TensorBoard"],
            "ternbus.lab.report.progress": ["Lines"],
            "ternbus.lab.scenario.availability": ["Availability"],
            "ternbus.lab.scenario.end": ["MetricLimit"],
            "ternbus.lab.scenario.private": ["Private"],
            "ternbus.lab.scenario.scenario": [
                "End",
                "Fault",
                "Hostile",
                "Local",
                "Narrow",
                "Scenario",
                "Speeds",
            ],
            "ternbus.lab.scenario.simulated": ["Simulated"],
            "ternbus.lab.virtual.simulate": ["Simulation"],
            "ternbus.lab.virtual.workers": ["Workers"],
        },
    )

__all__ = [
    "Availability",
    "Baseline",
    "BestModel",
    "Callback",
    "ClientError",
    "Comparison",
    "EarlyStopping",
    "End",
    "Fault",
    "Federation",
    "Hostile",
    "Job",
    "Lines",
    "Local",
    "MLflow",
    "MetricLimit",
    "Narrow",
    "PartitionTable",
    "Parts",
    "Private",
    "Progress",
    "Run",
    "Scenario",
    "Simulated",
    "Simulation",
    "Speeds",
    "State",
    "Sweep",
    "TensorBoard",
    "Tuning",
    "Update",
    "Workers",
    "by",
    "ca2fl",
    "compare",
    "dirichlet",
    "fadas",
    "iid",
    "mae",
    "natural",
    "quantity",
    "r2",
    "shards",
    "sweep",
    "tune",
]
