"""Commands about private sums: a federation is made with helpers, they are invited, the status shows them."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.private_world import HelperSide, PrivateBench, make_private
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import private_rows, private_status
from ternbus.aggregator.store.ledger import reading
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.invitation import Invitation
from ternbus.command import main


def ternbus(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(map(str, arguments)))
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"w": np.ones((20, 20), np.float32)}, {})
    return path


@pytest.fixture
def helper() -> HelperSide:
    return HelperSide("h-1")


@pytest.fixture
def home(tmp_path: Path, helper: HelperSide) -> Path:
    return make_private(tmp_path / "agg", [helper])


def card(path: Path, **changes: object) -> Path:
    table = {"name": "h-1", "federation": "lab", "key": "ab" * 32, **changes}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items() if value is not None))
    return path


def init(model: Path, home: Path, *arguments: object) -> int:
    about = ("--federation", "lab", "--broker", "mqtt://127.0.0.1:1", "--model", model)
    return ternbus("aggregator", "init", home, *about, *arguments)


def test_a_federation_is_made_with_its_helpers_cards(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = card(tmp_path / "1.toml"), card(tmp_path / "2.toml", name="h-2", key="CD" * 32)
    assert init(model, tmp_path / "agg", "--private", "--helper", cards[0], "--helper", cards[1]) == 0
    settings = administration.load_settings(tmp_path / "agg")
    assert settings.private is not None
    assert settings.private.helpers == {"h-1": "ab" * 32, "h-2": "cd" * 32}
    assert settings.plan["codec"] == "private"
    assert f"ternbus aggregator invite {tmp_path / 'agg'} --helper NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation": "other"}, "is the card of a helper of federation 'other', not 'lab'"),
        ({"key": "ab"}, "'key' is not a public key of 64 hex digits"),
        ({"key": None}, "lacks the text 'key'"),
        ({"name": 7}, "lacks the text 'name'"),
        ({"name": "H 1"}, "invalid helper name"),
    ],
)
def test_a_file_that_is_no_card_of_this_federation_is_refused(
    changes: dict[str, Any], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(model, tmp_path / "agg", "--private", "--helper", card(tmp_path / "1.toml", **changes)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "agg").exists()


def test_private_and_helper_go_together(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(model, tmp_path / "agg", "--private") == 2
    assert "--private needs a helper: add --helper FILE" in capsys.readouterr().err
    assert init(model, tmp_path / "agg", "--helper", card(tmp_path / "1.toml")) == 2
    assert "--helper is for private sums: add --private" in capsys.readouterr().err
    assert init(model, tmp_path / "agg", "--private", "--helper", tmp_path / "none.toml") == 2
    assert "does not exist: give the card.toml that `ternbus helper init` has written" in capsys.readouterr().err
    one = card(tmp_path / "1.toml")
    assert init(model, tmp_path / "agg", "--private", "--helper", one, "--helper", one) == 2
    assert "two helpers have the name h-1" in capsys.readouterr().err


def test_settings_that_do_not_go_with_private_sums_are_refused_at_init(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = ("--private", "--helper", card(tmp_path / "1.toml"))
    assert init(model, tmp_path / "agg", *private, "--set", "merge.rule=krum") == 2
    assert 'merge.rule = "krum": private sums do not go with it' in capsys.readouterr().err
    assert init(model, tmp_path / "agg", *private, "--set", "merge.buffer_size=50") == 2
    assert "use a buffer_size of 31 or less" in capsys.readouterr().err


def test_a_helper_is_invited_by_its_name(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ternbus("aggregator", "invite", home, "--helper", "h-1") == 0
    invitation = Invitation.loads(capsys.readouterr().out, "test")
    assert (invitation.device, invitation.federation) == ("h-1", "lab")
    with reading(home) as ledger:
        assert private_rows.codes(ledger.db)["h-1"].code == invitation.code
    out = tmp_path / "invitations"
    assert ternbus("aggregator", "invite", home, "pi-1", "--helper", "h-1", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["h-1.toml", "pi-1.toml"]


def test_a_device_of_a_helper_s_name_is_invited_with_a_word_about_the_option(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ternbus("aggregator", "invite", home, "h-1") == 0
    assert "for the helper of that name use --helper h-1" in capsys.readouterr().err
    assert ternbus("aggregator", "invite", home, "pi-1") == 0
    assert capsys.readouterr().err == ""


def test_only_helpers_in_the_settings_are_invited(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ternbus("aggregator", "invite", home, "--helper", "h-2") == 2
    assert "names no helper 'h-2', known are h-1" in capsys.readouterr().err
    assert ternbus("aggregator", "invite", home, "h-1", "--helper", "h-1", "--out", home / "out") == 2
    assert "h-1 is named as a helper and as a device: invite them by two commands" in capsys.readouterr().err
    with reading(home) as ledger:
        assert private_rows.codes(ledger.db) == {}


def test_a_plain_federation_invites_no_helper(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(model, tmp_path / "agg") == 0
    assert ternbus("aggregator", "invite", tmp_path / "agg", "--helper", "h-1") == 2
    assert "names no helper 'h-1', it has no private sums" in capsys.readouterr().err
    assert ternbus("aggregator", "status", tmp_path / "agg", "--json") == 0
    assert "private" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_invitations_of_helpers_are_listed_and_cancelled(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ternbus("aggregator", "invite", home, "--helper", "h-1")
    ternbus("aggregator", "invite", home, "--evaluator", "judge")
    capsys.readouterr()
    assert ternbus("aggregator", "invitations", home) == 0
    listed = capsys.readouterr().out
    assert "a helper" in listed
    assert "a new evaluator" in listed
    assert ternbus("aggregator", "invitations", home, "--json") == 0
    rows = {row["device"]: (row["role"], row["state"], row["key_state"]) for row in json.loads(capsys.readouterr().out)}
    assert rows == {"h-1": ("helper", "open", None), "judge": ("evaluator", "open", None)}
    assert ternbus("aggregator", "invitations", home, "--cancel", "h-1", "--json") == 0
    assert [row["device"] for row in json.loads(capsys.readouterr().out)] == ["judge"]


def test_an_invitation_of_a_helper_that_enrolled_says_so(
    home: Path, helper: HelperSide, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = PrivateBench(home)
    bench.start()
    bench.ready(helper)
    bench.close()
    ternbus("aggregator", "invite", home, "--helper", "h-1")
    capsys.readouterr()
    ternbus("aggregator", "invitations", home)
    assert "a helper, again under its key" in capsys.readouterr().out


def test_a_helper_is_not_revoked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ternbus("aggregator", "revoke", home, "h-1") == 2
    assert "h-1 is a helper, which is replaced, not revoked" in capsys.readouterr().err


def test_the_status_says_who_is_waited_for(home: Path, helper: HelperSide, capsys: pytest.CaptureFixture[str]) -> None:
    assert ternbus("aggregator", "status", home) == 0
    text = capsys.readouterr().out
    assert "private sums of 2 to 31 devices, 6 bits: no terms yet" in text
    assert "it has not enrolled" in text
    bench = PrivateBench(home)
    bench.start()
    bench.enroll_helper(helper)
    settings = administration.load_settings(home)
    waits = private_status.read(home, settings)["private"]["helpers"]["h-1"]["waits_for"]
    assert waits == "it has not sent its card"
    bench.say(helper, helper.status(count=3), helper.card(min=4))
    moment = time.time()
    bench.now = moment
    bench.tick()
    found = private_status.read(home, settings)["private"]
    assert bench.context is not None
    assert found | {"helpers": None} == {
        "terms": bench.context.terms_digest.hex(),
        "bits": 6,
        "levels": 1,
        "min": 4,
        "max": 31,
        "helpers": None,
        "closing": False,
        "groups": [],
        "sets": [],
        "dropped": {},
        "spoiled": {},
        "refused": None,
    }
    row = found["helpers"]["h-1"]
    assert row.pop("seen_at") == 1000.0
    assert row == {
        "key": helper.identity.public.hex(),
        "enrolled": True,
        "state": "idle",
        "card": 1,
        "roster": "own",
        "min": 4,
        "count": 3,
        "software": "",
        "answered_at": None,
        "waits_for": None,
    }
    bench.close()
    assert ternbus("aggregator", "status", home) == 0
    text = capsys.readouterr().out
    assert f"terms {found['terms']}" in text
    assert ternbus("aggregator", "status", home, "--json") == 0
    assert json.loads(capsys.readouterr().out)["private"] == found | {"helpers": {"h-1": row | {"seen_at": 1000.0}}}


def test_another_key_s_row_says_nothing_in_the_status(home: Path, helper: HelperSide) -> None:
    bench = PrivateBench(home)
    bench.start()
    bench.ready(helper)
    bench.close()
    text = (home / administration.TOML).read_text()
    (home / administration.TOML).write_text(text.replace(helper.identity.public.hex(), "ab" * 32))
    row = private_status.read(home, administration.load_settings(home))["private"]["helpers"]["h-1"]
    assert (row["enrolled"], row["state"], row["count"], row["card"]) == (False, "offline", None, None)
