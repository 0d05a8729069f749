"""Commands that root runs on the folders of services leave them usable by the services' users."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.other_users import ENVIRONMENT, OTHER, PORTIONS, PYTHON, environment, only_root, readable_by_others
from support.small_world import LAB, initial_model
from ternbus.broker.model_files import save_safetensors

pytestmark = [pytest.mark.slow, only_root]


def ternbus(*arguments: object) -> list[str]:
    return [PYTHON, "-m", "ternbus", *map(str, arguments)]


def run(*arguments: object) -> str:
    done = subprocess.run(ternbus(*arguments), capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def services() -> Iterator[Path]:
    """A folder of root's with two of a service's user; every pytest that starts closes its own to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        _fill(folder)
        yield folder


def _fill(folder: Path) -> None:
    for name in ("agg", "bus", "helper"):
        (folder / name).mkdir(mode=0o700)
        os.chown(folder / name, OTHER, OTHER)
    save_safetensors(folder / "model.safetensors", initial_model(), {})
    (folder / "model.safetensors").chmod(0o600)  # root's alone


def owners(folder: Path) -> dict[str, int]:
    """Of everything in it that is not its user's."""
    found = {str(path.relative_to(folder)): path.lstat().st_uid for path in folder.rglob("*")}
    assert found
    return {name: uid for name, uid in found.items() if uid != OTHER}


@readable_by_others
def test_what_root_does_leaves_no_file_of_root(services: Path) -> None:
    agg, bus = services / "agg", services / "bus"
    run("broker", "init", bus, "--name", "127.0.0.1", "--port", "18883")
    run("broker", "certificate", bus, "pi-9", "--federation", LAB, "--out", services / "certificates")
    run("helper", "init", services / "helper", "--federation", LAB, "--broker", "mqtt://127.0.0.1:1", "--roster", "own")
    run("helper", "admit", services / "helper", "pi", "ab" * 32)
    run("helper", "restored", services / "helper")
    run("helper", "status", services / "helper")
    model = services / "model.safetensors"
    run("aggregator", "init", agg, "--federation", LAB, "--broker-dir", bus, "--model", model)
    run("aggregator", "invite", agg, "pi", "other", "--out", agg / "invitations" / "new")
    run("aggregator", "pause", agg)
    run("aggregator", "restored", agg)
    assert "paused" in run("aggregator", "status", agg)
    out = services / "model-out.safetensors"
    run("aggregator", "export", agg, out)
    run("aggregator", "log", "export", agg, agg / "log")
    assert out.stat().st_uid == 0  # in a folder of root's
    with subprocess.Popen(
        ternbus("aggregator", "run", agg), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stderr is not None
        assert "at version" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    other, own = services / "other", services / "certificates" / f"aggregator-{LAB}"  # which only root may read
    other.mkdir(mode=0o700)
    os.chown(other, OTHER, OTHER)
    run("broker", "certificate", bus, own.name, "--federation", LAB, "--out", own.parent)
    away = "mqtts://127.0.0.1:1"
    run("aggregator", "init", other, "--federation", LAB, "--broker", away, "--tls", own, "--model", model)
    assert (owners(agg), owners(bus), owners(services / "helper"), owners(other)) == ({}, {}, {}, {})
    assert "paused" in run("aggregator", "status", agg)  # which has become the user


@readable_by_others
def test_what_root_restores_belongs_to_the_owner_of_the_backup(services: Path) -> None:
    agg, out, new = services / "agg", services / "out", services / "new"
    url = ("--broker", "mqtt://127.0.0.1:1")
    run("aggregator", "init", agg, "--federation", LAB, *url, "--model", services / "model.safetensors")
    out.mkdir(mode=0o700)
    os.chown(out, OTHER, OTHER)
    run("aggregator", "backup", agg, out)
    (made,) = (path for path in out.iterdir() if path.is_dir())
    assert made.stat().st_uid == OTHER
    run("aggregator", "restore", made, new)
    run("aggregator", "restore", made, agg, "--force")
    assert (new.stat().st_uid, owners(new), owners(agg), owners(out)) == (OTHER, {}, {}, {})
    assert LAB in run("aggregator", "status", new)


@readable_by_others
def test_a_password_that_the_service_could_not_read_is_refused_before_anything_is_made(services: Path) -> None:
    password, model = services / "password", services / "model.safetensors"
    password.write_text("secret\n")
    password.chmod(0o600)
    command = ternbus(
        "aggregator", "init", services / "agg", "--federation", LAB, "--broker", "mqtts://bus.example.org",
        "--model", model, "--username", LAB, "--password-file", password,
    )  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, list((services / "agg").iterdir())) == (2, []), done.stderr
    assert f"cannot read {password}" in done.stderr
    os.chown(password, OTHER, OTHER)
    run(*command[3:])


def test_what_the_owner_cannot_read_is_named_at_once(services: Path) -> None:
    """Else a command would end somewhere on its way, where it imports what only root may read."""
    mine = services / "root"
    roots = {mine / portion.parent.name: portion for portion in PORTIONS}
    for root, portion in roots.items():
        shutil.copytree(portion, root / "ternbus", ignore=shutil.ignore_patterns("__pycache__"))
    mine.chmod(0o700)
    command = ternbus("aggregator", "status", services / "agg")
    done = subprocess.run(command, env=environment(*roots), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"ternbus: Ternbus in {mine}")
    assert f"cannot be read by user {OTHER}, to whom {services / 'agg'} belongs: install Ternbus" in done.stderr
    assert list((services / "agg").iterdir()) == []
