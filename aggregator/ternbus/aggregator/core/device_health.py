"""The findings about single devices: silent, refused, stale, failing or diverging ones, and evaluators."""

from collections.abc import Mapping, Sequence
from typing import Final

from ternbus.aggregator.core.findings import Finding, Level
from ternbus.aggregator.core.health_view import DeviceView, View
from ternbus.broker.plural import counted
from ternbus.broker.protocol.messages import OPEN

IN_A_ROW: Final = 3  # refused updates without an accepted one: it is no accident
OFFLINE_S: Final = 3600.0  # away for so long: somebody should look; before that it is a note
TRAINING: Final = "training"  # a state of devices
SILENT_S: Final = 1800.0  # `training` and not heard of, where its usual time is not known
DIVERGING: Final = 10.0  # times the median loss of all devices
LOSSES_MIN: Final = 3  # devices that say one
BEHIND_VERSIONS: Final = 3  # that an evaluator has not measured
BEHIND_S: Final = 600.0  # and for so long
ADVICE: Final[Mapping[str, str]] = {
    "closed": "the federation is closed: see `ternbus aggregator resume`",
    "too-large": "its updates are longer than merge.max_update_norm: look at its data, or raise the limit",
}
OF_MODEL: Final = "its task or its version of Ternbus is not the federation's: see `ternbus edge check` there"


def findings(view: View) -> list[Finding]:
    """All that is wrong with devices, in the order of the devices; presence only counts while a process can see it."""
    training = [each for each in view.devices if each.trains]
    found = [*_cloned(view.devices), *_failing(view.devices), *_refused(view.devices), *_diverging(training)]
    if view.running and view.state == OPEN:
        found += [*_absent(view, training), *_silent(view, training), *_evaluators(view)]
    return found


def _cloned(devices: Sequence[DeviceView]) -> list[Finding]:
    text = "is used by two machines: revoke it, and invite each machine by its own name"
    return [
        Finding(level=Level.DEGRADED, kind="cloned", subject=each.name, text=text) for each in devices if each.cloned
    ]


def _failing(devices: Sequence[DeviceView]) -> list[Finding]:
    return [
        Finding(level=Level.DEGRADED, kind="failing", subject=each.name, text=f"fails: {each.failing}")
        for each in devices
        if each.failing
    ]


def _refused(devices: Sequence[DeviceView]) -> list[Finding]:
    """Devices whose updates are always invalid, or always stale; all of them stale is a finding of its own."""
    found = []
    stuck = [each for each in devices if each.refused_in_a_row >= IN_A_ROW]
    answered = [each for each in devices if each.outcome and each.trains]
    all_stale = any(each.trains for each in stuck) and all(each.outcome == "stale" for each in answered)
    if all_stale:
        text = (
            f"all updates are stale, of {counted(len(answered), 'device')}: they train for longer than staleness.max "
            "versions take; raise staleness.max or merge.buffer_size, or let devices train for less"
        )
        found.append(Finding(level=Level.DEGRADED, kind="all-stale", text=text))
    for each in stuck:
        if each.evaluates:
            text = (
                "is an evaluator and trains, in vain: run `ternbus edge evaluate` there, or invite it by another name"
            )
            found.append(Finding(level=Level.DEGRADED, kind="refused", subject=each.name, text=text))
        elif each.outcome == "stale" and not all_stale:
            text = f"is too slow: its last {each.refused_in_a_row} updates were stale ({each.reason})"
            found.append(Finding(level=Level.DEGRADED, kind="stale", subject=each.name, text=text))
        elif each.outcome == "invalid":
            slug = each.reason.partition(":")[0]
            advice = ADVICE.get(slug, OF_MODEL)
            text = f"is always refused, {each.refused_in_a_row} times in a row: {each.reason}; {advice}"
            found.append(Finding(level=Level.DEGRADED, kind="refused", subject=each.name, text=text))
    return found


def _diverging(devices: Sequence[DeviceView]) -> list[Finding]:
    """Devices whose loss is many times that of the others; one that is not finite says so as a failure."""
    losses = sorted(abs(each.loss) for each in devices if each.loss is not None)
    if len(losses) < LOSSES_MIN or not (usual := losses[len(losses) // 2]):
        return []
    return [
        Finding(
            level=Level.DEGRADED,
            kind="diverging",
            subject=each.name,
            text=f"diverges, or has other data: its last loss is {each.loss:.4g}, the median of all is {usual:.4g}",
        )
        for each in devices
        if each.loss is not None and abs(each.loss) > DIVERGING * usual
    ]


def _absent(view: View, devices: Sequence[DeviceView]) -> list[Finding]:
    """Devices that are offline: a note at first, since devices come and go."""
    if not devices:
        return [
            Finding(
                kind="no-device", text=f"no device has joined; run: ternbus aggregator invite {view.directory} NAME"
            )
        ]
    found = []
    if not any(each.online for each in devices):
        since = max((each.seen_at for each in devices if each.seen_at is not None), default=None)
        text = f"no device is online, of {len(devices)}"
        found.append(Finding(level=Level.DEGRADED, kind="nobody", text=text, since=since))
    for each in devices:
        if each.online:
            continue
        if each.seen_at is None:
            found.append(Finding(kind="offline", subject=each.name, text="has joined and was never online"))
            continue
        level = Level.DEGRADED if view.now - each.seen_at > OFFLINE_S else Level.NOTE
        found.append(
            Finding(
                level=level,
                kind="offline",
                subject=each.name,
                text="is offline: revoke it if it does not return",
                since=each.seen_at,
            )
        )
    return found


def _silent(view: View, devices: Sequence[DeviceView]) -> list[Finding]:
    """Devices that are online by their own word, and say nothing for several times their usual time.

    Where that time is not known a training may take long: a note.
    """
    known = {} if view.situation is None else view.situation.waiting.silent
    found = []
    for each in devices:
        if not each.online or each.waits or each.failing:
            continue
        text = f"is silent: it says that it is {each.state}, and nothing comes; look at its log, restart it"
        if each.name in known:
            since = view.now - known[each.name]
            found.append(Finding(level=Level.DEGRADED, kind="silent", subject=each.name, text=text, since=since))
        elif each.state == TRAINING and each.seen_at is not None and view.now - each.seen_at > SILENT_S:
            found.append(Finding(kind="silent", subject=each.name, text=text, since=each.seen_at))
    return found


def _evaluators(view: View) -> list[Finding]:
    """Evaluators that do not measure: offline, or behind."""
    judges = [each for each in view.devices if each.evaluates]
    found = []
    for each in judges:
        last = view.evaluated.get(each.name)
        behind = "it has measured no version" if last is None else f"the last version that it has measured is {last}"
        if not each.online:
            text = f"is an evaluator and offline: {behind}"
            found.append(
                Finding(level=Level.DEGRADED, kind="evaluator", subject=each.name, text=text, since=each.seen_at)
            )
        elif view.version - (-1 if last is None else last) > BEHIND_VERSIONS and _long_ago(view, each):
            text = f"is an evaluator and measures nothing: {behind}, the newest is {view.version}"
            found.append(
                Finding(level=Level.DEGRADED, kind="evaluator", subject=each.name, text=text, since=each.seen_at)
            )
    return found


def _long_ago(view: View, device: DeviceView) -> bool:
    return device.seen_at is not None and view.now - device.seen_at > BEHIND_S
