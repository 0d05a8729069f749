"""aggregator.toml: each key within its bounds, unknown ones refused by name, and what is written is read again."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.aggregator.settings import (
    SECTIONS,
    Settings,
    dumps,
    from_table,
    parse,
    with_overrides,
)
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.toml import toml_value

BASE: dict[str, Any] = {"federation": "lab", "broker": "mqtt://127.0.0.1:1883"}

DEFAULTS = {
    "merge": {"buffer_size": 4, "max_wait_s": 30.0, "max_update_norm": 0.0, "on_large": "clip", "rule": "mean"},
    "staleness": {"max": 8, "discount": "polynomial", "exponent": 0.5},
    "optimizer": {"name": "fedavg", "learning_rate": 1.0, "momentum": 0.9},
    "downlink": {"codec": "ternary", "min_interval_s": 0.0, "slots": 32},
}

# section.key: (good values, bad values)
BOUNDS: dict[str, tuple[list[object], list[object]]] = {
    "merge.buffer_size": ([1, 1_000_000], [0, -1, 1_000_001, 1.0, True, "4", None]),
    "merge.max_wait_s": ([0.01, 1, 1e7], [0, 0.001, -1.0, 1e8, float("nan"), float("inf"), "30", True]),
    "merge.min_devices": ([0, 2, 1_000_000], [-1, 1_000_001, 2.0, True]),
    "merge.max_update_norm": ([0, 0.0, 1e9], [-0.1, float("nan"), float("inf"), True]),
    "merge.on_large": (["clip"], ["drop", True, None]),
    "merge.influence_bound": (["none", "adaptive"], ["auto", True, 3.0, None]),
    "merge.max_share": ([1e-6, 0.2, 1], [0, 1.1, float("nan")]),
    "merge.rule": (["mean", "median", "trimmed-mean", "norm-clip"], ["krum", "multi-krum", "average", 1, None]),
    "merge.trim": ([0, 0.2, 0.49], [-0.1, 0.5, float("nan")]),
    "merge.byzantine": ([0, 1, 100_000], [-1, 0.5, 100_001]),
    "merge.krum_keep": ([0, 1, 1_000_000], [-1, 0.5]),
    "merge.clip_norm": ([0, 1e9], [-0.1, float("inf")]),
    "staleness.max": ([0, 8, 2**40], [-1, 8.0, True, 2**63, 10**400]),
    "staleness.discount": (["polynomial", "constant", "hinge", "exponential"], ["linear", 1, ["constant"], None]),
    "staleness.exponent": ([0, 0.5, 100], [-0.5, 101, float("nan")]),
    "staleness.decay": ([0, 0.5, 100], [-0.5, 101, float("nan")]),
    "staleness.hinge_slope": ([0, 10, 1e6], [-0.5, 1e7, float("inf")]),
    "staleness.hinge_from": ([0, 4, 1_000_000], [-1, 1_000_001, 0.5]),
    "optimizer.name": (["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"], ["adam", 0]),
    "optimizer.learning_rate": ([0, 1, 1e6], [-1, 1e7, float("inf"), "1.0"]),
    "optimizer.momentum": ([0, 0.9, 0.9999], [1, -0.1]),
    "optimizer.beta1": ([0, 0.9, 0.9999], [1, -0.1, "0"]),
    "optimizer.beta2": ([0, 0.99, 0.999999], [1, -0.1, float("nan")]),
    "optimizer.tau": ([1e-9, 1e-3, 1000], [0, 1001, -1e-3]),
    "downlink.codec": (["ternary", "float32"], ["float16", 32]),
    "downlink.min_interval_s": ([0, 2.5, 1e6], [-0.1, 1e7, "1"]),
    "downlink.slots": ([1, 65_535], [0, 65_536, 32.0]),
    "versions.keep": ([0, 1, 10_000], [-1, 32.0, True]),
    "versions.keep_best": ([0, 3, 1000], [-1, 1001, 1.0]),
    "canary.group": ([("judge", "pi-1"), ()], ["judge", [1], None, ["No Name"]]),
    "canary.metric": (["", "accuracy"], [3]),
    "canary.tolerance": ([0, 0.5, 1e9], [-0.1, float("nan")]),
    "canary.patience_s": ([0.01, 300], [0, 1e8]),
    "canary.min_reports": ([0], [-1, 1, 1.5]),
    "limits.direct_parts": ([4, 100], [3, 8.0, 2**63]),
    "limits.frames_per_s": ([500, 10_000], [499, True]),
    "limits.broker_queue_messages": ([100], [99]),
    "limits.frame_bytes": ([4096, 268_000_000], [4095, 268_000_001]),
    "limits.assembly_bytes": ([2**20], [2**20 - 1, 0]),
    "limits.work_bytes_per_s": ([2**20, 2**27], [2**20 - 1, 1e9]),
    "limits.receipts_per_s": ([10, 100], [9, 1.5]),
    "limits.refusals_per_s": ([1], [0]),
    "limits.enrolments_per_minute": ([1, 60], [0]),
    "limits.journal_bytes": ([0, 2**40], [-1, 1.0]),
    "limits.metrics_bytes": ([1024], [1023]),
    "limits.log_lines_per_minute": ([1], [0]),
    "invitations.expire_after_s": ([1, 604_800.0, 1e9], [0, 2e9, "7d"]),
    "transport.authority": (["", "/srv/broker"], [3, True]),
    "transport.username": (["", "someone"], [3]),
    "transport.password_file": (["", "password"], [3]),
    "transport.no_tls": ([True, False], ["yes", 1]),
    "plan.local_epochs": ([0, 0.5, 3], [-1, "1", True, float("nan")]),
    "plan.local_steps": ([1, 50], [0, 1.5]),
    "plan.batch_size": ([1, 32], [0, 32.0]),
    "plan.learning_rate": ([0, 0.1], [-0.1, float("inf")]),
    "plan.momentum": ([0, 1], [1.1, -0.1]),
    "plan.weight_decay": ([0, 0.01], [-1]),
    "plan.proximal_mu": ([0, 0.01], [-1]),
    "plan.clip_sigma": ([0, 2.5], [-1]),
    "plan.codec": (["ternary", "float32"], ["sign", 3]),
    "home_assistant.discovery_prefix": (["", "homeassistant", "ha/discovery"], ["a b", "ternbus", 1, True, None]),
    "home_assistant.every_s": ([1, 15.0, 3600], [0, 3601, "15", True]),
    "home_assistant.refresh_s": ([60, 600.0, 86_400], [59, 86_401, None]),
    "home_assistant.devices_max": ([1, 200, 1000], [0, 1001, 2.0, True]),
    "plan.seal": ([True, False], [0, 1, "yes"]),
    "plan.error_feedback": ([True, False], [1]),
    "plan.seed": ([0, -(2**63), 2**63 - 1], [2**63, 2**64, 1.0]),
    "plan.anything": ([1, -3, 0.5, "text", True, [1, 2.5, "a"], []], [{}, [[1]], 2**63, 1e400, [float("nan")], None]),
}


def table(key: str, value: object) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {**BASE, section: {name: value}}


def test_every_key_is_tried() -> None:
    keys = {f"{name}.{entry.name}" for name, kind in SECTIONS.items() for entry in fields(kind)}
    assert set(BOUNDS) == keys | {f"plan.{key}" for key in plan_keys.SHARED} | {"plan.anything"}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (good, _) in BOUNDS.items() for value in good])
def test_values_within_their_bounds(key: str, value: object) -> None:
    section, _, name = key.partition(".")
    part = getattr(from_table(table(key, value)), section)
    assert (part[name] if section == "plan" else getattr(part, name)) == value


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, bad) in BOUNDS.items() for value in bad])
def test_values_out_of_their_bounds_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        from_table(table(key, value))
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_older_files_that_have_no_effect_any_more_are_ignored() -> None:
    assert from_table(table("limits.messages_in_assembly", "whatever it says")) == from_table(BASE)
    with pytest.raises(ConfigError, match=r"merge\.messages_in_assembly is unknown"):
        from_table(table("merge.messages_in_assembly", 4))


def test_the_first_alternatives_are_the_defaults() -> None:
    made = from_table(BASE)
    assert made == Settings(**BASE)
    for section, keys in DEFAULTS.items():
        assert {key: getattr(getattr(made, section), key) for key in keys} == keys
    assert made.limits.direct_parts == 8
    assert made.limits.frames_per_s == 500
    assert made.limits.broker_queue_messages == 4000


@pytest.mark.parametrize(
    ("merge", "named"),
    [
        ({"rule": "krum"}, "needs a buffer_size of at least 5 .2 byzantine . 3., not 4"),
        ({"rule": "krum", "byzantine": 2, "buffer_size": 6}, "at least 7"),
        ({"rule": "multi-krum", "buffer_size": 4, "byzantine": 1}, "at least 5"),
        ({"rule": "multi-krum", "buffer_size": 5, "krum_keep": 5}, "krum_keep = 5 must be at most 4"),
        ({"rule": "trimmed-mean", "trim": 0.3}, "trims everything of a buffer_size of 4"),
        ({"rule": "trimmed-mean", "buffer_size": 2}, "trims everything of a buffer_size of 2"),
        ({"rule": "median", "max_share": 0.5}, "max_share applies to rule"),
        ({"on_large": "refuse"}, "max_update_norm is 0"),
    ],
)
def test_what_a_rule_cannot_do_is_refused(merge: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        from_table({**BASE, "merge": merge})
    assert "merge." in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "merge",
    [
        {"rule": "krum", "buffer_size": 5},
        {"rule": "krum", "byzantine": 0},
        {"rule": "multi-krum", "buffer_size": 5, "krum_keep": 4},
        {"rule": "trimmed-mean", "buffer_size": 3},
        {"rule": "trimmed-mean", "buffer_size": 1, "trim": 0},
        {"max_share": 0.5},
        {"on_large": "refuse", "max_update_norm": 2},
    ],
)
def test_what_a_rule_can_do_is_taken(merge: dict[str, Any]) -> None:
    found = from_table({**BASE, "merge": merge}).merge
    assert {key: getattr(found, key) for key in merge} == merge


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"merg": {}}, "'merg'"),
        ({"merge": {"buffersize": 1}}, "merge.buffersize"),
        ({"limits": {"x": 1}}, "limits.x"),
        ({"merge": 3}, "merge must be a table"),
        ({"plan": 3}, "plan must be a table"),
        ({"federation": 3}, "'federation' must be a string"),
        ({"broker": None}, "'broker' must be a string"),
        ({"federation": "No Name"}, "invalid federation name"),
        ({"broker": "127.0.0.1:1883"}, "mqtt://HOST:PORT"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_table({**BASE, **wrong})


def test_a_plan_too_large_for_a_head_is_refused() -> None:
    assert len(from_table(table("plan.notes", ["x" * 100] * 70)).plan["notes"]) == 70
    with pytest.raises(ConfigError, match="plan takes"):
        from_table(table("plan.notes", "x" * 9000))


value_of = {
    key: st.sampled_from([value for value in good if not isinstance(value, list)]) for key, (good, _) in BOUNDS.items()
}


@given(
    keys=st.lists(st.sampled_from(sorted(BOUNDS)), unique=True),
    data=st.data(),
    extra=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda key: key not in plan_keys.SHARED
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.integers(-(2**63), 2**63 - 1)
        | st.lists(st.integers(0, 9), max_size=3),
        max_size=3,
    ),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_again(keys: list[str], data: st.DataObject, extra: dict[str, object]) -> None:
    whole: dict[str, Any] = {**BASE, "plan": dict(extra)}
    for key in keys:
        section, _, name = key.partition(".")
        whole.setdefault(section, {})[name] = data.draw(value_of[key])
    if "rule" in whole.get("merge", {}):  # what a rule allows beside it is another test's
        whole["merge"] = {"rule": whole["merge"]["rule"]}
    made = from_table(whole)
    assert parse(dumps(made)) == made


def test_every_key_is_written_with_its_meaning() -> None:
    text = dumps(from_table(BASE))
    for name, kind in SECTIONS.items():
        assert f"[{name}]" in text
        for entry in fields(kind):
            (line,) = [line for line in text.splitlines() if line.startswith(f"{entry.name} =") and "  # " in line][:1]
            assert len(line.split("  # ")[1]) > 3
    for key in plan_keys.SHARED:
        assert key in text.split("[plan]")[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("true", True),
        ('"a b"', "a b"),
        ("constant", "constant"),
        ("", ""),
        ("[1, 2]", [1, 2]),
        ("1.2.3", "1.2.3"),
        ("fc.*", "fc.*"),
        ("#", "#"),
    ],
)
def test_a_value_that_is_not_toml_is_a_string(text: str, value: object) -> None:
    assert toml_value(text) == value


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_set_value_is_a_value(text: str) -> None:
    toml_value(text)


def test_dotted_keys_are_set() -> None:
    made = from_table(
        with_overrides(dict(BASE), {"merge.buffer_size": 1, "plan.local_epochs": 2, "merge.max_wait_s": 1})
    )
    assert (made.merge.buffer_size, made.merge.max_wait_s, made.plan) == (1, 1.0, {"local_epochs": 2})


@pytest.mark.parametrize("dotted", ["merge", "merge.", "merge.a.b", ".", "", "federation.x"])
def test_other_keys_are_refused(dotted: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        with_overrides(dict(BASE), {dotted: 1})


@pytest.mark.parametrize(("seal", "chosen", "devices"), [(False, 0, 1), (True, 0, 2), (False, 1, 1), (True, 5, 5)])
def test_a_version_is_made_of_two_devices_where_updates_are_sealed(seal: bool, chosen: int, devices: int) -> None:
    settings = from_table({**BASE, "merge": {"min_devices": chosen}, "plan": {"seal": seal}})
    assert settings.min_devices == devices
    assert from_table({**BASE, "plan": {"seal": seal}}).merge.min_devices == 0


@pytest.mark.parametrize(("rule", "keep"), [("krum", 0), ("krum", 3), ("multi-krum", 1)])
def test_a_rule_that_chooses_one_update_is_refused_where_updates_are_sealed(rule: str, keep: int) -> None:
    merge = {"rule": rule, "krum_keep": keep, "buffer_size": 5}
    with pytest.raises(ConfigError, match=r'plan.seal = true .* choose merge.rule = "multi-krum" with krum_keep = 0'):
        from_table({**BASE, "merge": merge, "plan": {"seal": True}})
    assert from_table({**BASE, "merge": merge, "plan": {"seal": False}}).merge.rule == rule
    for allowed in (0, 2):
        merge = {"rule": "multi-krum", "krum_keep": allowed, "buffer_size": 5}
        assert from_table({**BASE, "merge": merge, "plan": {"seal": True}}).merge.krum_keep == allowed


def test_one_device_alone_is_refused_where_updates_are_sealed() -> None:
    with pytest.raises(
        ConfigError, match=r"merge.min_devices = 1 with plan.seal = true .* choose merge.min_devices = 0"
    ):
        from_table({**BASE, "merge": {"min_devices": 1}, "plan": {"seal": True}})
