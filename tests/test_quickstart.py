"""`ternbus aggregator up` where there is an aggregator already: what is for the first start only is not passed over."""

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ternbus.aggregator.shell import administration, cli, quickstart
from ternbus.aggregator.shell.quickstart import First
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.server.running import Engine


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    def make(broker: str) -> Path:
        directory = tmp_path / "lab"
        model = {"w": np.zeros((3, 2), np.float32)}
        administration.create(directory, federation="lab", broker=broker, model=model, settings={})
        return directory

    return make


def test_what_is_not_said_follows_from_the_host() -> None:
    first = First(model=None)
    assert (first.name, first.address, first.is_secured, first.listens_at) == ("home", "127.0.0.1", False, 1883)
    first = First(model=None, host="192.168.1.10")
    assert (first.is_secured, first.listens_at) == (True, 8883)
    first = First(model=None, federation="lab", host="192.168.1.10", tls=False, port=0)
    assert (first.name, first.is_secured, first.listens_at) == ("lab", False, 0)


@pytest.mark.parametrize(
    ("first", "option"),
    [
        (First(model=None, federation="other"), "--federation"),
        (First(model=None, host="10.0.0.5"), "--host"),
        (First(model=None, port=1887), "--port"),
        (First(model=None, tls=True), "--tls"),
    ],
)
def test_another_federation_or_broker_than_the_directory_s_is_refused(
    made: Callable[[str], Path], first: First, option: str
) -> None:
    directory = made("mqtt://127.0.0.1:1885")
    with pytest.raises(ConfigError, match=r"lab with the broker mqtt://127\.0\.0\.1:1885 already") as refused:
        quickstart.start_broker(directory, Engine.AUTO, first)
    assert f"{option} is for the first start: leave it out" in str(refused.value)


def test_no_tls_is_refused_where_the_broker_has_it(made: Callable[[str], Path]) -> None:
    directory = made("mqtts://127.0.0.1:8885")
    settings = administration.load_settings(directory)
    endpoint = Endpoint.parse(settings.broker)
    with pytest.raises(ConfigError, match="--no-tls is for the first start"):
        First(model=None, tls=False).check(directory, settings, endpoint)
    First(model=None, federation="lab", host="127.0.0.1", port=8885, tls=True).check(directory, settings, endpoint)
    First(model=Path("another.safetensors"), port=0).check(directory, settings, endpoint)


@pytest.mark.parametrize(
    ("said", "is_in_url"),
    [
        ("Server.Lan", "Server.Lan"),
        ("SERVER.lan.", "server.lan"),
        ("localhost", "127.0.0.1"),
        ("127.0.0.1", "LocalHost"),
        ("0:0:0:0:0:0:0:1", "[::1]"),
    ],
)
def test_a_host_may_be_spelled_in_another_way(made: Callable[[str], Path], said: str, is_in_url: str) -> None:
    directory = made(f"mqtt://{is_in_url}:1885")
    settings = administration.load_settings(directory)
    First(model=None, host=said).check(directory, settings, Endpoint.parse(settings.broker))
    with pytest.raises(ConfigError, match="--host is for the first start"):
        First(model=None, host="127.0.0.2").check(directory, settings, Endpoint.parse(settings.broker))


def test_without_a_model_that_can_be_read_nothing_is_made(tmp_path: Path) -> None:
    first = First(model=tmp_path / "none.safetensors", tls=True, port=0)
    with pytest.raises(ConfigError, match=r"none\.safetensors"):
        quickstart.start_broker(tmp_path / "new", Engine.AUTO, first)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--invite pi-1 --invite --", "invalid device name '--'"),
        ("--evaluator Judge", "invalid device name 'Judge'"),
        ("--federation My.Home", "invalid federation name 'My.Home'"),
        ("--invite pi-1 --evaluator pi-1", "pi-1 cannot be a device and an evaluator"),
    ],
)
def test_with_a_wrong_name_nothing_is_made(tmp_path: Path, words: str, refused: str) -> None:
    new, model = tmp_path / "new", tmp_path / "model.safetensors"
    save_file({"w": np.zeros((3, 2), np.float32)}, model)
    line = ["up", str(new), "--model", str(model), "--port", "0", *words.split()]
    assert refused in str(CliRunner().invoke(cli.app, line).exception)
    assert not new.exists()


def test_a_port_that_something_else_uses_is_not_chosen_anew(made: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        directory = made(f"mqtt://127.0.0.1:{used.getsockname()[1]}")
        with pytest.raises(ConfigError, match="it is in use; end what uses it, or change `broker` in") as refused:
            quickstart.start_broker(directory, Engine.AUTO, First(model=None))
    assert "--port" not in str(refused.value)
