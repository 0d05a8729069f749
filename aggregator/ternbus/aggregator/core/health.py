"""The health of an aggregator: one value, computed from what the ledger, the process and the disk say at one moment.

The status, its `--check` and `ternbus doctor` read it; so may whatever else shows how a federation is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final

from ternbus.aggregator.core import device_health, disk_guard
from ternbus.aggregator.core.findings import Finding, Level, of_devices
from ternbus.aggregator.core.health_view import Certificate, View
from ternbus.aggregator.core.refusals import advice
from ternbus.broker.plural import counted
from ternbus.broker.protocol.messages import CLOSED, OPEN

LOST_S: Final = 30.0  # without a connection for so long: down; a broker that restarts is back before
UNACKNOWLEDGED_S: Final = 60.0  # the broker has acknowledged nothing for so long: it does not work
CERTIFICATE_DAYS: Final = 30.0
STALLED: Final = 10.0  # usual times between versions without one: something holds it up
STALLED_S: Final = 600.0  # and at least so long
WITHDRAWN: Final = 2  # candidates in a row: one may be bad luck, after two somebody should look
NOT_ADMITTED: Final = "not-admitted"  # by a helper that has a roster of its own
USUAL_VERSIONS: Final = 4  # as many times between versions make a usual one


class State(IntEnum):
    """The health in one word; the values are the exit codes of plugins of Nagios and its kin."""

    FINE = 0
    DEGRADED = 1
    DOWN = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The answer to "what is wrong?", and what it rests on; times are Unix seconds, None: there is none."""

    state: State
    federation: str
    federation_state: str
    version: int
    made_at: float
    age_s: float  # of the newest version
    usual_s: float | None  # between versions
    running: bool
    running_since: float | None
    connected: bool
    connected_since: float | None
    lost_since: float | None
    fault: str
    waits_for: tuple[str, ...]
    waits_for_count: int
    waiting_since: float | None
    buffer: int
    disk_free: float
    certificates: tuple[Certificate, ...]
    devices: int  # that may train
    online: int  # of them
    findings: tuple[Finding, ...]  # the worst first

    def as_json(self) -> dict[str, Any]:
        """As JSON values; `state` is a word, `code` the exit code of `--check`."""
        table = asdict(self)
        findings = [{**asdict(each), "level": each.level.name.lower()} for each in self.findings]
        return table | {"state": self.state.name.lower(), "code": int(self.state), "findings": findings}

    def line(self) -> str:
        """One line for a monitor: the state, what is worst, and figures behind a bar, as Nagios' plugins have it."""
        words = {State.FINE: "OK", State.DEGRADED: "WARNING", State.DOWN: "CRITICAL", State.UNKNOWN: "UNKNOWN"}
        wrong = [each for each in self.findings if each.level is not Level.NOTE]
        what = "; ".join(each.sentence for each in wrong[:2]) or self._fine()
        more = f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        figures = (
            f"version={self.version} age={self.age_s:.0f}s buffer={self.buffer} devices={self.devices} "
            f"online={self.online} disk_free={100 * self.disk_free:.1f}%"
        )
        return f"{monitor_text(words[self.state], f'{self.federation}: {what}{more}')} | {figures}"

    def _fine(self) -> str:
        if self.federation_state == CLOSED and not self.running:
            return f"closed at version {self.version}"
        return f"{self.federation_state}, version {self.version}, {self.online} of {self.devices} devices online"


def monitor_text(state: str, text: str) -> str:
    """What a monitor shows, in one line; a bar in ``text``, which may be a device's, would begin figures of its own."""
    plain = "".join(each if each.isprintable() else " " for each in text.replace("|", "/"))
    return f"TERNBUS {state} - {' '.join(plain.split())}"


def examine(view: View) -> Health:
    """The health of what was seen."""
    found = [
        *_process(view),
        *_disk(view),
        *_certificates(view),
        *_versions(view),
        *_canary(view),
        *device_health.findings(view),
    ]
    ordered = tuple(sorted(found, key=lambda each: -each.level))
    worst = max((each.level for each in ordered), default=Level.NOTE)
    situation, waiting = view.situation, None if view.situation is None else view.situation.waiting
    live = situation if view.running and view.answers else None
    training = [each for each in view.devices if each.trains]
    return Health(
        state=State(worst),
        federation=view.federation,
        federation_state=view.state,
        version=view.version,
        made_at=view.made_at,
        age_s=max(0.0, view.now - view.made_at),
        usual_s=usual(view.intervals_s),
        running=view.running,
        running_since=None if live is None else view.now - live.running_s,
        connected=live is not None and live.connected_s is not None,
        connected_since=_before(view.now, None if live is None else live.connected_s),
        lost_since=_before(view.now, None if live is None else live.lost_s),
        fault="" if live is None else live.fault,
        waits_for=waiting.devices if waiting is not None and live is not None else (),
        waits_for_count=waiting.count if waiting is not None and live is not None else 0,
        waiting_since=view.now - waiting.for_s if waiting is not None and live is not None else None,
        buffer=view.buffer,
        disk_free=view.disk_free,
        certificates=view.certificates,
        devices=len(training),
        online=sum(each.online for each in training),
        findings=ordered,
    )


def usual(intervals_s: Sequence[float]) -> float | None:
    """The median of the times between versions, in seconds; None where there are too few."""
    return sorted(intervals_s)[len(intervals_s) // 2] if len(intervals_s) >= USUAL_VERSIONS else None


def _before(now: float, age_s: float | None) -> float | None:
    return None if age_s is None else now - age_s


def _process(view: View) -> list[Finding]:
    """Whether it runs, answers and reaches its broker."""
    if not view.running:
        if view.state == CLOSED:
            return [Finding(kind="stopped", text="no process runs, and the federation is closed")]
        text = f"no process serves this directory; start it: ternbus aggregator {view.start} {view.directory}"
        return [Finding(level=Level.DOWN, kind="not-running", text=text)]
    if not view.answers:
        text = "the process runs and does not answer: look at its log, and restart it"
        return [Finding(level=Level.DOWN, kind="hung", text=text)]
    situation = view.situation
    if situation is None:
        return []
    if situation.lost_s is not None:
        level = Level.DOWN if situation.lost_s >= LOST_S else Level.DEGRADED
        text = f"no connection to the broker: {situation.fault}"
        return [Finding(level=level, kind="disconnected", text=text, since=view.now - situation.lost_s)]
    if situation.unacknowledged_s >= UNACKNOWLEDGED_S:
        text = "the broker acknowledges nothing that it is sent: its disk may be full; look at its log"
        since = view.now - situation.unacknowledged_s
        return [Finding(level=Level.DOWN, kind="broker-silent", text=text, since=since)]
    if situation.withheld:
        text = f"the broker does not hold what devices begin with: {situation.withheld}"
        return [Finding(level=Level.DEGRADED, kind="broker-refuses", text=text)]
    return []


def _disk(view: View) -> list[Finding]:
    found = []
    if view.broker_disk_full:
        text = "the broker's disk is full, so that it cannot store messages: free some space there"
        found.append(Finding(level=Level.DOWN, kind="broker-disk", text=text))
    state = disk_guard.state_of(view.disk_free)
    if state != disk_guard.ENOUGH:
        level = Level.DOWN if state == disk_guard.FULL else Level.DEGRADED
        found.append(Finding(level=level, kind="disk", text=disk_guard.sentence(view.disk_free)))
    return found


def _certificates(view: View) -> list[Finding]:
    found = []
    for each in view.certificates:
        if each.days_left <= 0:
            text = f"the certificate of {each.name} has expired; run: ternbus broker renew {view.broker}"
            found.append(Finding(level=Level.DOWN, kind="certificate", text=text))
        elif each.days_left < CERTIFICATE_DAYS:
            days = f"{each.days_left:.0f} days"
            text = f"the certificate of {each.name} expires in {days}; run: ternbus broker renew {view.broker}"
            found.append(Finding(level=Level.DEGRADED, kind="certificate", text=text))
    return found


def _versions(view: View) -> list[Finding]:
    """Whether versions are made."""
    found = []
    if view.claim is not None:
        device, version = view.claim
        text = f"names version {version}, which is not here: {advice(version, view.directory)}"
        found.append(Finding(level=Level.DEGRADED, kind="newer-version", subject=device, text=text))
    found += _private(view)
    age_s = view.now - view.made_at
    if view.buffer and view.buffer_devices < view.min_devices and age_s > view.max_wait_s:
        text = (
            f"{counted(view.buffer, 'update')} of {counted(view.buffer_devices, 'device')} "
            f"wait{'s' if view.buffer == 1 else ''}: "
            f"a version has updates of {view.min_devices} devices or more ({view.min_key})"
        )
        found.append(Finding(level=Level.DEGRADED, kind="held", text=text))
    often_s = usual(view.intervals_s)
    if view.state == OPEN and view.running and often_s is not None and age_s > max(STALLED * often_s, STALLED_S):
        text = f"no new version, though one came every {often_s:.0f} s"
        found.append(Finding(level=Level.DEGRADED, kind="stalled", text=text, since=view.made_at))
    return found


def _private(view: View) -> list[Finding]:
    """Whether helpers open sums."""
    if view.state == CLOSED or not view.running:
        return []
    found = [
        Finding(level=Level.DEGRADED, kind="helpers", text=f"private updates wait for the helper {name}: {why}")
        for name, why in view.waits_for_helpers.items()
    ]
    if view.dropped:
        remedy = "; its operator lets devices in: ternbus helper admit" if NOT_ADMITTED in view.dropped else ""
        text = f"the newest private updates were dropped: {view.dropped}{remedy}"
        found.append(Finding(level=Level.DEGRADED, kind="dropped", text=text))
    return found


def _canary(view: View) -> list[Finding]:
    """Whether candidates become versions."""
    found = []
    if view.withdrawn:
        level = Level.DEGRADED if view.withdrawn >= WITHDRAWN else Level.NOTE
        last = "the last candidate was" if view.withdrawn == 1 else f"the last {view.withdrawn} candidates were"
        text = (
            f"{last} withdrawn with all updates in it: the process's log has what the group measured; revoke the "
            "device whose updates spoil the model, or raise canary.tolerance"
        )
        found.append(Finding(level=level, kind="withdrawn", text=text, since=view.made_at))
    online = {each.name for each in view.devices if each.online}
    awaited = [name for name in view.group if name not in view.reports]
    silent = awaited and not online.intersection(awaited)
    if view.candidate is not None and view.running and view.state != CLOSED and silent:
        text = (
            f"candidate {view.candidate} waits for {of_devices(awaited)}, of whom none is online: start one, or "
            "change canary.group"
        )
        found.append(Finding(level=Level.DEGRADED, kind="canary-silent", text=text))
    return found
