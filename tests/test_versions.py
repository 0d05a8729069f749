"""Versions of the model: listed with what they are worth, named and so kept for good, exported by name or worth."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from support.small_world import Bench, float32_block, reconfigure
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.merge.mean import norm
from ternbus.aggregator.shell import backup, checking, cli
from ternbus.aggregator.store import tags
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_metadata, load_safetensors
from ternbus.broker.protocol.schema import to_vector, vector_digest
from ternbus.broker.protocol.tensor_kinds import version_metadata

Make = Callable[..., Bench]
RUN = CliRunner()


def run(*arguments: object) -> str:
    done = RUN.invoke(cli.app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    error = RUN.invoke(cli.app, [*map(str, arguments)]).exception
    assert isinstance(error, ConfigError), error
    return str(error)


def advanced(bench: Bench, count: int, name: str = "pi") -> list[bytes]:
    """The digests of as many new versions."""
    device = bench.join(name)
    digests = []
    for _ in range(count):
        bench.send(device, float32_block(bench.schema, bench.version), bench.version)
        digests.append(bench.head.digest)
    bench.beside.work()
    bench.ledger.write([])  # the vectors of the last snapshot are on disk
    return digests


@pytest.fixture
def bench(make: Make) -> Bench:
    return make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4)


def test_versions_are_listed_with_norm_metric_and_whether_they_are_kept(bench: Bench) -> None:
    digests = advanced(bench, 9)
    judge = bench.join("judge", evaluator=True)
    for version, accuracy in ((7, 0.9), (8, 0.7), (9, 0.8), (2, 0.99)):
        bench.receive(judge.topic("metrics"), judge.metrics(version, accuracy=accuracy))
    found = json.loads(run("versions", bench.directory, "--json"))
    rows = {row["version"]: row for row in found["versions"]}
    assert (sorted(rows), found["newest"], found["metric"]) == ([*range(10)], 9, "accuracy")
    assert found["best"] == 7  # 2 is no longer kept
    assert [version for version, row in rows.items() if row["kept"]] == [*range(4, 10)]  # from a snapshot on
    assert rows[9]["digest"] == digests[-1].hex()
    assert rows[9]["norm"] == pytest.approx(norm(float32_block(bench.schema, 8)))
    assert rows[2]["norm"] is None
    text = run("versions", bench.directory, "--count", "3")
    assert text.splitlines()[0].split() == [
        "version",
        "updates",
        "staleness",
        "norm",
        "accuracy",
        "kept",
        "tags",
        "time",
    ]
    assert len(text.splitlines()) == 4
    assert "best" in run("versions", bench.directory)


def test_a_version_is_shown_with_the_updates_in_it(bench: Bench) -> None:
    advanced(bench, 2)
    found = json.loads(run("versions", bench.directory, "2", "--json"))
    assert [(each["device"], each["weight"]) for each in found["contributions"]] == [("pi", 1.0)]
    text = run("versions", bench.directory, "2")
    assert text.startswith("version 2, made 1970-01-01 ")
    assert "pi" in text.splitlines()[-1]
    assert "there is no version 3; the newest is 2" in refused("versions", bench.directory, "3")


def test_a_tagged_version_is_kept_for_good_and_exported_as_devices_held_it(bench: Bench, tmp_path: Path) -> None:
    digests = advanced(bench, 3)
    run("tag", bench.directory, "3", "good")
    advanced(bench, 9, "other")
    assert "is not kept; kept are" in refused("export", bench.directory, tmp_path / "x", "--version", "2")
    run("export", bench.directory, tmp_path / "good.safetensors", "--tag", "good")
    tensors = load_safetensors(tmp_path / "good.safetensors")
    assert vector_digest(to_vector(bench.schema, tensors)) == digests[2]
    assert version_metadata(3, digests[2]).items() <= load_metadata(tmp_path / "good.safetensors").items()
    run("export", bench.directory, tmp_path / "three.safetensors", "--version", "3")
    assert (tmp_path / "three.safetensors").read_bytes() == (tmp_path / "good.safetensors").read_bytes()
    rows = {
        row["version"]: row
        for row in json.loads(run("versions", bench.directory, "--count", "1", "--json"))["versions"]
    }
    assert sorted(rows) == [3, 12]
    assert (rows[3]["tags"], rows[3]["kept"]) == (["good"], True)
    assert ", and 3 (good)" in refused("export", bench.directory, tmp_path / "x", "--version", "2")


def test_a_name_is_given_once_and_can_be_taken_away(bench: Bench) -> None:
    advanced(bench, 2)
    run("tag", bench.directory, "1", "good")
    run("tag", bench.directory, "1", "good")
    assert "good is version 1 already" in refused("tag", bench.directory, "2", "good")
    assert "invalid tag" in refused("tag", bench.directory, "2", "../good")
    assert "is not kept" in refused("tag", bench.directory, "7", "other")
    assert "--remove NAME" in refused("tag", bench.directory, "2")
    run("tag", bench.directory, "--remove", "good")
    assert not tags.path(bench.directory, "good").exists()
    assert "there is no tag 'good'" in refused("tag", bench.directory, "--remove", "good")


def test_the_best_version_is_exported(bench: Bench, tmp_path: Path) -> None:
    digests = advanced(bench, 3)
    assert "no kept version has been evaluated" in refused("export", bench.directory, tmp_path / "x", "--best")
    judge = bench.join("judge", evaluator=True)
    for version, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        bench.receive(judge.topic("metrics"), judge.metrics(version, loss=loss))
    out = tmp_path / "best.safetensors"
    assert digests[1].hex() in run("export", bench.directory, out, "--best")
    assert "only one of" in refused("export", bench.directory, out, "--best", "--version", "1")
    assert "there is no tag" in refused("export", bench.directory, out, "--tag", "none")


def test_a_new_federation_keeps_its_best_version_though_nobody_asked_for_it(make: Make, tmp_path: Path) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4)
    judge = bench.join("judge", evaluator=True)
    digests = advanced(bench, 1)
    bench.receive(judge.topic("metrics"), judge.metrics(1, accuracy=0.9))
    advanced(bench, 19, "other")
    bench.receive(judge.topic("metrics"), judge.metrics(20, accuracy=0.5))
    found = RUN.invoke(cli.app, ["export", str(bench.directory), str(tmp_path / "best.safetensors"), "--best"])
    assert f"version 1, digest {digests[0].hex()}" in found.stdout
    assert "was better" not in found.stderr
    assert [path.name for path in (bench.directory / tags.FOLDER).iterdir()] == ["best-1.safetensors"]


def test_a_better_version_that_is_no_longer_kept_is_told_of(make: Make, tmp_path: Path) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4, versions__keep_best=0)
    judge, out = bench.join("judge", evaluator=True), tmp_path / "best.safetensors"
    advanced(bench, 1)
    bench.receive(judge.topic("metrics"), judge.metrics(1, accuracy=0.9))
    assert "was better" not in RUN.invoke(cli.app, ["export", str(bench.directory), str(out), "--best"]).stderr
    advanced(bench, 19, "other")
    bench.receive(judge.topic("metrics"), judge.metrics(20, accuracy=0.5))
    found = RUN.invoke(cli.app, ["export", str(bench.directory), str(out), "--best"])
    assert "version 20, digest" in found.stdout
    assert "version 1 was better, with accuracy 0.9, and is not kept: set versions.keep_best = 1" in found.stderr


def test_a_tagged_model_that_was_changed_is_not_exported(bench: Bench, tmp_path: Path) -> None:
    advanced(bench, 1)
    run("tag", bench.directory, "1", "good")
    advanced(bench, 9, "other")
    file = tags.path(bench.directory, "good")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error = RUN.invoke(cli.app, ["export", str(bench.directory), str(tmp_path / "x"), "--tag", "good"]).exception
    assert "good.safetensors is not as it was written" in str(error)


def test_a_backup_has_the_tagged_models(bench: Bench, tmp_path: Path) -> None:
    digests = advanced(bench, 1)
    run("tag", bench.directory, "1", "good")
    advanced(bench, 9, "other")
    made = backup.backup(bench.directory, tmp_path / "backups", None, "test")
    tensors = load_safetensors(tags.path(made.path, "good"))
    assert vector_digest(to_vector(bench.schema, tensors)) == digests[0]
    assert np.isfinite(to_vector(bench.schema, tensors)).all()
    assert checking.differences(made.path) == []


def kept(bench: Bench) -> list[int]:
    found = json.loads(run("versions", bench.directory, "--json"))
    return [row["version"] for row in found["versions"] if row["kept"]]


def test_more_versions_are_kept_than_the_broker_has_deltas_if_the_settings_say_so(make: Make, tmp_path: Path) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4, versions__keep=9)
    digests = advanced(bench, 20)
    assert kept(bench) == [*range(12, 21)]
    out = tmp_path / "model.safetensors"
    run("export", bench.directory, out, "--version", "13")
    assert vector_digest(to_vector(bench.schema, load_safetensors(out))) == digests[12]
    reconfigure(bench, versions={"keep": 3})
    bench.restart()
    bench.start()
    for _ in range(4):
        bench.send(bench.join(f"pi-{bench.version}"), float32_block(bench.schema, bench.version), bench.version)
    bench.beside.work()
    bench.ledger.write([])
    assert kept(bench) == [22, 23, 24]


def test_the_versions_with_the_best_metric_are_kept_by_themselves(make: Make, tmp_path: Path) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4, versions__keep_best=2)
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    digests = []
    accuracies = {2: 0.9, 3: 0.95, 5: 0.5, 9: 0.92, 12: 0.97}
    for version in range(1, 21):
        bench.send(pi, float32_block(bench.schema, version), version - 1)
        digests.append(bench.head.digest)
        if version in accuracies:
            bench.receive(judge.topic("metrics"), judge.metrics(version, accuracy=accuracies[version]))
        if version == 8:
            bench.beside.work()
            bench.ledger.write([])
            assert set(tags.read(bench.ledger)) == {"best-2", "best-3"}
    bench.beside.work()
    bench.ledger.write([])
    assert kept(bench) == [3, 12, *range(16, 21)]
    out = tmp_path / "best.safetensors"
    assert digests[11].hex() in run("export", bench.directory, out, "--best")
    run("export", bench.directory, out, "--tag", "best-3")
    assert vector_digest(to_vector(bench.schema, load_safetensors(out))) == digests[2]
    assert "versions.keep_best; choose another" in refused("tag", bench.directory, "20", "best-20")
    assert "lower versions.keep_best" in refused("tag", bench.directory, "--remove", "best-3")
    made = backup.backup(bench.directory, tmp_path / "backups", None, "test")
    assert checking.differences(made.path) == []
    reconfigure(bench, versions={"keep_best": 0})
    bench.restart()
    bench.start()
    for _ in range(4):
        bench.send(pi, float32_block(bench.schema, bench.version), bench.version)
    bench.beside.work()
    bench.ledger.write([])
    assert tags.read(bench.ledger) == {}
    assert not list((bench.directory / tags.FOLDER).glob("best-2.*"))


def test_archived_metrics_do_not_let_a_best_version_go(make: Make) -> None:
    bench = make(merge__buffer_size=1, downlink__codec="float32", downlink__slots=4, versions__keep_best=1)
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)

    def advance(count: int) -> None:
        for _ in range(count):
            bench.send(pi, float32_block(bench.schema, bench.version), bench.version)
            accuracy = 0.9 if bench.version == 1 else 0.5
            bench.receive(judge.topic("metrics"), judge.metrics(bench.version, accuracy=accuracy))
        bench.beside.work()
        bench.ledger.write([])

    advance(20)
    bench.close()
    run("prune", bench.directory, "--keep-versions", "1")
    bench.recover()
    bench.start()
    advance(6)
    assert set(tags.read(bench.ledger)) == {"best-1"}


def test_a_home_without_the_keys_keeps_as_many_versions_as_before() -> None:
    about = configuration.parse('federation = "lab"\nbroker = "mqtt://x"').versions
    assert (about.keep, about.keep_best) == (0, 0)
