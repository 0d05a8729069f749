"""`ternbus doctor`: what it finds, what it says to do, its exit codes; with real directories and real brokers."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.small_disk import make_read_only
from support.small_world import make_directory, scratch
from ternbus import doctor
from ternbus.broker import checkup
from ternbus.broker.checkup import Grade
from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.link.connect_errors import UnansweredError
from ternbus.broker.link.link import Link
from ternbus.broker.link.probe import NAME, Inbox, judge
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server import running
from ternbus.broker.server.directory import BrokerDirectory
from ternbus.broker.server.running import Engine
from ternbus.command import app
from ternbus.edge.plan.limits import TrainingLimits
from ternbus.edge.shell.directory import DeviceDirectory

RUN = CliRunner()


def examined(*targets: object, code: int) -> dict[str, dict[str, tuple[str, str, str]]]:
    """By target and check the last grade, text and what to do."""
    done = RUN.invoke(app, ["doctor", "--json", *map(str, targets)])
    assert done.exit_code == code, done.output
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {
        target: {each["check"]: (each["grade"], each["text"], each["mend"]) for each in results}
        for target, results in found.items()
    }


@pytest.mark.parametrize(
    ("limits", "grades"),
    [
        ({}, {"packets": Grade.OK, "qos": Grade.OK}),
        ({"MaximumPacketSize": 100_000}, {"packets": Grade.WARNING, "qos": Grade.OK}),
        ({"MaximumPacketSize": 200_000}, {"packets": Grade.OK, "qos": Grade.OK}),
        ({"MaximumQoS": 0}, {"packets": Grade.OK, "qos": Grade.ERROR}),
        ({"SessionExpiryInterval": 60}, {"packets": Grade.OK, "qos": Grade.OK, "sessions": Grade.WARNING}),
        ({"ReceiveMaximum": 20}, {"packets": Grade.OK, "qos": Grade.OK, "window": Grade.OK}),
    ],
)
def test_a_broker_s_limits_are_judged_by_what_ternbus_needs(limits: dict[str, int], grades: dict[str, Grade]) -> None:
    assert {each.check: each.grade for each in judge(limits)} == grades
    assert all(each.mend for each in judge(limits) if each.grade)


def test_a_clock_before_this_version_or_not_synchronized_is_found(tmp_path: Path) -> None:
    assert checkup.clock(0.0).grade is Grade.ERROR
    assert checkup.clock(1.9e9, tmp_path / "none").grade is Grade.OK
    assert checkup.clock(1.9e9, tmp_path).grade is Grade.WARNING
    (tmp_path / "synchronized").touch()
    assert checkup.clock(1.9e9, tmp_path).grade is Grade.OK


def test_a_file_from_the_future_shows_that_the_clock_went_back(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    at = (tmp_path / "ledger.sqlite").stat().st_mtime
    assert [*checkup.ahead([tmp_path / "ledger.sqlite", tmp_path / "none"], at - 59)] == []
    (found,) = checkup.ahead([tmp_path / "ledger.sqlite"], at - 61)
    assert found.grade is Grade.WARNING


def test_an_aggregator_that_does_not_run_is_an_error_with_the_command_that_starts_it() -> None:
    directory = make_directory(scratch() / "agg")
    found = examined(directory, code=2)[str(directory)]
    assert found["keys"][0] == found["settings"][0] == "ok"
    assert found["not-running"][2] == f"start it: ternbus aggregator run {directory}"
    assert "no broker listens there" in found["broker"][1]
    (directory / "broker").mkdir()  # of `aggregator up`, which starts the broker
    found = examined(directory, code=2)[str(directory)]
    assert found["not-running"][2] == f"start it: ternbus aggregator up {directory}"
    assert "broker" not in found


def test_a_key_that_others_can_read_is_an_error_with_the_command_that_mends_it() -> None:
    directory = make_directory(scratch() / "agg")
    (directory / "aggregator.key").chmod(0o644)
    grade, _, mend = examined(directory, code=2)[str(directory)]["keys"]
    assert (grade, mend) == ("error", f"chmod 600 {directory / 'aggregator.key'}")
    text = RUN.invoke(app, ["doctor", str(directory)]).output
    assert f"-> chmod 600 {directory / 'aggregator.key'}" in text


def test_a_read_only_file_system_is_an_error_that_does_not_blame_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory(scratch() / "agg")
    make_read_only(monkeypatch)
    grade, text, mend = examined(directory, code=2)[str(directory)]["folder"]
    assert (grade, text) == ("error", f"the file system of {directory} is read-only")
    assert "dmesg" in mend


def test_settings_that_cannot_be_read_are_named() -> None:
    directory = make_directory(scratch() / "agg")
    (directory / "aggregator.toml").write_text("nonsense = ")
    assert "aggregator.toml" in examined(directory, code=2)[str(directory)]["settings"][1]


def test_what_is_no_directory_of_ternbus_is_said(tmp_path: Path) -> None:
    found = examined(tmp_path, tmp_path / "none", code=2)
    assert "of no broker, aggregator, device or helper" in found[str(tmp_path)]["folder"][1]
    assert "is no directory" in found[str(tmp_path / "none")]["folder"][1]


def test_without_a_target_the_directories_of_this_folder_are_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directory(tmp_path / "agg")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert examined(code=2).keys() == {doctor.HERE, "agg"}
    monkeypatch.chdir(tmp_path / "other")
    assert examined(code=0).keys() == {doctor.HERE}


def test_a_broker_that_is_not_there_is_an_error_that_says_what_to_do() -> None:
    port = running.reserve("127.0.0.1", 0)
    grade, text, mend = examined(f"mqtt://127.0.0.1:{port}", code=2)[f"mqtt://127.0.0.1:{port}"]["broker"]
    assert (grade, "no broker listens there" in text) == ("error", True)
    assert "ternbus broker up" in mend


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_a_broker_of_ours_passes(engine: Engine, tmp_path: Path) -> None:
    try:
        software = running.choose(engine)
    except ConfigError as error:
        pytest.skip(str(error))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        for _ in range(2):
            found = examined(broker.url, code=1 if engine is Engine.NATS else 0)[broker.url]
            grades = {check: grade for check, (grade, _, _) in found.items()}
            assert grades.pop("limits", "ok") == ("warning" if engine is Engine.NATS else "ok")
            assert {grades.pop(check) for check in ("broker", "retained", "sessions", "access")} == {"ok"}
            assert set(grades.values()) <= {"ok"}


@pytest.mark.parametrize(("error", "attempts"), [(LinkError("why"), 1), (UnansweredError("why"), 2)])
def test_only_a_connection_that_ends_without_an_answer_is_tried_again(
    error: LinkError, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent port costs 5 s each time, and a broker may count the logins that it refuses."""
    made = []

    def connect(link: Link, *_: object) -> None:
        made.append(link)
        raise error

    monkeypatch.setattr(Link, "connect", connect)
    broker = "mqtt://127.0.0.1:1883"
    assert examined(broker, code=2)[broker]["broker"][:2] == ("error", "why")
    assert len(made) == attempts


@pytest.mark.slow
def test_a_doctor_that_comes_back_at_once_is_let_in(tmp_path: Path) -> None:
    """nats-server turns an id away that has replaced itself, as where it has not seen the end of a connection yet."""
    try:
        software = running.choose(Engine.NATS)
    except ConfigError as error:
        pytest.skip(str(error))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        before = [Link(broker.url, client_id=NAME, deliver=Inbox().put, tls=None) for _ in range(2)]
        for each in before:
            each.connect(topics.up(NAME, NAME, "status"), b"")
        assert examined(broker.url, code=1)[broker.url]["broker"][0] == "ok"
        for each in before:
            each.abandon()


@pytest.mark.slow
def test_a_broker_s_directory_is_examined_with_its_certificates(tmp_path: Path) -> None:
    try:
        running.choose(Engine.AUTO)
    except ConfigError as error:
        pytest.skip(str(error))
    home = BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0)
    home.issue("pi-1", "lab")
    found = examined(home.folder, code=2)[str(home.folder)]
    assert found["broker"] == ("error", "it does not run", f"ternbus broker up {home.folder}")
    assert found["certificates"][0] == found["access"][0] == found["keys"][0] == "ok"
    os.truncate(home.folder / "access.list", 0)
    assert examined(home.folder, code=2)[str(home.folder)]["access"][0] == "warning"


def test_a_helper_without_an_invitation_is_told_to_ask_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    made = RUN.invoke(app, ["helper", "init", str(folder), "--federation", "lab", "--broker", "mqtt://127.0.0.1"])
    assert made.exit_code == 0, made.output
    found = examined(folder, code=1)[str(folder)]
    assert found["settings"][0] == "ok"
    assert found["joined"] == (
        "warning", "there is no invitation yet", "ternbus aggregator invite AGG --helper helper",
    )  # fmt: skip


def test_a_device_is_examined_with_its_outbox_and_its_way_to_the_broker(tmp_path: Path) -> None:
    port = running.reserve("127.0.0.1", 0)
    folder = device_directory(tmp_path / "pi", f"mqtt://127.0.0.1:{port}")
    found = examined(folder, code=2)[str(folder)]
    assert found["settings"][1] == "device pi of lab, task digits-numpy"
    assert found["joined"][0] == "warning"
    assert found["process"] == ("warning", "no process runs", f"ternbus edge run {folder}")
    assert "no broker listens there" in found["broker"][1]
    home = DeviceDirectory(folder)
    home.write(replace(home.settings(), code=""))
    assert "outbox.db is missing or empty" in examined(folder, code=2)[str(folder)]["outbox"][1]


def device_directory(folder: Path, broker: str) -> Path:
    """A device's directory as `edge join` makes it before it connects."""
    identity = Identity.generate()
    invitation = Invitation(
        federation="lab", device="pi", broker=broker, aggregator_key=identity.public.hex(), code="c" * 32
    )
    DeviceDirectory(folder).prepare(
        invitation, task="digits-numpy", data=None, partition="all", seed=0, hold_out=0.0, width=1.0, processor="",
        frame_bytes=122_880, username="", password_file=None, policy=None, limits=TrainingLimits(), sums=None,
    )  # fmt: skip
    return folder
