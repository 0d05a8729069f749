"""Rejoining, as processes on a real mosquitto: the way back for a device whose counters lead nowhere."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.edge_processes import Server, answering, edge, joined
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.store import outbox

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with answering(tmp_path) as started:
        yield started


def test_a_device_that_saw_a_version_far_above_all_others_comes_back_by_rejoining(
    server: Server, tmp_path: Path
) -> None:
    """Also without its outbox. Where that held the account of a privacy budget, its owner has to say so."""
    folder = joined(server, tmp_path, "pi", "--partition", "iid:0/2")
    with outbox.Outbox(folder, DeviceDirectory(folder).identity().key_id) as store:
        store.save(replace(store.state, head_version=2**62, head_seq=2**62, answered_base=2**62), None, store.counters)
    code, said = server.until_ended(edge("run", folder, "--timeout", 2))
    assert code == 1, said
    assert "run `ternbus edge rejoin`" in said
    code, said = server.until_ended(edge("rejoin", server.invite(tmp_path, "pi"), folder))
    assert code == 0, said
    assert "pi has a new key, and its counters start anew" in said
    code, said = server.until_ended(edge("run", folder, "--versions", 1))
    assert code == 0, said
    (folder / outbox.FILE).unlink()
    assert server.until_ended(edge("run", folder, "--versions", 1))[0] == 2
    with_budget = replace(DeviceDirectory(folder).settings(), dp="device", max_epsilon="8", max_delta="1e-5")
    DeviceDirectory(folder).write(with_budget)
    again = server.invite(tmp_path, "pi")
    code, said = server.until_ended(edge("rejoin", again, folder))
    assert code == 2
    assert "add --account-lost" in said
    code, said = server.until_ended(edge("rejoin", again, folder, "--account-lost"))
    assert code == 0, said
    assert DeviceDirectory(folder).settings().partition == "iid:0/2"
