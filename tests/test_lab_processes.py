"""The lab's child processes, with plain children in place of a federation, and the output folder of a run."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ternbus.broker.errors import ConfigError
from ternbus.lab.interrupts import Interrupted, Interrupts
from ternbus.lab.processes.child import Child
from ternbus.lab.processes.supervisor import RESTARTS_MAX, ChildError, Supervisor
from ternbus.lab.report import output

# What the children are: modules that a Python finds in a folder on its path.
MODULES = {
    "patient": "import signal; print('ready', flush=True); signal.pause()",
    "stubborn": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\n"
    "while True: signal.pause()",
    "failing": "import sys; print('one'); print('two'); sys.exit('three')",
    "mistaken": "import sys; print('ternbus: no data'); sys.exit(2)",
    "content": "print('done')",
    "spent": "import sys; sys.exit(4)",
    "parent": "import subprocess, sys, signal\n"
    "print(subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']).pid, flush=True); signal.pause()",
    "suicidal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}

MakeChild = Callable[[str], Child]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeChild]:
    """Makes a child that runs one of the modules, and leaves none running."""
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, text in MODULES.items():
        (modules / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    made: list[Child] = []

    def make(module: str) -> Child:
        made.append(Child(f"{module}-{len(made)}", tmp_path / "logs" / f"{len(made)}.log", module, []))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(said.append)
    yield supervisor
    supervisor.stop_all(grace_s=1)


def until(
    condition: Callable[[], bool], *, meanwhile: Callable[[], None] = lambda: None, timeout_s: float = 60.0
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        meanwhile()
        time.sleep(0.01)


def check_until_it_raises(supervisor: Supervisor) -> None:
    until(lambda: False, meanwhile=supervisor.check)


def has_ended(process: int, *, timeout_s: float = 60.0) -> bool:
    """Whether the process, ours or not, ends in time."""
    try:
        watched = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    ready, _, _ = select.select([watched], [], [], timeout_s)
    os.close(watched)
    return bool(ready)


def test_a_child_is_a_session_of_its_own_with_a_log(child: MakeChild) -> None:
    patient = child("patient")
    patient.start()
    until(lambda: patient.output() == "ready\n")
    assert os.getsid(patient.pid) == patient.pid != os.getsid(0)
    patient.kill()
    assert patient.ended() == -signal.SIGKILL


def test_a_child_uses_one_thread(child: MakeChild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    patient = child("patient")
    patient.start()
    until(lambda: patient.output() == "ready\n")
    assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{patient.pid}/environ").read_bytes()


def test_the_output_is_that_since_the_last_start_and_the_log_has_all(child: MakeChild) -> None:
    content = child("content")
    for _ in range(2):
        content.start()
        until(lambda: content.ended() == 0)
    assert content.output() == "done\n"
    assert content.log.read_text() == "done\ndone\n"


def test_what_a_child_started_is_killed_with_it(child: MakeChild) -> None:
    parent = child("parent")
    parent.start()
    until(lambda: parent.output().endswith("\n"))
    parent.kill()
    assert has_ended(int(parent.output()))


def test_killing_the_lab_leaves_no_child(child: MakeChild, tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from ternbus.lab.processes.child import Child\n"
        "child = Child('patient', Path(sys.argv[1]), 'patient', []); child.start(); print(child.pid, flush=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE) as lab:
        assert lab.stdout is not None
        process = int(lab.stdout.readline())
        lab.kill()
    assert has_ended(process)


def test_a_device_may_end_whose_privacy_budget_is_spent(child: MakeChild, supervisor: Supervisor) -> None:
    spent = child("spent")
    supervisor.start(spent)
    until(lambda: not spent.running)
    supervisor.check()
    assert not supervisor.running([spent.name])


def test_a_killed_child_is_started_again(child: MakeChild, supervisor: Supervisor, said: list[str]) -> None:
    patient = child("patient")
    supervisor.start(patient)
    first = patient.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: patient.pid != first, meanwhile=supervisor.check)
    assert patient.running
    assert ["was killed" in said[0], "was restarted" in said[1]] == [True, True]


def test_a_child_that_is_killed_again_and_again_ends_the_run(
    child: MakeChild, supervisor: Supervisor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternbus.lab.processes.supervisor.RESTART_AFTER_S", 0.0)
    supervisor.start(child("suicidal"))
    with pytest.raises(ChildError, match=f"killed {RESTARTS_MAX + 1} times"):
        check_until_it_raises(supervisor)


def test_a_child_that_fails_ends_the_run_with_its_last_lines(child: MakeChild, supervisor: Supervisor) -> None:
    supervisor.start(child("failing"))
    with pytest.raises(ChildError, match="failing-0 ended with exit code 1") as caught:
        check_until_it_raises(supervisor)
    assert caught.value.lines == ["one", "two", "three"]


def test_a_child_that_may_fail_is_started_again_and_then_lost(
    child: MakeChild, supervisor: Supervisor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternbus.lab.processes.supervisor.RESTART_AFTER_S", 0.0)
    one = child("failing")
    supervisor.may_fail([one.name, "another"])
    supervisor.start(one)
    until(lambda: one.name in supervisor.lost, meanwhile=supervisor.check)
    supervisor.check()
    assert one.log.read_text().count("three") == RESTARTS_MAX + 1
    assert supervisor.lost == {one.name: f"it ended with exit code 1, see {one.log}"}
    assert said[-1] == "failing-0 ended with exit code 1; the run goes on without it"


def test_a_mistake_that_all_have_made_that_may_fail_ends_the_run(
    child: MakeChild, supervisor: Supervisor, said: list[str]
) -> None:
    first, second = child("mistaken"), child("mistaken")
    supervisor.may_fail([first.name, second.name])
    supervisor.start(first)
    until(lambda: first.name in supervisor.lost, meanwhile=supervisor.check)
    assert supervisor.lost == {first.name: "no data"}
    supervisor.start(second)
    with pytest.raises(ConfigError, match="mistaken-1: no data"):
        check_until_it_raises(supervisor)


def test_a_child_that_ends_too_early_ends_the_run(child: MakeChild, supervisor: Supervisor) -> None:
    supervisor.start(child("content"))
    with pytest.raises(ChildError, match="ended with exit code 0"):
        check_until_it_raises(supervisor)


def test_a_child_that_may_end_may_end(child: MakeChild, supervisor: Supervisor) -> None:
    content = child("content")
    supervisor.may_end([content.name])
    supervisor.start(content)
    until(lambda: not supervisor.running([content.name]))
    supervisor.check()


def test_a_fault_is_no_failure_and_the_child_comes_back(
    child: MakeChild, supervisor: Supervisor, said: list[str]
) -> None:
    patient = child("patient")
    supervisor.start(patient)
    first = patient.pid
    supervisor.kill(patient.name, restart_after_s=0.1)
    assert supervisor.running([patient.name])
    until(lambda: patient.pid != first, meanwhile=supervisor.check)
    assert patient.running


def test_stopping_ends_a_child_that_ignores_it_and_one_that_waits_to_come_back(
    child: MakeChild, supervisor: Supervisor
) -> None:
    stubborn, patient = child("stubborn"), child("patient")
    supervisor.start(stubborn)
    supervisor.start(patient)
    until(lambda: stubborn.output() == "ready\n")
    supervisor.kill(patient.name, restart_after_s=0)
    supervisor.stop_all(grace_s=0.1)
    supervisor.check()
    assert (stubborn.ended(), patient.ended()) == (-signal.SIGKILL, -signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_is_a_value_until_it_is_looked_at(number: signal.Signals, code: int, word: str) -> None:
    outside = signal.signal(number, signal.default_int_handler)  # also where whoever started pytest ignores it
    try:
        with Interrupts() as interrupts:
            interrupts.check()
            signal.raise_signal(number)
            with pytest.raises(Interrupted, match=word) as caught:
                interrupts.check()
        assert caught.value.exit_code == code
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_run_replaces_only_what_a_lab_run_wrote(tmp_path: Path) -> None:
    first = output.claim(tmp_path / "out")
    first.logs.mkdir()
    first.log("broker").write_text("old")
    first.report.write_text("{}")
    (first.folder / "notes.txt").write_text("mine")
    first.release()
    second = output.claim(tmp_path / "out")
    assert sorted(path.name for path in second.folder.iterdir()) == [output.MARKER, "notes.txt"]
    second.release()


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(ConfigError, match="not from a lab run"):
        output.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_what_an_earlier_lab_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / output.MARKER).write_text(json.dumps({"wrote": ["logs", "../../elsewhere", "..", ""]}))
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.json is not from a lab run"):
        output.claim(tmp_path)
    assert (tmp_path / "report.json").read_text() == "mine"


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    out = output.claim(tmp_path / "out")
    out.logs.symlink_to(elsewhere)
    out.release()
    output.claim(tmp_path / "out").release()
    assert (elsewhere / "kept").exists()
    assert not (tmp_path / "out" / "logs").is_symlink()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = output.claim(tmp_path)
    with pytest.raises(ConfigError, match="another lab run is using"):
        output.claim(tmp_path)
    first.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        output.claim(tmp_path / "file" / "out")
