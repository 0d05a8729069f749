"""What deploy/ has for Prometheus and Grafana: valid to promtool, and about metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.small_world import make_directory, scratch
from ternbus.aggregator.dashboard.families import COUNTER, FAMILIES
from ternbus.aggregator.dashboard.metrics import exposition

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
FOLDER = DEPLOY / "prometheus"
RULES = yaml.safe_load((FOLDER / "ternbus.rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "ternbus.json").read_text())
NAMES = {f"{each.name}_total" if each.kind == COUNTER else each.name for each in FAMILIES}
# What a directory without private sums, differential privacy, versions, a broker and a process does not have.
NOT_ALWAYS = {
    "ternbus_start_timestamp_seconds", "ternbus_version_interval_seconds", "ternbus_staleness_mean_versions",
    "ternbus_evaluated_version", "ternbus_evaluation_score", "ternbus_helpers", "ternbus_privacy_epsilon_max",
    "ternbus_broker_refused_total", "ternbus_certificate_expiry_timestamp_seconds",
}  # fmt: skip
promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (of Debian's prometheus) is not installed")


def checked(*arguments: str, cwd: Path = FOLDER, given: bytes | None = None) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=cwd, input=given, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def expressions() -> list[str]:
    """Those of the dashboard, with a value for each of its variables."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [each.replace("$federation", ".*").replace("$__rate_interval", "2m") for each in found]


@promtool
def test_promtool_accepts_configuration_and_rules_and_every_alert_does_what_its_tests_say() -> None:
    checked("check", "config", "prometheus.yml")
    checked("check", "rules", "ternbus.rules.yml")
    checked("test", "rules", "ternbus.test.yml")


@promtool
def test_promtool_finds_nothing_to_say_of_the_metrics() -> None:
    """Neither of their form, nor of their names and help texts: it would print that, and end with 3."""
    checked("check", "metrics", given=exposition(make_directory(scratch() / "aggregator"))[0])


@promtool
def test_promtool_understands_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked("check", "rules", "panels.yml", cwd=tmp_path)


def test_every_alert_is_tried_where_it_must_fire_and_where_it_must_not() -> None:
    tried: dict[str, set[bool]] = {rule["alert"]: set() for rule in RULES}
    for test in yaml.safe_load((FOLDER / "ternbus.test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tried[case["alertname"]].add(bool(case["exp_alerts"]))
    assert {name for name, fired in tried.items() if fired != {True, False}} == set()


def test_alerts_and_panels_are_about_metrics_that_a_real_directory_has() -> None:
    body = exposition(make_directory(scratch() / "aggregator"))[0].decode()
    there = set(re.findall(r"^# TYPE (\S+) ", body, re.MULTILINE))
    assert there == NAMES - NOT_ALWAYS
    used = set(re.findall(r"\bternbus_\w+", "\n".join([*expressions(), *(rule["expr"] for rule in RULES)])))
    assert used <= NAMES
    assert NAMES - used == {"ternbus_build_info", "ternbus_start_timestamp_seconds", "ternbus_evaluated_version",
                            "ternbus_revoked_devices"}  # fmt: skip


def test_label_values_in_alerts_are_some_that_the_metrics_have() -> None:
    values = {f"{each.name}{'_total' * (each.kind == COUNTER)}": set(each.values) for each in FAMILIES}
    for expression in [*expressions(), *(rule["expr"] for rule in RULES)]:
        for name, label, wanted in re.findall(r'(ternbus_\w+)\{[^}]*?(\w+)=~?"([^"]*)"\}', expression):
            if label != "federation":
                assert set(wanted.split("|")) <= values[name], expression


def test_an_alert_says_what_to_do_and_how_bad_it_is() -> None:
    for rule in RULES:
        assert rule["alert"].startswith("Ternbus")
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_page_names_every_alert() -> None:
    page = (DEPLOY.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {rule["alert"] for rule in RULES} == set(re.findall(r"`(Ternbus\w+)`", page))


def test_panels_of_the_dashboard_do_not_overlap_and_name_the_chosen_source() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells
        cells |= mine
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
