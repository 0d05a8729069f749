"""The assembly of a device's process from directory, task, outbox, core and service, for each of its commands."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, FederationError
from ternbus.broker.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED
from ternbus.broker.files import read_password
from ternbus.broker.link.link import Link, LinkEvent
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Status
from ternbus.broker.stop_signals import signals_stop
from ternbus.broker.sums import bfv
from ternbus.broker.sums.terms import BFV
from ternbus.broker.version import software
from ternbus.edge.core.actions import Log, Stop
from ternbus.edge.core.core import Core
from ternbus.edge.core.follower import InitialModel
from ternbus.edge.core.profile import Profile, Role, subscriptions
from ternbus.edge.core.state import State
from ternbus.edge.learn.class_counts import class_counts_of
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.kinds import local_notice, tensor_kinds
from ternbus.edge.learn.subnetwork import (
    Narrowed,
    evaluators_by_width,
    is_narrowing,
    trainers_by_width,
    trainers_of_device,
)
from ternbus.edge.learn.task import Task, Trainer, initial_of, placed
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell import key_rotation
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.service import PERSONAL, Report, Service
from ternbus.edge.store import outbox as outboxes
from ternbus.edge.store import outbox_salvage
from ternbus.edge.store.outbox import Outbox

_log = logging.getLogger(__name__)


def join(home: DeviceDirectory, settings: Settings, task: Task, options: Options, report: Report) -> Stop:
    """Enroll the key and check that the task's model fits; then delete the invitation's code from the settings."""
    check(settings, options)
    with home.locked():
        stop, _ = _serve(home, settings, task=task, role="join", data=None, options=options, report=report)
        if stop.code == EXIT_DONE:
            reached("joined")
            home.write(replace(settings, code=""))
    return stop


def renew(
    home: DeviceDirectory,
    invitation: Invitation,
    task: Task,
    options: Options,
    report: Report,
    *,
    rejoin: bool = False,
    account_lost: bool = False,
) -> Stop:
    """Enroll a new key with this invitation, then make it the device's key; with ``rejoin`` under new counters.

    Raises `ConfigError` for an invitation of another device, or, without ``account_lost``, for a lost privacy account;
    `CorruptError` if the outbox has lost what must not be.
    """
    key_rotation.check(home, invitation)
    with home.locked():  # all that may fail comes before the invitation is spent
        _mend_outbox(home, account_lost=account_lost)
        if not account_lost:
            key_rotation.check_account(home)
        device = home.settings().device
        if (begun := key_rotation.begin(home, invitation, rejoin=rejoin)) is None:
            return Stop(code=EXIT_DONE, reason=f"{device} has a new key: an interrupted rotation is finished")
        renewal, settings = begun
        stop = join(renewal, settings, task, options, report)
        if stop.code == EXIT_DONE:
            key_rotation.finish(home)
            done = "has a new key, and its counters start anew" if rejoin else "has a new key"
            return replace(stop, reason=f"{device} {done}")
        if stop.code == EXIT_REFUSED:
            renewal.discard()
        return stop


def _mend_outbox(home: DeviceDirectory, *, account_lost: bool) -> None:
    """The new key has counters of its own, so what can be read of a damaged outbox is enough."""
    outbox_salvage.settle(home.folder)
    with suppress(FederationError):  # it is damaged
        if not outboxes.exists(home.folder):
            return
    if outbox_salvage.is_sound(home.folder):
        return
    private = home.settings().policy is not None
    aside, lost = outbox_salvage.salvage(
        home.folder, home.identity().key_id, private=private, account_lost=account_lost
    )
    _log.warning("%s was damaged, and is kept in %s; lost: %s", home.folder / outboxes.FILE, aside, ", ".join(lost))


def serve(home: DeviceDirectory, role: Role, options: Options, report: Report) -> tuple[Stop, bool]:
    """Train, evaluate or export until the core stops. Returns its `Stop`, and whether the training thread has ended."""
    settings = home.joined()
    check(settings, options)
    if role == "evaluate" and settings.sums is not None:
        raise ConfigError(
            f"{settings.device} was joined with --private, and publishes no evaluations: invite another device, join "
            "it without --private, and evaluate there"
        )
    task = load_task(settings.task)
    with home.locked():
        key_rotation.finish(home)
        settings = home.joined()
        outboxes.check(home.folder)
        with explained(settings.task, lacks_data=not settings.data):
            data = _data(settings, task, role) if role != "export" else None
        return _serve(home, settings, task=task, role=role, data=data, options=options, report=report)


def check(settings: Settings, options: Options) -> None:
    """Raises `ConfigError` if an option needs held-out data and the device has none, or options exclude each other."""
    if settings.sums is not None and settings.sums.kind == BFV:
        bfv.require()
    if options.reports and settings.sums is not None:
        raise ConfigError(
            "--report-metrics publishes metrics of this device's data, and --private keeps them on it: leave one out"
        )
    if options.stays and options.fine_tune:
        raise ConfigError("--fine-tune works when the federation closes, and --stay waits through that: leave out one")
    if not settings.hold_out and (options.reports or options.fine_tune):
        asked = "--report-metrics" if options.reports else "--fine-tune"
        raise ConfigError(
            f"{asked} needs held-out data, and this device has none: join with `ternbus edge join … --hold-out 0.2`"
        )
    if options.fine_tune and settings.share_of_channels < 1:
        raise ConfigError(
            "--fine-tune trains a model of the full width, and this device joined with --width: leave out --fine-tune"
        )


def _data(settings: Settings, task: Task, role: Role) -> tuple[Trainer, Trainer | None]:
    """The trainer with the device's data, or an evaluator's with the test data; and one with the held-out data."""
    task = placed(task, settings.processor)
    if role == "evaluate":
        return task.evaluator(data=settings.data_folder), None
    return trainers_of_device(
        task,
        data=settings.data_folder,
        partition=settings.partition,
        width=settings.share_of_channels,
        hold_out=settings.held_share,
    )


def _narrowed(settings: Settings, task: Task, role: Role) -> Narrowed:
    """What trains, or evaluates, sub-networks of the widths of a search."""
    task = placed(task, settings.processor)
    if role == "evaluate":
        return evaluators_by_width(task, data=settings.data_folder)
    return trainers_by_width(
        task, data=settings.data_folder, partition=settings.partition, hold_out=settings.held_share
    )


def clear_status(home: DeviceDirectory, settings: Settings) -> None:
    """Clear the retained status, and unsubscribe, so that the broker queues nothing for the session.

    Raises `LinkError` if the broker fails.
    """
    status = topics.up(settings.federation, settings.device, Status.KIND)
    link = make_link(home, settings)(lambda _: None)
    link.connect(status, b"")
    link.unsubscribe(subscriptions(settings.federation, settings.device, private=settings.sums is not None))
    link.publish(status, b"", retain=True)
    link.disconnect()


def make_link(home: DeviceDirectory, settings: Settings) -> Callable[[Callable[[LinkEvent], None]], Link]:
    def connect_to(deliver: Callable[[LinkEvent], None]) -> Link:
        return Link(
            settings.broker,
            client_id=settings.device,
            username=settings.username or settings.device,
            password=read_password(settings.password_path) if settings.password_path is not None else None,
            no_tls=settings.may_lack_tls,
            deliver=deliver,
            tls=home.tls(),
            frame_bytes=settings.frame_limit,
        )

    return connect_to


def _serve(
    home: DeviceDirectory,
    settings: Settings,
    *,
    task: Task,
    role: Role,
    data: tuple[Trainer, Trainer | None] | None,
    options: Options,
    report: Report,
) -> tuple[Stop, bool]:
    """The core's `Stop`, and whether the training thread has ended."""
    identity = home.identity()
    trainer, held = data or (None, None)
    with Outbox(home.folder, identity.key_id) as outbox:
        with explained(settings.task):
            initial = initial_of(task, int(settings.seed or 0))
            classes = class_counts_of(trainer) if trainer is not None and options.reports else {}
            metadata = tensor_kinds(task, initial).metadata() if role == "export" else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
        profile = replace(
            _profile(settings, identity, task, role=role, options=options, shapes=shapes, classes=classes),
            metadata=metadata,
            is_elastic=settings.share_of_channels == 1 and is_narrowing(task),
        )
        core = Core(profile, _begun(outbox.state), InitialModel(tensors=initial))
        del initial  # the core frees it at the first head
        if role == "evaluate" and (notice := local_notice(task)):
            report(Log(event="stays-local", text=notice))
        service = Service(
            core,
            outbox=outbox,
            make_link=make_link(home, settings),
            report=report,
            trainer=trainer,
            held=held,
            narrowed=_narrowed(settings, task, role) if profile.is_elastic else None,
            min_seconds=options.min_seconds,
            personal=Path(options.out) if options.out else home.folder / PERSONAL,
            limits_frames=bool(settings.frame_bytes),
        )
        with signals_stop(service.request_stop, EXIT_FAILED if role == "join" else EXIT_DONE):
            stop = service.run()
        ended = service.stop_training()
    return stop, ended


def _begun(state: State) -> State:
    """The state of a process that begins: its sessions are above those that a copy of the folder may have forgotten.

    Else the statuses of a device whose folder was restored from an old copy would count as replays. Milliseconds keep
    the sessions of two machines with one folder apart, by which the aggregator tells them (its `clones`).
    """
    return replace(state, session=max(state.session, time.time_ns() // 1_000_000))


def _profile(
    settings: Settings,
    identity: Identity,
    task: Task,
    *,
    role: Role,
    options: Options,
    shapes: Mapping[str, tuple[int, ...]],
    classes: Mapping[str, int],
) -> Profile:
    aggregator_public = bytes.fromhex(settings.aggregator_key)
    return Profile(
        federation=settings.federation,
        device=settings.device,
        identity=identity,
        aggregator_public=aggregator_public,
        seal=lambda plain: seal(aggregator_public, plain),
        role=role,
        code=settings.code,
        tensors=shapes,
        default_plan=dict(task.default_plan),
        policy=settings.policy,
        limits=settings.limits,
        software=software(),
        versions=options.versions,
        timeout_s=options.timeout_s,
        reports=options.reports,
        classes=classes,
        fine_tune=options.fine_tune,
        stays=options.stays,
        trains_next=options.trains_next,
        sums=settings.sums,
        statistics=settings.statistics_per_day,
    )
