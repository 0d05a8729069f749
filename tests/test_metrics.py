"""An aggregator's metrics: what they say of a real directory, and that no peer can make a new label."""

import ast
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from support.small_world import Bench, make_directory, scratch, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.dashboard import closed_sets, families
from ternbus.aggregator.dashboard.families import COUNTER, FAMILIES
from ternbus.aggregator.dashboard.metrics import CONTENT_TYPE, exposition
from ternbus.aggregator.shell import cli
from ternbus.broker.errors import ConfigError
from ternbus.broker.server import refusals
from ternbus.broker.server.directory import BrokerDirectory

Make = Callable[..., Bench]
Samples = dict[tuple[str, str], float]
RUN = CliRunner()
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"


def read(directory: Path) -> Samples:
    """The value of each sample, by its name and the value of its label beside `federation`, which is `lab` in all."""
    body, kind = exposition(directory)
    assert kind == CONTENT_TYPE
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("federation") == "lab"
            found[sample.name, "".join(labels.values())] = sample.value
            assert len(labels) <= 1
    return found


def test_a_federation_that_works_is_told_in_numbers(make: Make) -> None:
    bench = make(merge__buffer_size=2, merge__max_wait_s=1e6, staleness__max=1)
    pi, other, judge = bench.join("pi"), bench.join("other"), bench.join("judge", evaluator=True)
    for device, state in ((pi, "training"), (other, "idle"), (judge, "idle")):
        bench.receive(device.topic("status"), device.status(state))
    for version in range(2):
        for device in (pi, other):
            bench.send(device, ternary_block(bench.schema, version), version, metrics={"epsilon": 0.5})
    bench.receive(judge.topic("metrics"), judge.metrics(1, accuracy=0.75))
    bench.send(other, ternary_block(bench.schema, 5), 1)  # a second one on this version
    bench.send(pi, ternary_block(bench.schema, 6), 2)
    bench.send(other, b"nonsense", 2)
    bench.send(other, ternary_block(bench.schema, 7), 0, seq=other.seq)
    bench.receive("ternbus/1/lab/up/pi/update", b"noise")
    bench.handle(events.CountsRequested())
    found = read(bench.directory)
    assert found["ternbus_head_version", ""] == 2
    assert found["ternbus_head_timestamp_seconds", ""] == pytest.approx(bench.now, abs=60)
    assert found["ternbus_buffer_updates", ""] == 1
    assert [found["ternbus_devices", state] for state in ("training", "idle", "offline")] == [1, 1, 0]
    assert [found["ternbus_evaluators", state] for state in ("online", "offline")] == [1, 0]
    answered = {outcome: found["ternbus_updates_answered_total", outcome] for outcome in families.ANSWERS}
    assert answered == {"accepted": 5, "stale": 0, "invalid": 1, "duplicate": 1, "busy": 0}
    assert found["ternbus_updates_merged_total", ""] == 4
    assert found["ternbus_messages_refused_total", "not-a-frame"] == 1
    assert found["ternbus_messages_refused_total", "other"] == 0
    assert found["ternbus_received_bytes_total", ""] > 1000
    assert (found["ternbus_evaluated_version", ""], found["ternbus_evaluation_score", ""]) == (1, 0.75)
    assert (found["ternbus_staleness_mean_versions", ""], found["ternbus_staleness_bound_versions", ""]) == (0, 1)
    assert found["ternbus_federation_state", "open"] == 1
    assert found["ternbus_federation_state", "closed"] == 0
    assert 0 < found["ternbus_disk_free_ratio", ""] <= 1


def test_a_directory_that_nobody_serves_is_down_and_has_metrics(make: Make) -> None:
    found = read(make().directory)
    assert [found["ternbus_health", state] for state in ("fine", "degraded", "down")] == [0, 0, 1]
    assert found["ternbus_findings", "not-running"] == 1
    assert (found["ternbus_running", ""], found["ternbus_broker_connected", ""]) == (0, 0)
    missing = {"ternbus_start_timestamp_seconds", "ternbus_helpers", "ternbus_certificate_expiry_timestamp_seconds"}
    assert not missing & {name for name, _ in found}


def test_a_loss_at_the_broker_is_no_refusal(make: Make) -> None:
    bench = make()
    before = read(bench.directory)
    assert [before["ternbus_publications_lost_total", reason] for reason in closed_sets.LOST] == [0, 0, 0]
    bench.handle(events.Refused(topic="ternbus/1/lab/all/head", reason="Not authorized"))
    bench.handle(events.MessagesDropped(reason="qos-0", count=3, detail="a publication at QoS 0"))
    bench.handle(events.CountsRequested())
    found = read(bench.directory)
    assert found["ternbus_publications_lost_total", "broker-refused"] == 1
    assert found["ternbus_messages_refused_total", "qos-0"] == 3
    assert ("ternbus_messages_refused_total", "broker-refused") not in found


def test_a_reason_that_is_in_no_closed_set_counts_as_other_and_makes_no_label(make: Make) -> None:
    bench = make()
    before = set(read(bench.directory))
    for reason in ("pi-1-is-here", "of-a-later-version"):
        bench.handle(events.MessagesDropped(reason=reason, count=2, detail=""))
    bench.join("pi-with-a-name-of-its-own")
    bench.handle(events.CountsRequested())
    found = read(bench.directory)
    assert found["ternbus_messages_refused_total", "other"] == 4
    assert set(found) == before


def test_certificates_and_what_the_broker_refused_are_there_where_the_broker_is(tmp_path: Path) -> None:
    bus = BrokerDirectory.create(tmp_path / "bus", names=["127.0.0.1"], port=0)
    directory = make_directory(scratch() / "aggregator", transport__authority=str(bus.folder))
    found = read(directory)
    assert found["ternbus_certificate_expiry_timestamp_seconds", "broker"] > 1.7e9
    assert {label for name, label in found if name.startswith("ternbus_certificate")} == set(families.CERTIFICATES)
    assert not [name for name, _ in found if name == "ternbus_broker_refused_total"]
    rows = '[{"client": "pi", "reason": "write-denied", "count": 4}, {"client": "?", "reason": "new", "count": 2},'
    rows += '{"client": "b", "reason": "write-denied", "count": 1}]'
    (bus.folder / refusals.FILE).write_text(f'{{"since": "today", "refused": {rows}}}')
    found = read(directory)
    assert found["ternbus_broker_refused_total", "write-denied"] == 5
    assert found["ternbus_broker_refused_total", "no-certificate"] == 0
    assert found["ternbus_broker_refused_total", "other"] == 2
    (bus.folder / refusals.FILE).write_text('{"refused": [7]}')
    assert not [name for name, _ in read(directory) if name == "ternbus_broker_refused_total"]


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"ternbus_[a-z_]*[a-z]", family.name)
        assert not family.name.endswith("_total"), "the library adds it to counters"
        assert family.help.endswith(".")
        assert bool(family.label) == bool(family.values) or family.name == "ternbus_build_info"
    body = exposition(make_directory(scratch() / "aggregator"))[0].decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", body, re.MULTILINE))
    assert {name for name, kind in kinds.items() if kind == "counter"} == {
        name for name in kinds if name.endswith("_total")
    }
    assert set(kinds) == set(re.findall(r"^# HELP (\S+) ", body, re.MULTILINE))


def calls(*folders: str) -> Iterator[tuple[str, ast.Call]]:
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    function = node.func
                    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                    yield name, node


def test_every_reason_of_a_refusal_is_in_the_closed_set() -> None:
    found: set[str] = set()
    for name, node in calls("broker/ternbus/broker/protocol", "broker/ternbus/broker/sums", "aggregator/ternbus"):
        place = 1 if name == "Verdict" else 0
        if name in {"ProtocolError", "refuse", "Verdict"} and len(node.args) > place:
            reason = node.args[place]
            invalid = name != "Verdict" or (isinstance(node.args[0], ast.Constant) and node.args[0].value == "invalid")
            if isinstance(reason, ast.Constant) and invalid:
                found.add(str(reason.value).partition(":")[0])
    assert len(found) > 50
    # `refused` is counted as `refused-enroll`; an `unknown-task` and its like end no frame
    assert found - {"refused"} <= {*closed_sets.REFUSED, *closed_sets.LOST}


def test_every_kind_of_a_finding_is_in_the_closed_set() -> None:
    found = {
        str(word.value.value)
        for name, node in calls("aggregator/ternbus/aggregator/core")
        if name == "Finding"
        for word in node.keywords
        if word.arg == "kind" and isinstance(word.value, ast.Constant)
    }
    notes = {"stopped", "no-device"}
    assert found - notes <= set(closed_sets.FINDINGS)
    assert set(closed_sets.FINDINGS) - found == {"refused", "stale"} - found


def test_the_page_has_the_table_of_all_metrics() -> None:
    lines = ["| metric | kind | label | what |", "|---|---|---|---|"]
    for family in FAMILIES:
        name = f"{family.name}_total" if family.kind == COUNTER else family.name
        values = ", ".join(family.values) if len(family.values) <= 5 else f"{len(family.values)} of a closed set"
        label = f"`{family.label}`: {values}" if family.values else f"`{family.label}`" if family.label else ""
        lines.append(f"| `{name}` | {family.kind} | {label} | {family.help} |")
    table = PAGE.read_text(encoding="utf-8").split("families.py -->\n\n")[1].split("\n\n<!-- end of the table")[0]
    assert table == "\n".join(lines)


def test_the_command_prints_them_or_writes_a_file_that_others_can_read(make: Make, tmp_path: Path) -> None:
    bench = make()
    printed = RUN.invoke(cli.app, ["metrics", str(bench.directory)])
    assert printed.exit_code == 0
    assert 'ternbus_head_version{federation="lab"} 0.0\n' in printed.stdout
    file = tmp_path / "ternbus.prom"
    for _ in range(2):
        done = RUN.invoke(cli.app, ["metrics", str(bench.directory), "--textfile", str(file)])
        assert (done.exit_code, done.stdout) == (0, "")
    assert 'ternbus_head_version{federation="lab"} 0.0\n' in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444
    assert list(tmp_path.iterdir()) == [file]
    kept = file.read_text()
    failed = RUN.invoke(cli.app, ["metrics", str(tmp_path / "none"), "--textfile", str(file)])
    assert isinstance(failed.exception, ConfigError)
    assert file.read_text() == kept


def test_without_the_library_the_command_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    monkeypatch.delitem(sys.modules, "ternbus.aggregator.dashboard.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    failed = RUN.invoke(cli.app, ["metrics", str(bench.directory)])
    assert isinstance(failed.exception, ConfigError)
    assert "pip install 'ternbus[dashboard]'" in str(failed.exception)
