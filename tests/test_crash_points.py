"""Killed at each crash point, on failing disks and with brokers that die, a federation makes the same versions."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from crash import commands, differences, private
from crash.federation import AGGREGATOR, DEVICES, Federation, at, failing, joined, preload_in
from support.canary import KILLED
from support.helper_processes import HELPING
from support.old_formats import LEDGER, copy_of, dump
from ternbus.aggregator.store.schema import FORMAT
from ternbus.broker.crash_points import POINTS, VARIABLE
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.server.running import Engine

SERVING = (  # in the order in which they are tried: the first start finds an empty broker, the last ones much work
    at("republish"), at("connect"), at("subscribe"), at("publish-status"), at("save"), at("saved"),
    at("publish-receipt"), at("publish-grant"), at("acknowledge", 3), at("body-written"), at("bodies-synced", 4),
    at("segment-begun"), at("vectors-piece-written"), at("vectors-piece-written", 2), at("vectors-written"),
    at("log-moved"), at("file-removed"), at("publish-delta"), at("publish-head"), at("publish-snapshot"),
    at("publish-head", 2), at("save", 9), at("saved", 9), at("publish-receipt", 2), at("acknowledge", 9),
    at("publish-view", 3),
)  # fmt: skip
JOINING = {
    "d0": [at("file-written"), at("file-written", 2), at("connect"), at("state-written"), at("saved", 2), at("joined")],
    "d1": [at("file-synced"), at("file-renamed"), at("publish-enroll"), at("save", 3), at("stop"), at("disconnected")],
}
TRAINING = {
    "d0": [
        at("connect"), at("publish-status", 2), at("publish-offer"), at("publish-update", 2), at("publish-metrics"),
        at("start-job", 2), at("state-written", 3), at("acknowledge", 9), at("job-done", 2), at("saved", 4),
    ],
    "d1": [
        at("subscribe"), at("publish-status"), at("start-job"), at("job-done"), at("save", 3), at("state-written", 4),
        at("saved", 5), at("publish-update"), at("acknowledge", 8), at("save", 5),
    ],
}  # fmt: skip
REVOKED = "d2"
LEAVING = [at("save-personal"), at("file-written"), at("file-renamed"), at("stop"), at("disconnected")]
RENEWING = [at("publish-enroll"), at("joined"), at("rotation-saved")]  # then a start goes on
RENEWED = [at("rotation-copied"), at("rotation-settings-written"), at("folder-renamed")]
INVITING, ASKING = [at("invited")], [at("requested")]  # the second is for a running aggregator
STOPPED = at("stop")
ELSEWHERE = {"publish-statistics"}  # test_statistics_processes.py
MIGRATING = [at("format-copied"), at("format-changed"), at("format-committed")]
FAILURES = {
    AGGREGATOR: [
        failing("full", 12), failing("unsynced", 5), failing("torn", 9), failing("broken", 20), failing("torn", 31),
    ],
    "d0": [failing("torn", 9), failing("full", 8), failing("unsynced", 4)],
    "d1": [failing("broken", 9), failing("torn", 14)],
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The run to which nothing happened; it waits until it is needed."""
    with joined(tmp_path_factory.mktemp("reference"), Engine.MOSQUITTO) as federation:
        federation.end(*DEVICES, AGGREGATOR)
        yield federation


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "half"), [(Engine.MOSQUITTO, 0), (Engine.NATS, 1)], ids=str)
def test_a_federation_killed_at_every_point_is_the_one_that_was_never_killed(
    engine: Engine, half: int, reference: Federation, tmp_path: Path
) -> None:
    """Each broker has half of the points and failures; `make crash-test` draws among all."""
    compiler = shutil.which("cc")
    preload = None if compiler is None else preload_in(tmp_path, compiler)
    with Federation(tmp_path, engine, preload) as damaged:
        damaged.plan(AGGREGATOR, *SERVING[half::2])
        damaged.start(AGGREGATOR)
        _join(damaged, half)
        for name in DEVICES:
            damaged.plan(name, *TRAINING[name][half::2])
            damaged.start(name)
        _train(damaged)
        if preload is not None:
            for name, ends in FAILURES.items():
                damaged.plan(name, *ends[half::2])
                damaged.kill(name)
        for _ in range(2):
            damaged.kill_broker()
            damaged.until_later(1)
        _train(damaged)
        _renew(damaged, half)
        _leave(damaged, half)
        reference.start(*DEVICES, AGGREGATOR)
        reference.until(lambda: reference.version() >= damaged.version(), "reference")
        reference.end(*DEVICES, AGGREGATOR)
        assert differences.found(damaged, reference) == []
        print(sum(damaged.ended.values()), "ends,", damaged.version(), "versions")


def test_every_point_is_killed_at() -> None:
    ends = [*SERVING, *RENEWING, *RENEWED, *MIGRATING, *LEAVING, *INVITING, *ASKING, STOPPED]
    ends += [end for table in (JOINING, TRAINING) for named in table.values() for end in named]
    ends += [end for ends_of_one in private.ENDS.values() for end in ends_of_one]  # in test_private_kill.py
    canary = {point.partition(":")[0] for point in KILLED}  # in test_canary_federation.py
    helping = {point.partition(":")[0] for point in HELPING}
    assert {end.what.partition(":")[0] for end in ends} | commands.POINTS | helping | canary | ELSEWHERE == set(POINTS)


@pytest.mark.parametrize("wrong", ["nowhere", "save:0", "save:x", "save:", ":1"])
def test_a_name_that_is_no_crash_point_is_refused(wrong: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ternbus", "edge", "status", tmp_path],
        env={**os.environ, VARIABLE: wrong},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"ternbus: {VARIABLE}={wrong!r} is not a crash point; use NAME or NAME:COUNT")


@pytest.mark.slow
def test_a_store_is_the_old_one_or_the_new_one_at_each_point_of_its_migration(tmp_path: Path) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    pause = [sys.executable, "-m", "ternbus", "aggregator", "pause", str(home)]
    before, formats = dump(home / LEDGER), []
    for end in MIGRATING:
        done = subprocess.run(pause, env={**os.environ, **end.environment(home, None)}, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        with closing(sqlite3.connect(home / LEDGER)) as db:
            formats += db.execute("SELECT value FROM facts WHERE name = 'format'").fetchall()
        assert dump(home / "format-5" / LEDGER) == before
    assert formats == [(5,), (5,), (FORMAT,)]
    subprocess.run(pause, timeout=60, check=True)


def _join(damaged: Federation, half: int) -> None:
    out = "--out", damaged.folder / "invitations"
    damaged.command(AGGREGATOR, "aggregator", "invite", damaged.home, *DEVICES, REVOKED, *out, ends=INVITING)
    damaged.join(*DEVICES, REVOKED, ends={name: ends[half::2] for name, ends in JOINING.items()})


def _train(damaged: Federation) -> None:
    """Until every planned end has been, and then on to two versions without any."""
    damaged.until(lambda: damaged.left() == 0, "end of the planned ends")
    damaged.until_later(2)


def _renew(damaged: Federation, half: int) -> None:
    """One device is revoked. Another gets a key, and its start does what the command had no time for."""
    damaged.command(AGGREGATOR, "aggregator", "revoke", damaged.home, REVOKED, ends=ASKING)
    states = differences.rows(damaged, "SELECT name, state FROM devices ORDER BY name")
    assert states == [*((name, "active") for name in DEVICES), (REVOKED, "revoked")]
    out = damaged.folder / "renewed"
    damaged.end("d1")
    damaged.command(AGGREGATOR, "aggregator", "invite", damaged.home, "d1", "--out", out)
    for end in (RENEWING[half], RENEWING[-1]):
        damaged.attempt("d1", end, "edge", "join", "--renew", out / "d1.toml", damaged.device("d1"))
    damaged.plan("d1", *RENEWED[half::2])
    damaged.start("d1")
    _train(damaged)
    keys = differences.rows(damaged, "SELECT device, state FROM keys WHERE device <> 'd2' ORDER BY device, state")
    assert keys == [("d0", "active"), ("d1", "active"), ("d1", "replaced")]


def _leave(damaged: Federation, half: int) -> None:
    """The federation is closed, and all processes end by themselves."""
    damaged.plan("d0", *LEAVING[half::2])
    damaged.kill("d0")
    damaged.command(AGGREGATOR, "aggregator", "close", damaged.home, ends=ASKING)
    damaged.until(lambda: damaged.all_done(*DEVICES), "end of the devices")
    assert load_safetensors(damaged.device("d0") / "personal.safetensors")
    damaged.plan(AGGREGATOR, STOPPED)
    damaged.kill(AGGREGATOR)
    damaged.until(lambda: "connected" in damaged.said(AGGREGATOR), "connection")
    damaged.interrupt(AGGREGATOR)
    damaged.until(lambda: damaged.left() == 0, "end at the last point")
    damaged.end(AGGREGATOR)
