"""The health of an aggregator for people: the lines with which the status opens."""

import time
from typing import Final

from ternbus.aggregator.core.findings import Finding, Level, of_devices
from ternbus.aggregator.core.health import Health
from ternbus.broker.plural import counted

FINDINGS_MAX: Final = 12
HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0
MARKS: Final = {Level.DOWN: "down", Level.DEGRADED: "degraded", Level.NOTE: "note"}


def lines(health: Health, now: float, broker: str) -> list[str]:
    """What a person wants to know first, at the time ``now`` in Unix seconds."""
    wrong = [each for each in health.findings if each.level is not Level.NOTE]
    what = f": {wrong[0].sentence}" if wrong else ""
    return [
        f"health: {health.state.name.lower()}{what}",
        _process(health, now, broker),
        _version(health, now),
        *_waiting(health),
        _stores(health),
        *_findings(health.findings),
    ]


def age(seconds: float) -> str:
    """A duration for people, in its two largest units at most."""
    if 0 < seconds < 1:
        return "less than 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * DAY_S:
        return f"{seconds / HOUR_S:.0f} h"
    return f"{seconds / DAY_S:.0f} days"


def moment(at: float) -> str:
    """A time in Unix seconds, as this machine's clock shows it; OverflowError where no clock does."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except OSError as error:  # as if it were a disk's
        raise OverflowError(str(error)) from error


def _process(health: Health, now: float, broker: str) -> str:
    if health.running_since is None:
        return f"process: {'runs, and does not answer' if health.running else 'not running'}"
    running = f"process: running since {moment(health.running_since)}"
    if health.connected_since is not None:
        return f"{running}, connected to {broker} since {moment(health.connected_since)}"
    if health.lost_since is None:
        return running
    return f"{running}, not connected to {broker} for {age(now - health.lost_since)}: {health.fault}"


def _version(health: Health, now: float) -> str:
    often = "" if health.usual_s is None else f", usually one every {age(health.usual_s)}"
    past = now - health.made_at
    made = f"{age(past)} ago" if past >= 0 else f"{age(-past)} ahead of this machine's clock"
    return f"last version: {health.version}, {made} ({moment(health.made_at)}){often}"


def _waiting(health: Health) -> list[str]:
    if health.waiting_since is None or health.federation_state != "open":
        return []
    held = f"{counted(health.buffer, 'update')} here"
    if not health.waits_for:
        whom = "no device" if health.online else "a device to come online"
        return [f"waits for: {whom} ({held})"]
    names = of_devices(health.waits_for)
    if (more := health.waits_for_count - len(health.waits_for)) > 0:
        names += f", {more} others"
    return [f"waits for: {names}, since {moment(health.waiting_since)} ({held})"]


def _stores(health: Health) -> str:
    certificates = ", ".join(f"{each.name} {each.days_left:.0f} days" for each in health.certificates)
    return f"disk: {health.disk_free:.1%} free" + (f"; certificates: {certificates}" if certificates else "")


def _findings(findings: tuple[Finding, ...]) -> list[str]:
    """A line each; of many the worst."""
    if not findings:
        return []
    shown = [f"  {MARKS[each.level]:9} {each.sentence}{_since(each)}" for each in findings[:FINDINGS_MAX]]
    more = len(findings) - FINDINGS_MAX
    return ["findings:", *shown, *([f"  and {more} more; --json has all"] if more > 0 else [])]


def _since(finding: Finding) -> str:
    return "" if finding.since is None else f", since {moment(finding.since)}"
