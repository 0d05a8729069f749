"""The log lines for each version and each refused update, with a limit for each minute."""

from collections.abc import Iterable, Sequence
from typing import Final

from ternbus.aggregator.core.events import Action, Log, Save
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.records import VersionMade
from ternbus.aggregator.core.validation import Verdict
from ternbus.broker.log_levels import INFO, WARNING

INVALID: Final = "invalid"
NAMED_MAX: Final = 100  # updates of a version
VERSIONS_PER_MINUTE: Final = 60  # that have a line of their own; devices decide how many there are


def refused_line(limit: LogLimit, device: str, seq: int, verdict: Verdict, now: float) -> list[Action]:
    """Which update was refused, and why; each reason has lines of its own."""
    reason = verdict.reason.partition(":")[0] if verdict.outcome == INVALID else verdict.outcome
    text = f"update {seq} of {device} is {verdict.outcome}: {verdict.reason}"
    line = limit.write(f"refused-update {reason}", text, now)
    if not line:
        return []
    fields = {"device": device, "seq": seq, "outcome": verdict.outcome, "reason": verdict.reason}
    return [Log(text=line, level=WARNING if verdict.outcome == INVALID else INFO, event="refused", fields=fields)]


def version_line(limit: LogLimit, made: VersionMade, merged: Sequence[tuple[str, int]], now: float) -> list[Action]:
    """What a version was made of: updates, each of a device with a number, of which programs are told the first."""
    devices = len({device for device, _ in merged})
    whole = f"{_counted(made.updates, 'update')} of {_counted(devices, 'device')}"
    text = f"version {made.version}: {whole}, staleness {made.staleness_mean:.2f}, at most {made.staleness_max}"
    line = limit.write("version", text, now)
    fields = {
        "version": made.version, "digest": made.digest.hex(), "updates": made.updates, "devices": devices,
        "staleness_mean": made.staleness_mean, "staleness_max": made.staleness_max, "merged": merged[:NAMED_MAX],
    }  # fmt: skip
    return [Log(text=line, event="version", fields=fields)] if line else []


def made_in(actions: Iterable[Action]) -> VersionMade:
    """The version that is made by these actions."""
    records = (action.record for action in actions if isinstance(action, Save))
    return next(record for record in records if isinstance(record, VersionMade))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
