"""A helper's process on both brokers, against an aggregator that is written from the protocol."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from support.helper_processes import HELPING, NAME, ended, helper, invitation, serving, status_of
from support.private_sets import FEDERATION
from ternbus.broker.link.tls import Tls
from ternbus.broker.protocol.identity import helper_user
from ternbus.broker.server import running, tls_service
from ternbus.broker.server.directory import BrokerDirectory, Credentials
from ternbus.broker.server.running import Engine
from ternbus.broker.sums.sets import OPEN, OPENED, PREPARE, PREPARED
from ternbus.helper.store.tables import FILE

pytestmark = pytest.mark.slow


def tls_of(folder: Path, issued: Credentials) -> Tls:
    folder.mkdir()
    for name, text in (("ca", issued.authority), ("certificate", issued.certificate), ("key", issued.key)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return Tls(ca=folder / "ca", certificate=folder / "certificate", key=folder / "key")


@contextmanager
def process(*arguments: object, point: str = "") -> Iterator[subprocess.Popen[str]]:
    started = helper(*arguments, point=point)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
            ended(started)


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS], ids=str)
def test_a_helper_enrolls_answers_restarts_and_finds_that_its_database_was_put_back(
    engine: Engine, tmp_path: Path
) -> None:
    home = BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0, engine=engine)
    issued = home.issue(helper_user(NAME), FEDERATION)
    own = tls_of(tmp_path / "own", home.issue(f"aggregator-{FEDERATION}", FEDERATION))
    folder, copy = tmp_path / "helper", tmp_path / "copy"
    with tls_service.start(home) as broker, serving(broker.url, own) as server:
        code, said = ended(
            helper("init", folder, "--federation", FEDERATION, "--broker", broker.url, "--name", NAME, "--min", 2)
        )
        assert (code, "invite AGG --helper h-1" in said) == (0, True), said
        assert "an invitation" in status_of(folder)["waits_for"]
        file = invitation(broker.url, tmp_path, ca=issued.authority, certificate=issued.certificate, key=issued.key)
        assert ended(helper("init", folder, "--invitation", file))[0] == 0
        with process("run", folder, "--json") as running_helper:
            server.until(lambda: server.card is not None and server.statuses and server.statuses[-1].online)
            asked = server.set_of("pi-1", "pi-2", "pi-3")
            assert server.ask(asked, PREPARE).outcome == PREPARED
            shown = status_of(folder)
            assert (shown["running"], shown["enrolled"], shown["sets"]) == (True, True, {"prepared": 1})
            assert shown["waits_for"] == "the aggregator to open or abandon 1 prepared set"
            assert server.ask(asked, OPEN).outcome == OPENED
            body = server.last_sum
            assert np.array_equal(asked.sum_of(body), asked.truth)
            assert ended(helper("run", folder))[0] == 2  # one process for a directory
            running_helper.kill()
            ended(running_helper)
        assert "code" not in (folder / "helper.toml").read_text().replace("# ", "").split()
        server.until(lambda: not server.statuses[-1].online)  # the last will
        copy.mkdir()
        for path in folder.glob(f"{FILE}*"):
            shutil.copy(path, copy)
        with process("run", folder) as running_helper:
            assert server.ask(asked, OPEN).outcome == OPENED
            assert server.last_sum == body
            more = server.set_of("pi-4", "pi-5")
            assert server.ask(more, PREPARE).outcome == PREPARED
            running_helper.send_signal(signal.SIGTERM)
            assert ended(running_helper)[0] == 0
        server.until(lambda: not server.statuses[-1].online)
        assert server.statuses[-1].count == 3
        for path in folder.glob(f"{FILE}*"):
            path.unlink()
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        with process("run", folder) as running_helper:
            code, said = ended(running_helper)
        assert code == 2
        assert "ternbus helper restored" in said
        assert "restored" in status_of(folder)["waits_for"]
        assert ended(helper("restored", folder))[0] == 0
        with process("run", folder):
            answer = server.ask(asked, OPEN)
            assert answer.reason.startswith("old-card")
            before = server.world().terms.helpers[0].card.number
            assert before > 1
            fresh = server.set_of("pi-1", "pi-2", version=5)
            assert server.ask(fresh, PREPARE).outcome == PREPARED
            assert server.ask(fresh, OPEN).outcome == OPENED
            assert np.array_equal(fresh.sum_of(server.last_sum), fresh.truth)


@pytest.mark.parametrize(("engine", "half"), [(Engine.MOSQUITTO, 0), (Engine.NATS, 1)], ids=str)
def test_a_helper_that_is_killed_at_every_point_gives_the_same_answers(
    engine: Engine, half: int, tmp_path: Path
) -> None:
    """Each broker has half of the points."""
    folder, points = tmp_path / "helper", [*HELPING[half::2]]
    software = running.choose(engine)
    with (
        running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker,
        serving(broker.url) as server,
    ):
        code, said = ended(helper("init", folder, "--invitation", invitation(broker.url, tmp_path), "--min", 2))
        assert code == 0, said
        killed: list[str] = []
        current = helper("run", folder, point=points.pop(0))
        try:

            def again() -> None:
                """Another process in place of one that was killed, armed for the next point."""
                nonlocal current
                if current.poll() is None:
                    return
                code, text = ended(current)
                assert code == -signal.SIGKILL, text
                killed.append(text)
                current = helper("run", folder, point=points.pop(0) if points else "")

            def has_card() -> bool:
                again()
                return server.card is not None

            server.until(has_card)
            opened, number = {}, 0
            while points or number < 2:
                asked = server.set_of(f"a-{number}", f"b-{number}", version=number)
                assert server.ask(asked, PREPARE, more=again).outcome == PREPARED
                assert server.ask(asked, OPEN, more=again).outcome == OPENED
                assert np.array_equal(asked.sum_of(server.last_sum), asked.truth)
                opened[number] = asked, server.last_sum
                number += 1
            for asked, body in opened.values():
                assert server.ask(asked, OPEN, more=again).outcome == OPENED
                assert server.last_sum == body
        finally:
            current.kill()
            ended(current)
        assert len(killed) >= len(HELPING[half::2]) - 1
    code, text = ended(helper("log", folder, "--json"))
    assert (code, len(text.splitlines())) == (0, number)
