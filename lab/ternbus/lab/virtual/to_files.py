"""A simulation from its scenario to the files in its output folder."""

import gc
import time
from contextlib import closing
from typing import Any

from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.interrupts import Interrupts
from ternbus.lab.report import written
from ternbus.lab.report.output import Output
from ternbus.lab.report.progress import Progress
from ternbus.lab.scenario import partitions
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.computation import Computation
from ternbus.lab.virtual.simulate import Simulation


def simulate(
    wanted: Scenario,
    place: Output,
    interrupts: Interrupts,
    shown: Progress,
    how: Computation,
    *,
    keep_ledger: bool,
) -> dict[str, Any]:
    """The content of `report.json`; after an interrupt it is of the versions until then, and `interrupted`.

    Raises `Interrupted` before the first version.
    """
    began, is_cut = time.monotonic(), False
    with shown:
        shown.say(f"{wanted.task} in virtual time, with {partitions.devices_in_words(wanted.devices)}")
        folder = place.aggregator if keep_ledger else None
        with (
            how.place(wanted, shown.say) as trained,
            closing(
                Simulation(wanted, load_task(wanted.task), shown, folder, trained, later=how.elsewhere)
            ) as simulation,
        ):

            def look() -> None:
                nonlocal is_cut
                if simulation.aggregator.core.model.version == 0:
                    interrupts.check()
                elif interrupts.came is not None:
                    is_cut = True
                    simulation.stop()

            gc.freeze()  # what is loaded by now stays: the collections of a run need not look at it
            simulation.run(look)
            gc.unfreeze()
            simulation.export(place.model)
            result = simulation.report(time.monotonic() - began)
    if is_cut:
        result["interrupted"] = True
    written.write(result, place, shown)
    return result
