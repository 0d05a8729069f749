"""A password without TLS: refused before anything is made or spent, unless its owner says `--no-tls`, which is kept."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternbus.aggregator.shell import administration
from ternbus.broker.errors import ConfigError
from ternbus.broker.link.link import Link
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.server import mosquitto, running
from ternbus.command import main
from ternbus.edge.shell import key_rotation
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.helper.shell.directory import HelperDirectory

LAN = "mqtt://192.0.2.2:1883"
REFUSED = (
    f"a password for {LAN} would be sent unencrypted: use mqtts://, or --no-tls if you trust everyone on the network"
)
INVITATION = Invitation(
    federation="lab",
    device="pi-1",
    broker=LAN,
    aggregator_key=Identity(b"a" * 32).public.hex(),
    code="c" * 32,
)
PASSWORD = "correct horse"

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def ternbus(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command here; its exit code, and what it printed."""

    def ran(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in arguments])
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return ran


@pytest.fixture
def login(tmp_path: Path) -> list[object]:
    secret(tmp_path / "password", PASSWORD)
    return ["--username", "us", "--password-file", tmp_path / "password"]


@pytest.fixture
def init(tmp_path: Path) -> list[object]:
    save_safetensors(tmp_path / "m.safetensors", {"w": np.zeros(3, np.float32)}, {})
    where = tmp_path / "agg"
    return ["aggregator", "init", where, "--federation", "lab", "--model", tmp_path / "m.safetensors", "--broker"]


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def invited(folder: Path, **changes: Any) -> Path:
    return secret(folder / "invitation.toml", replace(INVITATION, **changes).dumps())


def test_an_aggregator_is_not_made_for_a_password_in_the_open(
    ternbus: Command, init: list[object], login: list[object], tmp_path: Path
) -> None:
    code, said = ternbus(*init, LAN, *login)
    assert (code, said.count("\n")) == (2, 1)
    assert REFUSED in said
    assert not (tmp_path / "agg").exists()
    by_setting = ["--set", f'transport.password_file="{tmp_path / "password"}"']
    code, said = ternbus(*init, LAN, *by_setting)
    assert code == 2
    assert "use mqtts://, or --set: transport.no_tls = true if you trust" in said
    code, said = ternbus(*init, "mqtts://192.0.2.2", *login, "--no-tls")
    assert code == 2
    assert "--no-tls given for mqtts://192.0.2.2:8883, a URL with TLS: leave --no-tls out" in said
    assert not (tmp_path / "agg").exists()
    assert ternbus(*init, "mqtt://127.0.0.1:1", *login)[0] == 0  # nobody else listens there


def test_the_word_of_an_aggregators_operator_is_kept_in_its_settings(
    ternbus: Command, init: list[object], login: list[object], tmp_path: Path
) -> None:
    assert ternbus(*init, LAN, *login, "--no-tls")[0] == 0
    assert administration.load_settings(tmp_path / "agg").transport.no_tls
    assert ternbus("aggregator", "invite", tmp_path / "agg", "pi-1", "--out", tmp_path)[0] == 0
    assert "no_tls" not in (tmp_path / "pi-1.toml").read_text()  # who has another password decides for it
    file = tmp_path / "agg" / "aggregator.toml"
    text = file.read_text()
    file.write_text(text.replace("no_tls = true", "no_tls = false"))
    code, said = ternbus("aggregator", "status", tmp_path / "agg")
    assert code == 2
    assert f"use mqtts://, or {file}: transport.no_tls = true if you trust" in said
    older = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("no_tls", "password_file")))
    file.write_text(older)
    assert not administration.load_settings(tmp_path / "agg").transport.no_tls
    code, said = ternbus("aggregator", "run", tmp_path / "agg", *login[2:])
    assert code == 2
    assert REFUSED in said


def test_a_device_does_not_spend_its_invitation_on_a_password_in_the_open(
    ternbus: Command, login: list[object], tmp_path: Path
) -> None:
    join = ["edge", "join", invited(tmp_path), tmp_path / "pi", "--task", "digits-numpy", "--timeout", "0", *login]
    code, said = ternbus(*join)
    assert code == 2
    assert REFUSED in said
    assert not (tmp_path / "pi").exists()


def test_the_word_of_a_devices_owner_is_kept_in_its_settings(tmp_path: Path) -> None:
    home = DeviceDirectory(tmp_path / "pi")
    file = secret(tmp_path / "password", PASSWORD)
    about: dict[str, Any] = {"task": "digits-numpy", "data": None, "partition": "all", "password_file": file}
    with pytest.raises(ConfigError, match=r'use mqtts://, or no_tls = "yes" in edge\.toml if you trust'):
        home.prepare(INVITATION, **about)
    assert not home.folder.exists()
    home.prepare(INVITATION, **about, no_tls=True)
    assert home.settings().may_lack_tls
    toml = home.folder / "edge.toml"
    toml.write_text(toml.read_text().replace('no_tls = "yes"', 'no_tls = "no"'))
    with pytest.raises(ConfigError, match="no_tls is 'no': give \"yes\", or leave it out"):
        home.settings()


@pytest.mark.parametrize("url", [LAN, "mqtts://bus.example.org"])
def test_a_new_key_keeps_the_owners_word_until_the_broker_has_tls(url: str, tmp_path: Path) -> None:
    home = DeviceDirectory(tmp_path / "pi")
    file = secret(tmp_path / "password", PASSWORD)
    settings = home.prepare(
        INVITATION, task="digits-numpy", data=None, partition="all", password_file=file, no_tls=True
    )
    home.write(replace(settings, code=""))
    begun = key_rotation.begin(home, replace(INVITATION, broker=url, code="d" * 32))
    assert begun is not None
    renewal, prepared = begun
    assert prepared.may_lack_tls == (url == LAN)
    renewal.write(replace(prepared, code=""))
    key_rotation.finish(home)
    assert (home.settings().broker, home.settings().may_lack_tls) == (url, url == LAN)


def test_a_helper_is_not_made_for_a_password_in_the_open(ternbus: Command, login: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "bureau"
    init = ["helper", "init", folder, "--federation", "lab", "--broker", LAN, *login]
    code, said = ternbus(*init)
    assert code == 2
    assert REFUSED in said
    assert not folder.exists()
    assert ternbus(*init, "--no-tls")[0] == 0
    home = HelperDirectory(folder)
    assert home.settings().may_lack_tls
    by_tls = invited(tmp_path, device="helper", role="helper", broker="mqtts://bus.example.org")
    assert ternbus("helper", "init", folder, "--invitation", by_tls)[0] == 0
    assert not home.settings().may_lack_tls
    before = (folder / "helper.toml").read_text()
    code, said = ternbus("helper", "init", folder, "--invitation", invited(tmp_path, device="helper", role="helper"))
    assert code == 2
    assert 'use mqtts://, or no_tls = "yes" in helper.toml if you trust' in said
    assert (folder / "helper.toml").read_text() == before
    (folder / "helper.toml").write_text(before + 'no_tls = "true"\n')
    with pytest.raises(ConfigError, match=r"helper.toml: no_tls is 'true': give \"yes\", or leave it out"):
        home.settings()


def test_a_password_that_is_no_text_is_told_before_anything_is_made(
    ternbus: Command, init: list[object], login: list[object], tmp_path: Path
) -> None:
    (tmp_path / "password").write_bytes(b"k\xe4se\n")
    for command in (
        [*init, "mqtts://bus.example.org", *login],
        ["helper", "init", tmp_path / "bureau", "--federation", "lab", "--broker", "mqtts://bus.example.org", *login],
    ):
        code, said = ternbus(*command)
        assert code == 2
        assert f"{tmp_path / 'password'} has a password that is not UTF-8; save the file as UTF-8 text" in said
    assert not (tmp_path / "agg").exists()
    assert not (tmp_path / "bureau").exists()


def test_only_who_is_allowed_sends_a_password_in_the_open() -> None:
    made = partial(Link, LAN, client_id="pi", deliver=lambda _: None, username="us", password=PASSWORD)
    with pytest.raises(ConfigError, match="would be sent unencrypted"):
        made()
    made(no_tls=True)
    Endpoint.parse("mqtts://bus.example.org").check_password(no_tls=False)


def until_it_listens(port: int) -> None:
    end_s = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=60).close()
        except ConnectionRefusedError:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        else:
            return


@pytest.fixture
def lan(tmp_path: Path) -> Iterator[str]:
    """A broker without TLS that asks for a password, under a name that is not known as this machine's."""
    program = mosquitto.find()
    tool = shutil.which("mosquitto_passwd")
    if program is None or tool is None:
        pytest.skip("mosquitto is not installed")
    port = running.reserve("127.0.0.1", 0)
    for name, options in (("us", ["-b", "-c"]), ("pi", ["-b"])):
        subprocess.run([tool, *options, str(tmp_path / "users"), name, PASSWORD], check=True, timeout=20)
    (tmp_path / "users").chmod(0o644)
    text = f"user root\nlistener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path / 'users'}\n"
    (tmp_path / "mosquitto.conf").write_text(text)
    with subprocess.Popen([str(program), "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL) as process:
        try:
            until_it_listens(port)
            yield f"mqtt://127.1:{port}"
        finally:
            process.terminate()


def said_by(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "ternbus", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done
    return done.stdout + done.stderr


def test_a_federation_with_passwords_in_a_trusted_network(lan: str, init: list[object], tmp_path: Path) -> None:
    file = secret(tmp_path / "password", PASSWORD)
    agg, pi = tmp_path / "agg", tmp_path / "pi"
    said_by("edge", "init-model", "digits-numpy", tmp_path / "m.safetensors", "--force")
    said_by(*init, lan, "--username", "us", "--password-file", file, "--no-tls")
    said_by("aggregator", "invite", agg, "pi-1", "--out", tmp_path)
    assert "connected in" in said_by("doctor", agg, code=2)  # nothing runs
    with subprocess.Popen([sys.executable, "-m", "ternbus", "aggregator", "run", str(agg)]) as aggregator:
        try:
            join = ["edge", "join", tmp_path / "pi-1.toml", pi, "--task", "digits-numpy", "--timeout", 60]
            join += ["--username", "pi", "--password-file", file]
            said_by(*join, code=2)
            said_by(*join, "--no-tls")
            assert "connected in" in said_by("doctor", pi, code=1)
            said_by("edge", "run", pi, "--versions", 1)
            said_by("edge", "leave", pi, "--yes")
        finally:
            aggregator.terminate()
    assert aggregator.returncode == 0
