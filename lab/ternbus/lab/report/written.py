"""What a run leaves in its output folder: report and plot, and the table that closes the run."""

from collections.abc import Mapping
from typing import Any

from ternbus.lab.report import progress, report
from ternbus.lab.report.output import Output


def write(result: Mapping[str, Any], place: Output, shown: progress.Progress) -> None:
    """Write the report and the plot, and show the closing table."""
    report.write(result, place.report)
    missing = report.plot(result, place.plot)
    shown.say(progress.closing_table(result, [str(place.report), missing or str(place.plot), str(place.model)]))
