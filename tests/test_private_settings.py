"""The section [private] of aggregator.toml, and what does not go with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.private_settings import PrivateSettings
from ternbus.aggregator.settings import Settings, dumps, from_table, new_home, with_overrides
from ternbus.aggregator.shell import administration
from ternbus.broker.errors import ConfigError
from ternbus.broker.toml import loads

KEYS = {"h-1": "ab" * 32, "h-2": "cd" * 32}


def table(**changes: object) -> dict[str, Any]:
    chosen = {"private.helpers": KEYS, **{name.replace("__", "."): value for name, value in changes.items()}}
    return with_overrides({"federation": "lab", "broker": "mqtt://127.0.0.1:1"}, new_home(chosen))


def settings(**changes: object) -> Settings:
    return from_table(table(**changes))


def test_a_new_federation_with_helpers_sends_private_updates_in_sums_that_fit() -> None:
    made = settings()
    assert made.private == PrivateSettings(helpers=KEYS)
    assert made.plan == {"codec": "private"}
    assert (made.merge.influence_bound, made.merge.buffer_size) == ("none", 10)
    assert made.private.public_keys == {name: bytes.fromhex(key) for name, key in KEYS.items()}
    assert made.private.devices_max == 31
    assert settings(private__bits=4, private__min=5).merge.buffer_size == 7


def test_the_file_is_read_as_it_was_written() -> None:
    made = settings(private__bits=8, private__levels=2, private__samples=50, plan__local_epochs=2)
    assert from_table(loads(dumps(made), "aggregator.toml")) == made


def test_a_plain_federation_has_no_section_and_no_other_plan() -> None:
    plain = {"federation": "lab", "broker": "mqtt://127.0.0.1:1"}
    made = from_table(with_overrides(dict(plain), new_home({})))
    assert made.private is None
    assert "private" not in dumps(made).replace("plan.private", "")
    assert dict(made.published_plan) == {}
    assert from_table({**plain, "private": {}}).private is None
    assert from_table({**plain, "private": {"helpers": {}}}).private is None
    assert made.merge.influence_bound == configuration.NEW_HOME["merge.influence_bound"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge__rule": "median"}, r'merge.rule = "median": private sums do not go with it'),
        ({"merge__max_update_norm": 1.0}, r"merge.max_update_norm = 1: .*set it to 0"),
        ({"merge__max_update_norm": 1.0, "merge__on_large": "refuse"}, r"merge.max_update_norm = 1: "),
        ({"merge__max_share": 0.5}, r"merge.max_share = 0.5: .*set it to 1"),
        ({"merge__influence_bound": "adaptive"}, r'influence_bound = "adaptive": .*use influence_bound = "none"'),
        ({"merge__buffer_size": 32}, r"at most 31 devices; use a buffer_size of 31 or less"),
        ({"merge__buffer_size": 8, "private__bits": 4}, r"at most 7 devices"),
        ({"merge__buffer_size": 16, "private__levels": 2}, r"at most 15 devices"),
        ({"merge__buffer_size": 4}, r"merge.buffer_size = 4: a sum is of at least private.min = 5"),
        ({"private__min": 32}, r"private.min = 32: 6 bits with levels = 1 hold sums of at most 31 devices"),
        ({"private__min": 1}, r"private.min = 1 must be from 2"),
        ({"private__bits": 7}, r"private.bits = 7 must be one of 4, 5, 6, 8"),
        ({"private__bits": 6.0}, r"private.bits = 6.0 must be one of 4, 5, 6, 8"),
        ({"private__kind": "plain"}, r"private.kind = 'plain' must be one of mask, bfv"),
        ({"private__kind": "bfv"}, r'private.kind = "bfv" takes one helper, .* names 2: name one'),
        ({"private__levels": 0}, r"private.levels = 0"),
        ({"private__samples": -1}, r"private.samples = -1"),
        ({"private__weights": 1}, r"private.weights is unknown"),
        ({"private__helpers": "h-1"}, r"private.helpers must be a table"),
        ({"private__helpers": {"h-1": "ab"}}, r"private.helpers.h-1 is not a public key of 64 hex digits"),
        ({"private__helpers": {"h-1": 7}}, r"private.helpers.h-1 is not a public key"),
        ({"private__helpers": {"H 1": "ab" * 32}}, r"invalid"),
        ({"private__helpers": {"h-1": "ab" * 32, "h-2": "AB" * 32}}, r"two helpers have the same key"),
        ({"private__helpers": {f"h-{n}": f"{n:02x}" * 32 for n in range(9)}}, r"at most 8 names"),
        ({"private__helpers": {}, "private__bits": 5}, r"private has no helpers"),
        ({"plan__codec": "ternary"}, r'plan.codec = "ternary": with private.helpers'),
        ({"private__helpers": {}, "plan__codec": "private"}, r'plan.codec = "private" needs helpers'),
    ],
)
def test_what_does_not_go_with_private_sums_is_refused_in_words(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_a_section_that_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="private must be a table"):
        from_table({**table(), "private": 7})


def test_a_refused_federation_leaves_nothing_behind(tmp_path: Path) -> None:
    model = {"w": np.ones((20, 20), np.float32)}
    with pytest.raises(ConfigError, match="max_share"):
        administration.create(
            tmp_path / "agg",
            federation="lab",
            broker="mqtt://127.0.0.1:1",
            model=model,
            settings={"private.helpers": KEYS, "merge.max_share": 0.5},
        )
    assert list(tmp_path.iterdir()) == []


def test_the_learning_rate_is_the_plan_s_else_the_task_s() -> None:
    assert settings().learning_rate == 0.01
    assert settings(plan_check__default_plan={"learning_rate": 0.2}).learning_rate == 0.2
    assert settings(plan_check__default_plan={"learning_rate": 0.2}, plan__learning_rate=0.5).learning_rate == 0.5
    assert settings(plan__learning_rate=0).learning_rate == 0.01
