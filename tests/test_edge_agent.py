"""The device as a process on a real mosquitto, against an aggregator made of broker's primitives."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from support.edge_processes import CODE, TASK, WITHIN_S, Server, edge, joined, reap, serving, status_of
from support.scripted_aggregator import FEDERATION, decoded
from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.files import read_key, write_key
from ternbus.broker.link.link import Link
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.protocol.identity import Identity, key_id
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.ternary import content_bytes
from ternbus.broker.server import running
from ternbus.edge.learn.partition import select
from ternbus.edge.learn.task import halves_of
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell import agent, cli
from ternbus.edge.shell.directory import KEY, DeviceDirectory, Settings
from ternbus.edge.store import outbox
from ternbus.edge.tasks import digits_data

pytestmark = pytest.mark.slow

RESIDENT_KB_MAX = 60 * 1024


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        yield broker.url


@pytest.fixture
def server(url: str) -> Iterator[Server]:
    with serving(url) as started:
        yield started


@pytest.fixture(autouse=True)
def _nobody_stays_behind() -> Iterator[None]:
    yield
    reap()


def test_join_run_and_leave(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "pi", "--partition", "iid:0/4")
    assert CODE not in (folder / "edge.toml").read_text()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    code, said = server.until_ended(edge("join", tmp_path / "pi.toml", folder, "--task", TASK))
    assert code == 2
    assert f"has joined already: to train, run `ternbus edge run {folder}`; for another device, choose" in said

    code, said = server.until_ended(edge("run", folder, "--versions", 3, "--json"))
    assert code == 0, said
    events = [json.loads(line)["event"] for line in said.splitlines()]
    assert events.count("accepted") == 3
    assert [Update.from_meta(frame.meta).base for frame in server.updates] == [0, 1, 2]
    for frame in server.updates:
        update = Update.from_meta(frame.meta)
        value = decoded(server.scripted.schema, update.codec, update.encoding, frame.body)
        assert (update.codec, bool(value.any())) == ("ternary", True)
        assert len(frame.body) <= content_bytes(server.scripted.schema, "ternary")
        assert set(update.metrics) == {"loss", "accuracy", "seconds", "steps"}
    assert [status.state for status in server.statuses][-1] == "offline"
    assert {"idle", "training"} <= {status.state for status in server.statuses}
    sessions = [status.session for status in server.statuses]
    assert sessions == sorted(sessions)

    shown = status_of(folder)
    assert (shown["accepted"], shown["base"], shown["outstanding"]) == (3, 2, None)
    assert shown["receipt"] == {"seq": server.updates[-1].seq, "base": 2, "outcome": "accepted"}
    _, text = server.until_ended(edge("status", folder))
    (line,) = [each for each in text.splitlines() if each.startswith("receipt ")]
    assert line.split(None, 1)[1] == f"seq {server.updates[-1].seq}, base 2, outcome accepted"
    counters = shown["counters"]
    assert counters["updates.accepted"] == counters["sent.update"] == 3
    assert counters["sent_bytes.update"] > sum(len(frame.body) for frame in server.updates)
    assert [answer.base for answer in outbox.answers(folder)] == [2, 1, 0]

    code, said = server.until_ended(edge("leave", folder, "--yes"))
    assert (code, folder.exists()) == (0, False), said


OWN_TASK = "from beside import RATE\nfrom ternbus.edge.tasks.digits_numpy import TASK\n"


def test_a_task_of_ones_own_runs_from_any_folder(server: Server, tmp_path: Path) -> None:
    """As under systemd, which starts everything in /."""
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "my_task.py").write_text(OWN_TASK)
    (own / "beside.py").write_text("RATE = 1\n")
    (own / "queue.py").write_text("raise RuntimeError('not yours')\n")
    invitation = server.invite(tmp_path, "pi")
    process = edge("join", invitation, tmp_path / "pi", "--task", "./my_task.py:TASK", cwd=own)
    code, said = server.until_ended(process)
    assert code == 0, said
    assert DeviceDirectory(tmp_path / "pi").settings().task == f"{own}/my_task:TASK"
    code, said = server.until_ended(edge("run", tmp_path / "pi", "--versions", 1, cwd=Path("/")))
    assert code == 0, said

    path = tmp_path / "pi" / "edge.toml"
    path.write_text(path.read_text().replace(f"{own}/my_task:TASK", "my_task:TASK"))  # as version 0.1 wrote it
    code, said = server.until_ended(edge("run", tmp_path / "pi", "--versions", 1, cwd=own))
    assert code == 0, said
    code, said = server.until_ended(edge("run", tmp_path / "pi", "--versions", 1, cwd=Path("/")))
    assert code == 2
    assert said == (
        "ternbus: task my_task:TASK: no module 'my_task' is in / or installed; go to its folder or install it\n"
    )


def test_the_data_folder_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(
        federation="f", device="d", broker="mqtt://h", aggregator_key="0" * 64, task="digits", data="~/recordings"
    )
    assert settings.data_folder == tmp_path / "recordings"


def test_a_killed_device_sends_the_same_bytes_again(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    server.answer = lambda _: None
    process = edge("run", folder)
    server.until(lambda: server.updates)
    process.kill()
    process.communicate()
    server.until(lambda: server.statuses[-1].state == "offline")  # the last will
    first = server.updates.pop()
    server.answer = lambda _: "accepted"
    process = edge("run", folder, "--versions", 1)
    code, said = server.until_ended(process)
    assert code == 0, said
    assert server.updates == [first]


def test_the_statuses_of_a_device_restored_from_an_old_copy_are_news(server: Server, tmp_path: Path) -> None:
    """A receiver drops a status of an earlier session; the copy knows of none that came after it."""
    folder = joined(server, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for _ in range(3):
        code, said = server.until_ended(edge("run", folder, "--versions", 1))
        assert code == 0, said
    newest = max(status.session for status in server.statuses)
    server.statuses.clear()
    code, said = server.until_ended(edge("run", copy, "--versions", 1))
    assert code == 0, said
    assert min(status.session for status in server.statuses) > newest


def test_a_stale_update_is_kept_for_the_next(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    server.answer = lambda _: "stale"
    process = edge("run", folder)
    server.until(lambda: status_of(folder)["receipt"])
    process.send_signal(signal.SIGTERM)
    code, said = server.until_ended(process)
    assert code == 0, said
    assert "was too late" in said
    state = outbox.summary(folder).state
    (frame,) = server.updates
    update = Update.from_meta(frame.meta)
    value = decoded(server.scripted.schema, update.codec, update.encoding, frame.body)
    assert state.residual is not None
    assert state.residual.tobytes() == value.tobytes()
    assert (state.outstanding, state.answered_base) == (None, 0)


def test_sigterm_in_the_middle_of_training_ends_it_at_once(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    process = edge("run", folder, "--min-seconds", 600)
    server.until(lambda: server.statuses[-1].state == "training")
    assert edge("run", folder).wait(WITHIN_S) == 2  # one process a folder
    process.send_signal(signal.SIGTERM)
    code, said = server.until_ended(process)
    assert code == 0
    assert "stopped: SIGTERM" in said
    server.until(lambda: server.statuses[-1].state == "offline")


def test_the_numpy_agent_stays_small(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    process = edge("run", folder)
    server.until(lambda: len(server.updates) >= 5)
    peak_kb = next(
        int(line.split()[1])
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    process.send_signal(signal.SIGINT)
    assert server.until_ended(process)[0] == 0
    print(f"peak resident memory of the numpy agent: {peak_kb / 1024:.1f} MB")
    assert peak_kb < RESIDENT_KB_MAX


def test_the_evaluator_publishes_what_each_version_is_worth(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "judge")
    process = edge("evaluate", folder, "--json")
    server.until(lambda: server.metrics)
    server.scripted.state = "closed"
    server.next_version()
    code, said = server.until_ended(process)
    assert code == 0, said
    server.until(lambda: len(server.metrics) == 2)
    assert [metrics.version for metrics in server.metrics] == [0, 1]
    assert all(0 <= metrics.values["accuracy"] <= 1 and metrics.samples > 300 for metrics in server.metrics)
    assert [json.loads(line)["version"] for line in said.splitlines() if '"evaluated"' in line] == [0, 1]


def test_a_device_reports_of_its_own_data_and_keeps_a_model_of_its_own(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "pi", "--partition", "iid:0/8", "--hold-out", "0.25")
    process = edge("run", folder, "--report-metrics", "--fine-tune", "2", "--json")
    server.until(lambda: len(server.updates) >= 2)
    server.scripted.state = "closed"
    server.next_version()
    code, said = server.until_ended(process)
    assert code == 0, said
    last = server.scripted.version
    server.until(lambda: server.metrics and "personal_accuracy" in server.metrics[-1].values)
    assert {metrics.split for metrics in server.metrics} == {"local"}
    assert [metrics.version for metrics in server.metrics][-2:] == [last, last]
    assert len(server.metrics) >= 3
    held = server.metrics[-1].samples
    trained_on = {Update.from_meta(update.meta).samples for update in server.updates}
    assert trained_on == {select("iid:0/8", digits_data.load("train")[1]).size - held}
    found = status_of(folder)
    assert (found["hold_out"], found["personal"]) == ("0.25", str(folder / "personal.safetensors"))
    own = load_safetensors(folder / "personal.safetensors")
    (trainer, judge), *_ = halves_of(load_task(TASK), None, ["iid:0/8"], 0.25)
    assert judge.evaluate(own).values["accuracy"] == pytest.approx(server.metrics[-1].values["personal_accuracy"])
    assert trainer.samples + judge.samples == trained_on.pop() + held


def test_closing_ends_the_device(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    process = edge("run", folder)
    server.until(lambda: server.updates)
    server.scripted.state = "closed"
    server.publish(server.scripted.head())
    code, said = server.until_ended(process)
    assert code == 0
    assert "the federation is closed" in said


def test_its_frames_are_as_large_as_its_owner_allows(url: str, tmp_path: Path) -> None:
    with serving(url, codec="float32") as server:
        for size in (8192, 16384):  # in more than 8 parts it would ask first
            code, said = server.until_ended(
                edge("run", joined(server, tmp_path, f"pi-{size}", "--frame-bytes", size), "--versions", 1)
            )
            assert code == 0, said
            assert size // 2 < max(server.sizes) <= size
            server.sizes.clear()


@pytest.mark.parametrize("size", ["4095", "268000001", "-1", "x"])
def test_a_size_in_which_no_frame_fits_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=f"frame_bytes is '{size}'"):
        Settings(federation=FEDERATION, device="pi", broker="mqtt://x", aggregator_key="", task=TASK, frame_bytes=size)


def test_a_sealed_update_opens_with_the_aggregators_key_only(url: str, tmp_path: Path) -> None:
    with serving(url, seal=True) as server:
        folder = joined(server, tmp_path)
        code, said = server.until_ended(edge("run", folder, "--versions", 1))
        assert code == 0, said
        (frame,) = server.updates
        plain = server.scripted.identity.unseal(frame.body)
        assert plain[:16] == frame.key + frame.seq.to_bytes(8, "little")


def test_a_device_stops_at_its_privacy_budget_and_remembers_it(url: str, tmp_path: Path) -> None:
    """Its owner's epsilon pays for three updates, though the plan allows more; killed in between, it counts on."""
    pytest.importorskip("dp_accounting")
    plan = {"dp": "device", "dp_clip": 0.5, "dp_noise": 3.0, "dp_epsilon": 100.0}
    with serving(url, **plan) as server:
        folder = joined(server, tmp_path, "pi", "--dp", "device", "--max-epsilon", 2.5)
        server.answer = lambda _: None
        process = edge("run", folder)
        server.until(lambda: server.updates)
        process.kill()
        process.communicate()
        first = server.updates.pop()
        server.answer = lambda _: "accepted"
        code, said = server.until_ended(edge("run", folder))
        assert code == 4, said
        assert "the privacy budget is spent: with one more update epsilon would be" in said
        assert server.updates[0] == first
        told = [Update.from_meta(frame.meta) for frame in server.updates]
        assert [set(update.metrics) for update in told] == [{"epsilon", "delta"}] * 3
        assert [update.samples for update in told] == [1, 1, 1]
        epsilons = [update.metrics["epsilon"] for update in told]
        assert epsilons == sorted(epsilons)
        assert status_of(folder)["epsilon"] == epsilons[-1] <= 2.5
        code, said = server.until_ended(edge("run", folder))
        assert (code, len(server.updates)) == (4, 3), said


def test_joining_private_sums_to_train_without_pins_leaves_no_trace(url: str, tmp_path: Path) -> None:
    """So the same invitation serves to join with them; without --run it may be an evaluator, which needs none."""
    with serving(url, codec="private", terms=bytes(32)) as server:
        invitation = server.invite(tmp_path, "pi")
        line = ("join", invitation, tmp_path / "pi", "--task", TASK)
        code, said = server.until_ended(edge(*line, "--run"))
        assert (code, server.keys) == (2, {}), said
        assert "its invitation is still good" in said
        assert "new invitation" not in said
        assert not (tmp_path / "pi").exists()
        code, said = server.until_ended(edge(*line))
        assert (code, set(server.keys)) == (0, {"pi"}), said
        assert "to train, it needs a new invitation" in said


def test_joining_with_options_that_cannot_be_used_leaves_no_folder(server: Server, tmp_path: Path) -> None:
    """But one that was there, as after a join that was killed, stays: its key may be enrolled."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    password.chmod(0o644)
    line = ("join", server.invite(tmp_path, "pi"), tmp_path / "pi", "--task", TASK)
    code, said = server.until_ended(edge(*line, "--password-file", password))
    assert (code, "chmod 600" in said) == (2, True), said
    assert not (tmp_path / "pi").exists()
    (tmp_path / "pi").mkdir()
    write_key(tmp_path / "pi" / KEY, bytes(32))
    assert server.until_ended(edge(*line, "--password-file", password))[0] == 2
    assert read_key(tmp_path / "pi" / KEY) == bytes(32)


def test_joining_keeps_a_key_that_may_be_enrolled(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings cannot be written once the aggregator has answered: the invitation is spent, for this key."""

    def join(home: DeviceDirectory, *_: object) -> None:
        with outbox.Outbox(home.folder, home.identity().key_id) as kept:
            kept.save(replace(kept.state, session=1), None, {})  # as before the first connection
        raise ConfigError("cannot write edge.toml")

    monkeypatch.setattr(agent, "join", join)
    line = ["join", server.invite(tmp_path, "pi"), str(tmp_path / "pi"), "--task", TASK]
    assert isinstance(CliRunner().invoke(cli.app, list(map(str, line))).exception, ConfigError)
    assert (tmp_path / "pi" / KEY).exists()


def test_a_private_training_that_diverges_is_seen_by_nobody(url: str, tmp_path: Path) -> None:
    """A model at the bound and the largest rates: an update of noise comes as ever, and the device's log says why."""
    pytest.importorskip("dp_accounting")
    plan = {"dp": "device", "dp_clip": 0.5, "dp_noise": 3.0, "dp_epsilon": 100.0, "codec": "float32"}
    rates = {"learning_rate": 1e3, "momentum": 1.0, "weight_decay": 1e3, "local_steps": 40}
    with serving(url, **plan, **rates) as server:
        server.scripted.vectors[0] = np.full_like(server.scripted.vectors[0], 2.0**40)
        server.scripted.snapshot_frames.clear()
        server.publish(*server.scripted.snapshot(), server.scripted.head())
        folder = joined(server, tmp_path, "pi", "--dp", "device", "--max-epsilon", 50)
        process = edge("run", folder, "--versions", 2, "--json")
        code, said = server.until_ended(process)
        assert code == 0, said
        failed = [line for line in map(json.loads, said.splitlines()) if line["event"] == "training-failed"]
        assert len(failed) == 2
        told = [Update.from_meta(frame.meta) for frame in server.updates]
        assert [set(update.metrics) for update in told] == [{"epsilon", "delta"}] * 2
        assert {status.state for status in server.statuses} == {"idle", "training", "offline"}


def test_a_device_whose_owner_wants_privacy_does_not_train_without(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "pi", "--dp", "device", "--max-epsilon", 3)
    process = edge("run", folder, "--json")
    server.until(lambda: any(status.state == "idle" for status in server.statuses))
    server.next_version()
    server.scripted.state = "closed"
    server.publish(server.scripted.head())
    code, said = server.until_ended(process)
    assert code == 0, said
    assert "its owner requires" in said
    assert server.updates == []


def test_a_wrong_code_is_refused_and_a_task_that_does_not_fit_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "pi").mkdir()
    invitation = server.invite(tmp_path, "pi", code="wrong" * 8)
    for folder in ("pi", "new"):
        code, said = server.until_ended(edge("join", invitation, tmp_path / folder, "--task", TASK))
        assert code == 3
        assert "refused the invitation (code)" in said
    assert not (tmp_path / "new").exists()  # the command had made it
    with pytest.raises(ConfigError, match="has not finished joining"):
        DeviceDirectory(tmp_path / "pi").joined()
    refused = DeviceDirectory(tmp_path / "pi").identity()
    own = tmp_path / "own_task.py"
    own.write_text(
        "from ternbus.edge.tasks.digits_numpy import DigitsNumpy\nimport numpy as np\n"
        "class Other(DigitsNumpy):\n"
        "    def initial(self, seed):\n        return {**super().initial(seed), 'extra': np.zeros(3, np.float32)}\n"
        "TASK = Other()\n"
    )
    invitation = server.invite(tmp_path, "pi")
    code, said = server.until_ended(edge("join", invitation, "pi", "--task", "own_task:TASK", cwd=tmp_path))
    assert code == 1, said
    assert DeviceDirectory(tmp_path / "pi").identity().key_id != refused.key_id  # a new one
    assert "tensor 'extra' is (3,) in the task and missing in the federation" in said


def test_join_and_run_in_one(server: Server, tmp_path: Path) -> None:
    invitation = server.invite(tmp_path, "pi")
    for _ in range(2):  # the second time it has joined already, and goes on
        count = len(server.updates)
        process = edge("join", invitation, tmp_path / "pi", "--task", TASK, "--run")
        server.until_more_updates_than(count)
        process.send_signal(signal.SIGINT)
        assert server.until_ended(process)[0] == 0


def evaluated(server: Server, version: int) -> bool:
    return [found.version for found in server.metrics] == [*range(version + 1)]


def test_join_and_evaluate_in_one(server: Server, tmp_path: Path) -> None:
    invitation = server.invite(tmp_path, "judge")
    for version in range(2):  # the second time it has joined already, and goes on
        process = edge("join", invitation, tmp_path / "judge", "--task", TASK, "--evaluate", "--stay")
        server.until(partial(evaluated, server, version))
        process.send_signal(signal.SIGINT)
        assert server.until_ended(process)[0] == 0
        server.next_version()
    assert not server.updates


def test_who_starts_first_waits_and_gives_up_only_when_told_to(tmp_path: Path) -> None:
    with pytest.raises(LinkError):
        Link("mqtt://127.0.0.1:1", client_id="x", deliver=print).connect("t", b"")
    invitation = Invitation(
        federation=FEDERATION,
        device="pi",
        broker="mqtt://127.0.0.1:1",
        aggregator_key=Identity.generate().public.hex(),
        code=CODE,
    )
    (tmp_path / "pi.toml").write_text(invitation.dumps())
    process = edge("join", tmp_path / "pi.toml", tmp_path / "pi", "--task", TASK, "--timeout", 4)
    out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    assert "waiting for the broker (cannot connect to mqtt://127.0.0.1:1" in out
    assert "gave up after waiting 4 s for the broker" in err


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert edge("init-model", TASK, tmp_path / name, "--seed", seed).wait(WITHIN_S) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_new_key_by_a_new_invitation_signs_what_is_outstanding_anew(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path, "pi", "--partition", "iid:0/2")
    server.answer = lambda _: None
    process = edge("run", folder)
    server.until(lambda: server.updates)
    process.kill()
    server.until_ended(process)
    before, old = outbox.summary(folder), server.keys["pi"]
    assert before.state.outstanding is not None
    renewal = server.invite(tmp_path, "pi")
    code, said = server.until_ended(edge("join", "--renew", renewal, folder))
    assert code == 0, said
    assert "pi has a new key" in said
    assert server.keys["pi"] != old
    state = outbox.summary(folder).state
    assert state.key == key_id(server.keys["pi"])
    assert state.outstanding is not None
    assert state.outstanding.encoded == before.state.outstanding.encoded
    assert DeviceDirectory(folder).settings().partition == "iid:0/2"
    server.updates.clear()
    server.answer = lambda _: "accepted"
    code, said = server.until_ended(edge("run", folder, "--versions", 1))
    assert code == 0, said
    (frame,) = server.updates
    assert frame.key == key_id(server.keys["pi"])
    assert frame.meta["base"] == before.state.outstanding.base


def test_a_refused_renewal_costs_nothing(server: Server, tmp_path: Path) -> None:
    folder = joined(server, tmp_path)
    key = server.keys["pi"]
    code, said = server.until_ended(edge("join", "--renew", server.invite(tmp_path, "pi", code="x" * 32), folder))
    assert code == 3, said
    assert "refused the invitation" in said
    code, said = server.until_ended(edge("join", "--renew", server.invite(tmp_path, "other"), folder))
    assert code == 2
    assert "the invitation is for 'other'" in said
    code, said = server.until_ended(edge("join", "--renew", server.invite(tmp_path, "pi"), folder, "--task", TASK))
    assert code == 2
    assert "leave out these options" in said
    code, said = server.until_ended(edge("join", server.invite(tmp_path, "pi"), tmp_path / "new"))
    assert code == 2
    assert "add --task" in said
    assert server.until_ended(edge("run", folder, "--versions", 1))[0] == 0
    assert server.keys["pi"] == key
    assert not list(folder.glob("renewal*"))
