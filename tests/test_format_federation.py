"""A federation that an older version of the code began, by real processes: it goes on, and comes to the same model.

`goes_on_to` is what exact sums make of the same two updates (tests/fixtures/formats/README.md).
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.commands import printed
from support.old_formats import FIXTURES, copy_of, expected, expected_aggregator
from ternbus.broker.server.running import Engine, choose, start

pytestmark = pytest.mark.slow


def facts(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(FIXTURES, *arguments, "--json"))
    return found


def meet_at(url: str, *folders: Path) -> None:
    """Write another broker's address where that of the day stands on which the fixture was made."""
    for path in (path for folder in folders for path in folder.glob("*.toml")):
        path.write_text(re.sub(r"mqtt://127\.0\.0\.1:\d+", url, path.read_text()))


@pytest.mark.parametrize("name", ["aggregator-1-blobs", "aggregator-5"])
def test_a_federation_that_an_older_version_began_goes_on_to_the_same_model(name: str, tmp_path: Path) -> None:
    fixture, want = copy_of(name, tmp_path), expected(name)
    home, south = fixture / "home", fixture / "devices" / "south"
    with start(choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        meet_at(broker.url, home, south)
        with subprocess.Popen(
            [sys.executable, "-m", "ternbus", "aggregator", "run", home], stderr=subprocess.PIPE, text=True
        ) as aggregator:
            assert aggregator.stderr is not None
            try:
                for line in aggregator.stderr:
                    if "connected" in line:
                        break
                # it sends the update that has no answer again; with north's, which is in the buffer, they are enough
                device = [sys.executable, "-m", "ternbus", "edge", "run", str(south)]
                subprocess.run([*device, "--versions", "1", "--timeout", "60"], cwd=FIXTURES, timeout=120, check=True)
                aggregator.send_signal(signal.SIGTERM)
                assert aggregator.wait(60) == 0
            finally:
                aggregator.kill()
    newest = facts("aggregator", "status", home)["versions"][-1]
    assert {key: newest[key] for key in ("version", "digest", "updates")} == expected_aggregator(name)["goes_on_to"]
    assert facts("aggregator", "log", "verify", home)["faults"] == []
    after, before = facts("edge", "status", south), want["devices"]["south"]
    assert (after["accepted"], after["outstanding"]) == (before["accepted"] + 1, None)
    assert after["receipt"] == {"seq": before["outstanding"]["seq"], "base": 5, "outcome": "accepted"}
    printed(FIXTURES, "aggregator", "log", "export", home, tmp_path / "log")
    found = facts("edge", "verify", south, tmp_path / "log")
    assert found["faults"] == []
    assert found["merged"][-1]["seq"] == before["outstanding"]["seq"]
    assert found["unknown_bytes"] == []
    assert len(found["unlogged"]) == (before["accepted"] if name == "aggregator-1-blobs" else 0)
