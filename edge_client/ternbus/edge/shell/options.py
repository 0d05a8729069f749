"""The options of a device's process."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one run: when to stop, and what to do beside training."""

    versions: int | None = None
    timeout_s: float | None = None
    min_seconds: float = 0.0
    reports: bool = False  # publish metrics of versions on the held-out data
    fine_tune: float = 0.0  # epochs before the device stops
    stays: bool = False  # while the federation is closed
    trains_next: bool = False  # joins to train at once, not to evaluate
    out: str = ""  # the file to export to
