"""`ternbus aggregator …` as commands and processes: beside a stopped aggregator, and beside one on a real mosquitto."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.commands import printed, typed
from support.small_world import BROKER_URL, LAB, Device, float32_block, follow, initial_model
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.membership import codes
from ternbus.broker.files import load_toml, read_key
from ternbus.broker.link.link import Arrived, Link, LinkEvent
from ternbus.broker.model_files import load_safetensors, save_safetensors
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Receipt, Status
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.server import mosquitto, running
from ternbus.broker.server.running import Engine


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100"}


def run(*arguments: object, code: int = 0) -> str:
    """Run a command to its end, in this process; return what it printed, or its error where it is to fail."""
    words = ("aggregator", *arguments)
    if not code:
        return printed(Path.cwd(), *words, environment={"COLUMNS": "100"})
    said = typed(Path.cwd(), *words, code=code)
    assert said.startswith("ternbus: ")
    assert said.count("\n") == 1
    return said


def status(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("status", directory, "--json"))
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, initial_model(), {})
    return path


def init(directory: Path, model: Path, *more: str, broker: str = BROKER_URL, code: int = 0) -> str:
    return run("init", directory, "--federation", LAB, "--broker", broker, "--model", model, *more, code=code)


pytestmark = pytest.mark.slow


# --- init


def test_init_makes_keys_a_ledger_and_a_commented_configuration(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    out = init(directory, model, "--set", "merge.buffer_size=1", "--set", "staleness.discount=constant")
    assert "643 parameters" in out
    assert {entry.name for entry in directory.iterdir()} == {
        administration.KEY,
        administration.TOML,
        LEDGER,
        "vectors",
    }
    assert (directory / administration.KEY).stat().st_mode & 0o777 == 0o600
    settings = administration.load_settings(directory)
    assert (settings.merge.buffer_size, settings.staleness.discount) == (1, "constant")
    assert "# number of updates in one merge" in (directory / administration.TOML).read_text()
    found = status(directory)
    assert (found["version"], found["state"], found["buffer"], found["devices"]) == (0, "open", 0, {})


def test_init_refuses_a_directory_that_has_one(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    before = (directory / administration.KEY).read_bytes()
    assert "holds an aggregator already" in init(directory, model, code=2)
    assert (directory / administration.KEY).read_bytes() == before


def test_init_moves_into_a_directory_that_holds_other_things(tmp_path: Path, model: Path) -> None:
    (tmp_path / "agg").mkdir()
    (tmp_path / "agg" / "notes").write_text("mine")
    init(tmp_path / "agg", model, "--dense", "w")
    assert (tmp_path / "agg" / "notes").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["agg", "model.safetensors"]
    ledger = Ledger(tmp_path / "agg" / LEDGER, read_only=True)
    assert ledger.schema().ternary_elements == 0
    ledger.close()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--set", "merge.buffer_size=0"], "merge.buffer_size"),
        (["--set", "merge.bufer=3"], "merge.bufer is unknown"),
        (["--set", "merge.buffer_size"], "SECTION.KEY=VALUE"),
        (["--set", "optimizer.name=adam"], "fedavg, fedavgm, fedadagrad, fedadam, fedyogi"),
        (["--set", "federation.x=1"], "unknown section 'federation'"),
        (["--set", "plan.x=1e400"], "plan.x"),
        (["--federation", "No"], "invalid federation name"),
        (["--broker", "localhost"], "mqtt://HOST:PORT"),
        (["--model", "/none.safetensors"], "cannot read /none.safetensors: No such file or directory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path: Path, model: Path, more: list[str], named: str) -> None:
    assert named in init(tmp_path / "agg", model, *more, code=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_init_says_where_it_cannot_write(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot make" in init(tmp_path / "file" / "agg", model, code=2)
    assert "cannot make" in init(tmp_path / "file", model, code=2)


@pytest.mark.parametrize(
    "command", ["status", "devices", "invite", "invitations", "revoke", "run", "pause", "resume", "close", "export"]
)
def test_commands_want_a_directory_that_holds_an_aggregator(tmp_path: Path, command: str) -> None:
    more: dict[str, object] = {"invite": "pi", "revoke": "pi", "export": tmp_path / "out.safetensors"}
    arguments = [more[command]] if command in more else []
    assert "ternbus aggregator init" in run(command, tmp_path / "none", *arguments, code=2)
    assert list(tmp_path.iterdir()) == []


# --- beside a stopped aggregator


def test_invitations_are_printed_or_written(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    printed = Invitation.loads(run("invite", directory, "pi"))
    assert (printed.federation, printed.device, printed.broker) == (LAB, "pi", BROKER_URL)
    out = run("invite", directory, "pi", "other", "--out", tmp_path / "invitations")
    written = Invitation.from_table(load_toml(tmp_path / "invitations" / "pi.toml"))
    assert out.splitlines() == [str(tmp_path / "invitations" / f"{name}.toml") for name in ("pi", "other")]
    assert (tmp_path / "invitations" / "pi.toml").stat().st_mode & 0o777 == 0o600
    assert written.code != printed.code
    assert len(written.code) >= 22  # of 6 bits each
    ledger = Ledger(directory / LEDGER, read_only=True)
    assert codes(ledger.db)["pi"].code == written.code
    ledger.close()
    assert "add --out" in run("invite", directory, "a", "b", code=2)
    assert "invalid device name" in run("invite", directory, "Not a name", code=2)


def test_states_are_set_while_nothing_runs(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    for command, state in [("pause", "paused"), ("resume", "open"), ("close", "closed")]:
        run(command, directory)
        assert status(directory)["state"] == state
    assert "federation lab: closed, version 0" in run("status", directory)
    assert "device" in run("devices", directory)
    assert json.loads(run("devices", directory, "--json")) == {}


def test_export_writes_the_model(tmp_path: Path, model: Path) -> None:
    directory, out = tmp_path / "agg", tmp_path / "out.safetensors"
    init(directory, model)
    assert status(directory)["digest"] in run("export", directory, out)
    assert {name: (array.shape, array.tobytes()) for name, array in load_safetensors(out).items()} == {
        name: (array.shape, array.tobytes()) for name, array in initial_model().items()
    }
    assert "version 1 is not kept" in run("export", directory, "--version", "1", out, code=2)
    assert "cannot write" in run("export", directory, tmp_path / "none" / "out.safetensors", code=2)


def test_a_path_that_cannot_be_written_is_one_line_that_says_why(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    for name, why in (
        ("", "it is a folder, not a file; give the path of a file"),
        (".", "it is a folder, not a file; give the path of a file"),
        ("agg", "it is a folder, not a file; give the path of a file"),
        ("none/out", "there is no folder none; make it, or correct the path"),
        (f"{model}/out", f"{model} is a file, not a folder; give another path"),
    ):
        path = name or "."
        said = f"ternbus: cannot write {path}: {why}\n"
        assert typed(tmp_path, "aggregator", "export", "agg", name, code=2) == said
        assert typed(tmp_path, "edge", "init-model", "digits-numpy", name, code=2) == said
        said = f"ternbus: cannot use {path}: {why}\n"
        assert typed(tmp_path, "aggregator", "log", "export", "agg", name, code=2) == said
    for command in (("backup", "agg"), ("invite", "agg", "pi", "--out")):
        said = typed(tmp_path, "aggregator", *command, f"{model}/out", code=2)
        assert said.startswith(f"ternbus: cannot use {model}/out")
        assert f": {model} is a file, not a folder; give another path\n" in said


# --- beside a running one


@dataclass(slots=True)
class Running:
    """An aggregator as a process, and a client that hears all it says."""

    directory: Path
    process: subprocess.Popen[str]
    link: Link
    heard: "queue.SimpleQueue[LinkEvent]"
    retained: dict[str, bytes]
    receipts: list[Receipt]

    def until(self, done: Callable[[], object]) -> None:
        """Take in what comes until ``done()``."""
        while not done():
            event = self.heard.get(timeout=60.0)
            if isinstance(event, Arrived):
                self.link.acknowledge([event.token])
                if "/down/" in event.topic:
                    self.receipts.append(Receipt.from_meta(parse(event.payload).meta))
                elif event.payload:
                    self.retained[event.topic] = event.payload
                else:
                    self.retained.pop(event.topic, None)

    @property
    def head(self) -> Head | None:
        payload = self.retained.get(topics.head(LAB))
        return None if payload is None else Head.from_meta(parse(payload).meta)

    def until_state(self, state: str) -> None:
        self.until(lambda: self.head is not None and self.head.state == state)

    def receipt(self) -> Receipt:
        self.until(lambda: self.receipts)
        return self.receipts.pop(0)


@contextmanager
def started(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ternbus", "aggregator", "run", str(directory)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    if mosquitto.find() is None:
        pytest.skip("no mosquitto on this machine")
    with running.start(
        running.choose(Engine.MOSQUITTO), host="127.0.0.1", port=0, directory=tmp_path / "broker"
    ) as broker:
        yield broker.url


@contextmanager
def listening(directory: Path, url: str, *filters: str) -> Iterator[Running]:
    """The aggregator started, and a client of its broker that has heard its head."""
    heard: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(url, client_id="listener", deliver=heard.put)
    with started(directory) as process:
        link.connect("nobody/listens", b"")
        link.subscribe([f"{topics.root(LAB)}/all/#", f"{topics.root(LAB)}/down/#"])
        found = Running(directory, process, link, heard, {}, [])
        try:
            found.until(lambda: found.head is not None)
            yield found
        finally:
            link.disconnect(1.0)


def joined(agg: Running, name: str, schema: Schema) -> Device:
    code = Invitation.loads(run("invite", agg.directory, name)).code
    device = Device(name, schema)
    agg.link.publish(device.topic("enroll"), device.enroll(code))
    assert agg.receipt().outcome == "enrolled"
    return device


def test_a_running_aggregator_is_steered_and_watched(tmp_path: Path, model: Path, url: str) -> None:
    """Each command is in force, and the status not behind what was published, when it returns."""
    directory = tmp_path / "agg"
    init(directory, model, "--set", "merge.buffer_size=1", "--set", "downlink.codec=float32", broker=url)
    ledger = Ledger(directory / LEDGER, read_only=True)
    schema = ledger.schema()
    ledger.close()
    with listening(directory, url) as agg:
        with started(directory) as second:
            assert second.wait(60) == 2
            assert second.stderr is not None
            assert "another process serves" in second.stderr.read()
        pi = joined(agg, "pi", schema)
        (frame,) = pi.update(float32_block(schema, 1), 0)
        agg.link.publish(pi.topic("update"), frame)
        agg.link.publish(pi.topic("update"), b"nonsense")
        assert agg.receipt().outcome == "accepted"
        agg.until(lambda: agg.head is not None and agg.head.version == 1)
        found = status(directory)
        head = agg.head
        assert head is not None
        assert (found["version"], found["digest"]) == (1, head.digest.hex())
        assert found["counts"]["accepted"] == found["counts"]["merged"] == 1
        assert found["counts"]["invalid"] == {"not-a-frame": 1}
        assert found["devices"]["pi"]["bytes"] > len(frame)
        assert follow(agg.retained, Identity(read_key(directory / administration.KEY)).public)[0] == 1
        for command, state in [("pause", "paused"), ("resume", "open")]:
            run(command, directory)
            assert status(directory)["state"] == state
            agg.until_state(state)
        assert "1/1" not in run("status", directory)
        assert re.search(r"pi +device +\w+ +1 ", run("devices", directory))
        out = tmp_path / "out.safetensors"
        assert found["digest"] in run("export", directory, out)
        run("export", directory, "--version", "0", out)
        assert load_safetensors(out)["w"].tobytes() == initial_model()["w"].tobytes()
        run("close", directory)
        agg.until_state("closed")
        agg.process.send_signal(signal.SIGTERM)
        assert agg.process.wait(60) == 0
        agg.until(lambda: Status.from_meta(parse(agg.retained[topics.status(LAB)]).meta).state == "offline")
    assert status(directory)["state"] == "closed"


def test_keys_are_given_and_taken_beside_a_running_aggregator(tmp_path: Path, model: Path, url: str) -> None:
    """Each command is in force when it returns: an end, a cancellation, a revocation."""
    directory = tmp_path / "agg"
    init(directory, model, broker=url)
    ledger = Ledger(directory / LEDGER)
    schema = ledger.schema()
    with listening(directory, url) as agg:

        def enrolled(device: Device, code: str) -> Receipt:
            agg.link.publish(device.topic("enroll"), device.enroll(code))
            return agg.receipt()

        late = Invitation.loads(run("invite", directory, "late", "--expires-in", "0.001s"))
        assert (receipt := enrolled(Device("late", schema), late.code)).outcome == "refused"
        assert receipt.reason == "the invitation has expired"
        text = run("invite", directory, "guest", "--expires-in", "2w")
        assert "# It expires on " in text
        listed = json.loads(run("invitations", directory, "--json"))
        assert [(row["device"], row["state"]) for row in listed] == [("guest", "open"), ("late", "expired")]
        assert 13.9 * 86_400 < listed[0]["expires_at"] - time.time() < 14 * 86_400
        assert Invitation.loads(text).code not in run("invitations", directory) + json.dumps(listed)
        run("invitations", directory, "--cancel", "guest", "--cancel", "late")
        assert enrolled(Device("guest", schema), Invitation.loads(text).code).outcome == "refused"
        assert "guest has no open invitation" in run("invitations", directory, "--cancel", "guest", code=2)
        assert "has not joined" in run("revoke", directory, "guest", code=2)
        bad, good = joined(agg, "bad", schema), joined(agg, "good", schema)
        for device in (bad, good):
            agg.link.publish(device.topic("update"), device.update(float32_block(schema, 1), 0)[0])
            assert agg.receipt().outcome == "accepted"
        assert "bud has not joined (do you mean bad?); an" in run("revoke", directory, "bud", code=2)
        assert "bad is revoked; 1 of its" in run("revoke", directory, "bad", "--reason", "stolen")
        agg.link.publish(bad.topic("status"), bad.status("idle"))
        assert ((receipt := agg.receipt()).outcome, receipt.reason) == ("revoked", "stolen")
        found = status(directory)
        assert (found["buffer"], found["counts"]["dropped"]) == (1, 1)
        assert "1 dropped" in run("status", directory)
        assert "revoked" in run("devices", directory)
    ledger.close()


@pytest.mark.parametrize("text", ["7", "d", "-1d", "0s", "1y", "1e9d", "99999w", "inf", "1 d"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, model: Path, text: str) -> None:
    init(tmp_path / "agg", model)
    assert "30m, 12h, 7d or 2w" in run("invite", tmp_path / "agg", "pi", f"--expires-in={text}", code=2)


def test_a_killed_aggregator_goes_on_where_it_was(tmp_path: Path, model: Path, url: str) -> None:
    directory = tmp_path / "agg"
    init(directory, model, "--set", "merge.buffer_size=2", "--set", "downlink.codec=float32", broker=url)
    ledger = Ledger(directory / LEDGER, read_only=True)
    schema = ledger.schema()
    ledger.close()
    with listening(directory, url) as agg:
        pi, other = joined(agg, "pi", schema), joined(agg, "other", schema)
        frame = pi.update(float32_block(schema, 1), 0)[0]
        agg.link.publish(pi.topic("update"), frame)
        assert agg.receipt().outcome == "accepted"
        agg.process.kill()
        agg.process.wait()
        assert status(directory)["buffer"] == 1
        run("pause", directory)
        run("resume", directory)
    with listening(directory, url) as agg:
        agg.link.publish(pi.topic("update"), frame)
        assert agg.receipt().outcome == "accepted"
        agg.link.publish(other.topic("update"), other.update(float32_block(schema, 2), 0)[0])
        assert agg.receipt().outcome == "accepted"
        agg.until(lambda: agg.head is not None and agg.head.version == 1)
        found = status(directory)
        assert (found["counts"]["accepted"], found["counts"]["merged"], found["buffer"]) == (2, 2, 0)
        assert found["versions"][1]["updates"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_aggregator_waits_for_a_broker_that_is_not_there(number: int, tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    with started(directory) as process:
        assert process.stderr is not None
        assert "at version 0" in process.stderr.readline()
        assert "waiting for the broker" in process.stderr.readline()
        run("pause", directory)
        assert status(directory)["state"] == "paused"
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_restored_directory_goes_on_at_least_2_32_versions_later(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "agg"
    init(directory, model)
    before = status(directory)
    said = run("restored", directory)
    after = status(directory)
    assert f"at version {after['version']}" in said
    assert (after["version"] % 2**32, after["version"] > 0, after["digest"]) == (0, True, before["digest"])


def test_up_ends_when_its_broker_does(tmp_path: Path, model: Path) -> None:
    command = [sys.executable, "-m", "ternbus", "aggregator", "up", str(tmp_path / "home"), "--model", str(model)]
    with subprocess.Popen([*command, "--port", "0"], env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "connected" not in (line := process.stderr.readline()):
            assert line, "it ended before it was connected"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(60) == 1
        assert "ended by itself" in process.stderr.read()
