"""The dashboard beside a real aggregator: refused at the start in words, ended with it, started again by it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.dashboards import WITHIN_S, Log, Site, await_end, dashboards, next_state, serving
from support.small_world import LAB, initial_model, make_directory
from ternbus.aggregator.shell import administration, dashboard_process
from ternbus.aggregator.store import control, status
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

pytestmark = pytest.mark.slow
RUN = [sys.executable, "-m", "ternbus", "aggregator"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def directory(tmp_path: Path, broker: RunningBroker) -> Path:
    administration.create(tmp_path / "agg", federation=LAB, broker=broker.url, model=initial_model())
    return tmp_path / "agg"


class Running:
    """An aggregator's process with its log."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        with log.open("ab") as output:
            self.began = output.tell()
            command = [*RUN, *map(str, arguments)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def said(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        deadline = time.monotonic() + WITHIN_S
        while (found := re.search(pattern, self.log.read_bytes()[self.began :].decode())) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return found

    def site(self, directory: Path) -> Site:
        place = urlsplit(self.said(r"dashboard at (\S+);")[1])
        assert place.hostname is not None
        assert place.port is not None
        self.said(r"connected \(")
        return Site(directory, place.hostname, place.port)


@contextmanager
def running(log: Path, *arguments: object) -> Iterator[Running]:
    started = Running(log, *arguments)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.process.wait(WITHIN_S)


def refused(*arguments: object) -> str:
    done = subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_it_shows_a_running_aggregator_and_acts_by_it(directory: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "run", directory, "--dashboard", "127.0.0.1:0") as aggregator:
        site = aggregator.site(directory)
        with site.events() as stream:
            state = next_state(stream)
            assert state["health"]["connected"] is True
            assert state["health"]["state"] == "fine"
            assert site.get("/health").status == 200
            site.log_in()
            assert site.post("/actions/pause").status == 200  # by the process that serves the directory
            while next_state(stream)["head"]["state"] != "paused":
                pass
        assert control.is_running(directory)
        assert status.read(directory)["state"] == "paused"
        aggregator.said(r"127\.0\.0\.1, session \w{6}: pause: paused")
        aggregator.process.terminate()
        assert aggregator.process.wait(WITHIN_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_the_aggregator_however_that_ends(directory: Path, tmp_path: Path, number: int) -> None:
    with running(tmp_path / "log", "run", directory, "--dashboard", "127.0.0.1:0") as aggregator:
        site = aggregator.site(directory)
        with site.events() as stream:
            next_state(stream)
            (child,) = dashboards(aggregator.process.pid)
            aggregator.process.send_signal(number)
            aggregator.process.wait(WITHIN_S)
            await_end(child)
    log = (tmp_path / "log").read_text()
    assert "started again" not in log
    assert "Traceback" not in log


def test_an_aggregator_that_was_killed_gets_its_address_again(directory: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "run", directory, "--dashboard", "127.0.0.1:0") as first:
        port = first.site(directory).port
        first.process.kill()
        with running(tmp_path / "log", "run", directory, "--dashboard", f"127.0.0.1:{port}") as second:
            assert second.site(directory).get("/health").status == 200


def test_it_is_started_again_and_the_aggregator_goes_on(directory: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "run", directory, "--dashboard", "127.0.0.1:0") as aggregator:
        site = aggregator.site(directory)
        (child,) = dashboards(aggregator.process.pid)
        os.kill(child, signal.SIGKILL)
        aggregator.said("the dashboard ended with code -9; it is started again")
        assert site.get("/health").status == 200  # the address was never given up
        assert aggregator.process.poll() is None


def test_nothing_is_read_while_nobody_looks(directory: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "run", directory, "--dashboard", "127.0.0.1:0") as aggregator:
        site = aggregator.site(directory)
        with site.events() as stream:
            next_state(stream)
            (child,) = dashboards(aggregator.process.pid)

        def opened() -> int:
            """System calls that read, so far; a look has hundreds."""
            return int(re.search(r"syscr: (\d+)", Path(f"/proc/{child}/io").read_text())[1])  # type: ignore[index]

        quiet_since = time.monotonic()
        before = opened()
        while time.monotonic() - quiet_since < 3.0:  # three looks, if there were any
            if (now := opened()) - before > 50:
                before, quiet_since = now, time.monotonic()  # the last look was still at work
            assert time.monotonic() - quiet_since < WITHIN_S
            time.sleep(0.2)
        assert opened() - before <= 50


def test_mistakes_are_said_before_anything_is_served(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "another process has this port" in refused("run", directory, "--dashboard", f"127.0.0.1:{port}")
    for wrong in ("8080", ":8080", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1"):
        assert "write ADDRESS:PORT" in refused("run", directory, f"--dashboard={wrong}")
    assert "address of this machine" in refused("run", directory, "--dashboard", "192.0.2.1:8080")
    assert "add --dashboard" in refused("run", directory, "--dashboard-host", "fl.example")
    assert "invalid --dashboard-host" in refused(
        "run", directory, "--dashboard", "127.0.0.1:0", "--dashboard-host", "http://fl.example"
    )
    assert not (directory / "dashboard.token").exists()
    assert "write ADDRESS:PORT" in refused("up", directory / "new", "--model", "none", "--dashboard", "x")
    assert not (directory / "new").exists()


def test_without_the_extra_the_command_says_how_to_install_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_process, "LIBRARIES", ("starlette", "a_library_that_is_not_there"))
    with pytest.raises(ConfigError, match=r"pip install 'ternbus\[dashboard\]'"):
        dashboard_process.listen("127.0.0.1:0")
    assert dashboard_process.listen(None) is None
    administration.load_settings(directory)  # nothing else is asked for


def test_a_dashboard_that_cannot_run_is_logged_and_its_aggregator_is_not_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_process, "MODULE", "ternbus.aggregator.nothing")
    monkeypatch.setattr(dashboard_process, "RESTART_S", (0.01, 0.02))
    log = Log()
    with serving(make_directory(tmp_path / "aggregator"), log=log):
        deadline = time.monotonic() + WITHIN_S
        while sum("the dashboard ended with code 1" in line for line in log.lines) < 2:
            assert time.monotonic() < deadline, log.lines
            time.sleep(0.05)


def test_up_has_a_dashboard_too_and_its_log_is_json(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", initial_model(), {})
    options = ("--port", "0", "--dashboard", "127.0.0.1:0", "--log", "json")
    with running(tmp_path / "log", "up", tmp_path / "home", "--model", tmp_path / "model.safetensors", *options) as up:
        site = up.site(tmp_path / "home")
        site.log_in()
        up.said("dashboard-action")
        (line,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if "dashboard at" in line]
        assert line["url"] == f"http://{site.authority}/"
        assert site.get("/history").json["version"] == [0]
        up.process.terminate()
        assert up.process.wait(WITHIN_S) == 0


def test_the_command_prints_the_token_and_makes_a_new_one(directory: Path) -> None:
    def printed(*options: str) -> str:
        done = subprocess.run(
            [*RUN, "dashboard-token", directory, *options], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    token = printed()
    assert printed() == token == (directory / "dashboard.token").read_text().strip()
    assert printed("--new") != token
