"""Keys and codes of a real federation over TLS show in no process list, no environment, no log and no other file."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.commands import typed
from ternbus.broker.server.running import Engine

WITHIN_S = 60.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no process list here"),
]
# where secrets live: only their owner can read these (tests/test_tls.py looks)
HOMES_OF_SECRETS = re.compile(r"\.key$|/edge\.toml$|/invitations/[^/]+\.toml$|/ledger\.sqlite(-wal)?$")


def ternbus(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ternbus", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ}


def run(folder: Path, *arguments: object, code: int = 0) -> str:
    """Run a command to its end; in a process of its own if it connects to the broker."""
    if arguments[:2] in {("edge", "join"), ("edge", "run")}:
        done = subprocess.run(
            ternbus(*arguments), cwd=folder, timeout=WITHIN_S, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
    else:
        said = typed(folder, *arguments, code=code)
    with (folder / "said.log").open("a") as log:
        log.write(said)
    return said


@contextmanager
def running(folder: Path, name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ternbus(*arguments), cwd=folder, env=environment(), stdout=log, stderr=log, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(folder: Path, name: str, text: str) -> None:
    tail = subprocess.Popen(["tail", "-n", "+1", "-f", folder / f"{name}.log"], stdout=subprocess.PIPE, text=True)
    with tail:
        assert tail.stdout is not None
        for line in tail.stdout:
            if text in line:
                break
        tail.kill()


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from descendants(int(child))


def shown_by(*pids: int) -> dict[str, bytes]:
    """Command line and environment of processes and all that they started."""
    family = [each for pid in pids for each in descendants(pid)]
    return {
        f"{pid} {what}": Path(f"/proc/{pid}/{what}").read_bytes() for pid in family for what in ("cmdline", "environ")
    }


def secrets_of(folder: Path) -> dict[str, bytes]:
    """Every secret there is, by where it belongs."""
    found = {}
    for path in sorted(folder.rglob("*.key")):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("-----")]
        found[str(path)] = lines[0].encode()
    for path in sorted(folder.rglob("invitations/*.toml")):
        about = tomllib.loads(path.read_text())
        found[str(path)] = about["code"].encode()
        found[f"{path} certificate"] = about["key"].splitlines()[1].encode()
    return found


def check_hidden(secrets: Mapping[str, bytes], places: Mapping[str, bytes]) -> None:
    leaks = [
        (where, place) for place, content in places.items() for where, secret in secrets.items() if secret in content
    ]
    assert leaks == []


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_no_secret_shows_where_it_does_not_belong(engine: Engine, tmp_path: Path) -> None:
    run(tmp_path, "edge", "init-model", "digits-numpy", "model.safetensors")
    up = ["aggregator", "up", "home", "--tls", "--port", 0, "--engine", engine, "--model", "model.safetensors"]
    with running(tmp_path, "up", *up, "--invite", "pi", "--invite", "late") as aggregator:
        wait_for(tmp_path, "up", "connected (MQTT")
        run(tmp_path, "edge", "join", "home/invitations/pi.toml", "pi", "--task", "digits-numpy")
        with running(tmp_path, "edge", "edge", "run", "pi") as edge:
            wait_for(tmp_path, "edge", "was accepted")
            secrets = secrets_of(tmp_path)
            assert len(secrets) >= 10
            shown = shown_by(aggregator.pid, edge.pid)
            assert len(shown) >= 6  # the broker, too
            check_hidden(secrets, shown)
            run(tmp_path, "aggregator", "invite", "home", "pi", "--out", "again", "--expires-in", "1h")
            listed = json.loads(run(tmp_path, "aggregator", "invitations", "home", "--json"))
            assert [row["device"] for row in listed] == ["late", "pi"]
            run(tmp_path, "aggregator", "revoke", "home", "pi", "--reason", "a test")
            edge.send_signal(signal.SIGTERM)  # it may have nothing to send that would be answered,
            assert edge.wait(WITHIN_S) in {0, 3, -signal.SIGTERM}  # or be on its way out by itself
        assert "revoked this device's key (a test)" in run(tmp_path, "edge", "run", "pi", code=3)
        # what goes wrong tells nothing, either
        run(tmp_path, "edge", "join", "home/invitations/pi.toml", "thief", "--task", "digits-numpy", code=3)
        run(tmp_path, "aggregator", "status", "home")
        aggregator.send_signal(signal.SIGTERM)
        assert aggregator.wait(WITHIN_S) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not HOMES_OF_SECRETS.search(str(path))]
    places: dict[str, Any] = {str(path): path.read_bytes() for path in files if "again" not in path.parts}
    assert {"up.log", "edge.log", "said.log", "broker.log"} <= {path.name for path in files}
    check_hidden(secrets_of(tmp_path) | secrets, places)
    for database in ("home/ledger.sqlite", "pi/outbox.db"):
        code = secrets[str(tmp_path / "home/invitations/pi.toml")]
        assert code not in (tmp_path / database).read_bytes(), database  # erased when it was spent
    assert b"code" not in (tmp_path / "pi" / "edge.toml").read_bytes()
