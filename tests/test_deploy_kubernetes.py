"""The manifests of deploy/kubernetes: valid, in agreement with each other, and tried without a cluster.

Its three nats-servers and its aggregator run here as processes: all but Kubernetes itself is real.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from support.deployed import Containers
from ternbus.broker.server.limits import CONNECTIONS_MAX
from ternbus.broker.server.nats import configuration, find
from ternbus.broker.server.running import reserve

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
NATS = (FOLDER / "nats.conf").read_text()
MANIFESTS = [
    document for name in KUSTOMIZATION["resources"] for document in yaml.safe_load_all((FOLDER / name).read_text())
]
VERSIONS = ("1.28", "1.32", "1.37")
SECRETS = sorted(
    {file.rpartition("=")[2] for generator in KUSTOMIZATION["secretGenerator"] for file in generator["files"]}
)


def identity(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def stateful(name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in MANIFESTS if identity(each) == f"StatefulSet-{name}")
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=identity)
def test_a_manifest_follows_the_schema_of_its_kind(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_builds_them_with_the_secrets_that_the_page_makes(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    for name in SECRETS:
        (tmp_path / "kubernetes" / name).write_text("secret")
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "kubernetes")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    built = [*yaml.safe_load_all(done.stdout)]
    for manifest in built:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "ternbus"
    assert len([each for each in built if each["kind"] == "Secret"]) == len(KUSTOMIZATION["secretGenerator"])


@pytest.mark.parametrize("name", ["nats", "aggregator"])
def test_a_pod_keeps_to_the_restricted_standard_and_a_volume_that_it_mounts_exists(name: str) -> None:
    pod = stateful(name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in stateful(name)["spec"]["volumeClaimTemplates"]}
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_brokers_limits_are_those_of_broker_up() -> None:
    own = configuration(host="0.0.0.0", port=8883, data=Path("/data"))
    limits = re.compile(
        r"^\s*(max_connections|max_payload|max_pending|ack_wait|max_ack_pending|reject_qos2_publish): (.*)$",
        re.MULTILINE,
    )
    assert limits.findall(NATS) == limits.findall(own)
    assert ("max_connections", str(CONNECTIONS_MAX)) in limits.findall(NATS)


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.skipif(find() is None, reason="nats-server is not installed")
def test_three_brokers_are_one_and_go_on_with_two(tmp_path: Path) -> None:
    ports = [reserve("127.0.0.1", 0) for _ in range(9)]
    mqtt, routes, monitors = ports[:3], ports[3:6], ports[6:]
    pod = stateful("aggregator")["spec"]["template"]["spec"]
    places = {
        "/data/": f"{tmp_path}/",
        "/tls": tmp_path / "aggregator-home",
        "/model/": f"{tmp_path}/",
        "mqtts://bus.example.org:8883": f"mqtts://localhost:{mqtt[0]}",
    }
    with Containers(places) as run:

        def ternbus(command: str) -> None:
            run.done(["ternbus", *command.split()], {})

        ternbus(f"broker init {tmp_path}/bus --engine nats --name localhost")
        ternbus(f"broker certificate {tmp_path}/bus aggregator-home pi-1 --federation home --out {tmp_path}")
        for file in (tmp_path / "aggregator-home").iterdir():
            file.chmod(0o440)  # as in the volume of a Secret
        ternbus(f"edge init-model digits-numpy {tmp_path}/model.safetensors")
        for number in range(3):
            file = tmp_path / f"nats-{number}.conf"
            file.write_text(broker_on_this_machine(number, tmp_path, mqtt, routes, monitors))
            run.start(f"nats-{number}", [str(find()), "--config", str(file)], {"POD_NAME": f"nats-{number}"})
        (setup,), (aggregator,) = pod["initContainers"], pod["containers"]
        for _ in range(2):
            run.done(setup["command"], {each["name"]: each["value"] for each in setup["env"]})
        settings = tmp_path / "aggregator" / "aggregator.toml"
        settings.write_text(settings.read_text().replace("buffer_size = 4", "buffer_size = 1"))  # a device is enough
        run.start("aggregator", aggregator["command"])
        ternbus(f"aggregator invite {tmp_path}/aggregator pi-1 --certificates {tmp_path} --out {tmp_path}")
        invitation = tmp_path / "pi-1.toml"
        invitation.write_text(invitation.read_text().replace(f":{mqtt[0]}", f":{mqtt[1]}"))  # another of the three
        run.start("pi-1", f"ternbus edge join {invitation} {tmp_path}/device --task digits-numpy --run".split())
        run.until_line("pi-1", "accepted")
        run.kill("nats-2")
        for _ in range(3):
            run.until_line("pi-1", "accepted")
        run.done(aggregator["readinessProbe"]["exec"]["command"], {})
        assert run.end("pi-1") == run.end("aggregator") == 0


def broker_on_this_machine(number: int, folder: Path, mqtt: list[int], routes: list[int], monitors: list[int]) -> str:
    """The configuration of one of the three, with addresses and folders of this machine."""
    changes = {f"nats-{other}.nats:6222": f"127.0.0.1:{port}" for other, port in enumerate(routes)} | {
        '"127.0.0.1:4222"': '"127.0.0.1:-1"',
        '"0.0.0.0:8222"': f'"127.0.0.1:{monitors[number]}"',
        '"0.0.0.0:6222"': f'"127.0.0.1:{routes[number]}"',
        'host: "0.0.0.0"': 'host: "127.0.0.1"',
        "port: 8883": f"port: {mqtt[number]}",
        "store_dir: /data": f"store_dir: {folder}/nats-{number}",
        '"/tls/': f'"{folder}/bus/tls/',
    }
    text = NATS
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    return text
