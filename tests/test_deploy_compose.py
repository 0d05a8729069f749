"""The images and the compose file of deploy/: valid, in agreement with each other, and tried without docker.

The commands of its containers run here as processes: all but the containers themselves is real.
"""

import getpass
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.deployed import BIN, Containers
from ternbus.broker.server.mosquitto import find
from ternbus.broker.server.running import reserve

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
SETUP = DEPLOY / "compose" / "setup.sh"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def valued(text: str) -> str:
    """The text with each variable's default."""
    return re.sub(r"\$\{\w+:-([^}]*)}", r"\1", text)


def checked(program: str, *arguments: object) -> None:
    installed = BIN / program  # from the extra `dev`
    command = [str(installed) if installed.exists() else program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_follows_the_compose_specification() -> None:
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / "compose.yaml")


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_docker_compose_accepts_it() -> None:
    checked("docker-compose", "-f", DEPLOY / "compose" / "compose.yaml", "config", "--quiet")


def test_the_dockerfile_passes_its_linter() -> None:
    checked("hadolint", DOCKERFILE)


def test_an_image_has_a_user_without_rights_and_every_target_that_is_built_is_there() -> None:
    text = DOCKERFILE.read_text()
    targets = set(re.findall(r"^FROM base AS (\S+)", text, re.MULTILINE))
    assert targets == {"server", "edge", "edge-torch"}
    assert text.index("USER 10001:10001") < text.index("FROM base")
    for service in SERVICES.values():
        if build := service.get("build"):
            assert build["target"] in targets
            assert service["image"] == f"ternbus/{build['target']}"


def test_a_new_volume_belongs_to_the_images_user_since_its_folder_is_in_the_image() -> None:
    made = set(DOCKERFILE.read_text().split("-m 0700 /data", 1)[1].split("\nENV", 1)[0].split()) - {"\\"}
    setup = {volume.split(":")[1] for volume in SERVICES["setup"]["volumes"] if not volume.startswith(".")}
    assert setup <= made
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert {name for name in named if not name.startswith(".")} == set(COMPOSE["volumes"])


def test_the_build_context_has_what_the_wheel_is_made_of() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    roots = set(re.findall(r'^"?ternbus[.\w]*"? = "(\w+)/', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert roots <= kept
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE"} <= kept


def test_prometheus_scrapes_where_the_aggregator_shows_its_metrics_and_reaches_it() -> None:
    _, _, _, option, address = SERVICES["aggregator"]["command"]
    folder, inside, _ = SERVICES["prometheus"]["volumes"][0].split(":")
    configuration = yaml.safe_load((DEPLOY / "compose" / folder / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    assert (option, inside) == ("--dashboard", "/etc/prometheus")
    assert job["static_configs"] == [{"targets": [address]}]
    assert SERVICES["prometheus"]["network_mode"] == "service:aggregator"


def metrics(port: int) -> str:
    """What the dashboard of this machine says to Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("name", ["setup.sh"])
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_passes(name: str) -> None:
    checked("shellcheck", DEPLOY / "compose" / name)


@pytest.mark.slow
def test_a_host_that_changes_after_the_first_start_is_ignored_and_said(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DATA": str(tmp_path), "EVALUATOR": "judge"}
    env |= {"FEDERATION": "home", "TASK": "digits-numpy", "DEVICES": ""}

    def said(host: str) -> str:
        command = [*SERVICES["setup"]["entrypoint"][:-1], str(SETUP)]
        done = subprocess.run(
            command, env={**env, "HOST": host}, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stderr

    assert said("first.example") == ""
    assert said("first.example") == ""
    assert "made for another host than 'second.example'" in said("second.example")


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.skipif(find() is None, reason="mosquitto is not installed")
def test_its_commands_make_a_federation_and_start_again(tmp_path: Path) -> None:
    port, shown = reserve("127.0.0.1", 0), reserve("127.0.0.1", 0)
    configuration = (DEPLOY / "mosquitto-tls" / "mosquitto.conf").read_text()
    places = {
        "/data/": f"{tmp_path}/",
        "/setup.sh": SETUP,
        "/mosquitto.conf": tmp_path / "mosquitto.conf",
        "/etc/mosquitto/": f"{tmp_path}/bus/",
        "/var/lib/mosquitto/": f"{tmp_path}/mosquitto/",
        # root's mosquitto would become a user that cannot read the folders of a test
        "listener 8883 0.0.0.0": f"user {getpass.getuser()}\nlistener {port} 127.0.0.1",
        "127.0.0.1:8080": f"127.0.0.1:{shown}",
    }
    for folder in SERVICES["setup"]["volumes"]:
        if not folder.startswith("."):
            (tmp_path / folder.rpartition("/")[2]).mkdir(mode=0o700)
    with Containers(places) as run:
        (tmp_path / "mosquitto.conf").write_text(run.local(configuration))
        setup = {name: valued(value) for name, value in SERVICES["setup"]["environment"].items()}
        setup |= {"DATA": str(tmp_path), "HOST": "localhost", "PORT": str(port)}
        for _ in range(2):
            run.done(SERVICES["setup"]["entrypoint"], setup)
        assert {path.name for path in (tmp_path / "invitations").iterdir()} == {
            "judge.toml", "pi-1.toml", "pi-2.toml", "pi-3.toml",
        }  # fmt: skip
        settings = tmp_path / "aggregator" / "aggregator.toml"
        settings.write_text(settings.read_text().replace("buffer_size = 4", "buffer_size = 1"))  # a device is enough
        for version in (0, 1):
            run.start("broker", SERVICES["broker"]["entrypoint"])
            run.start("aggregator", ["ternbus", *SERVICES["aggregator"]["command"]])
            run.start("evaluator", ["ternbus", *map(valued, SERVICES["evaluator"]["command"])])
            if version:
                join = f"ternbus edge join {tmp_path}/invitations/pi-1.toml {tmp_path}/pi-1 --task digits-numpy --run"
                run.start("pi-1", join.split())
            run.until_line("evaluator", rf"version {version}\b.*accuracy")
            _, health = SERVICES["aggregator"]["healthcheck"]["test"]
            run.done(["/bin/sh", "-c", health.replace("$$", "$")], {})
            found = re.search(r'^ternbus_head_version\{federation="home"\} (\d+)', metrics(shown), re.MULTILINE)
            assert found is not None
            assert int(found[1]) >= version  # the device goes on
            for name in ("evaluator", "aggregator", "broker"):
                assert run.end(name) == 0, name
