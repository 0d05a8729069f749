"""A device's new key: all else stays, what is outstanding is signed anew, and a crash at any moment is mended."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crash.commands import killed
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import write_key, write_secret
from ternbus.broker.link.tls import CERTIFICATE
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.state import OutstandingUpdate, State, prepare, sealed
from ternbus.edge.plan.privacy import DEVICE, Account, Cost
from ternbus.edge.shell import agent, key_rotation
from ternbus.edge.shell.directory import KEY, TOML, DeviceDirectory, Settings
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.printer import Printer
from ternbus.edge.store.outbox import FILE, Outbox
from ternbus.edge.tasks import digits_numpy

SCHEMA = Schema.of({"w": (20, 10)})
AGGREGATOR = Identity(b"a" * 32)
OLD, NEW = Identity(b"o" * 32), Identity(b"n" * 32)
RESIDUAL = np.arange(SCHEMA.elements, dtype=np.float32)
BLOCK = Block.of_float32(SCHEMA, RESIDUAL / np.float32(7))


def settings(**changes: str) -> Settings:
    about = {"federation": "lab", "device": "pi", "broker": "mqtt://127.0.0.1:1", "task": "digits-numpy"}
    return Settings(**{**about, "aggregator_key": AGGREGATOR.public.hex(), "partition": "iid:1/2", **changes})


def outstanding(*, seal: bool) -> OutstandingUpdate:
    update = prepare(BLOCK, seq=70, base=5, samples=9, metrics={"loss": 0.5}, frame_bytes=3000)
    return sealed(update, OLD.key_id, lambda plain: b"old:" + plain) if seal else update


def device(folder: Path, *, seal: bool = False, code: str = "", rejoin: str = "") -> DeviceDirectory:
    """A device that has joined, and a new key in its renewal folder, enrolled unless there is a code."""
    home = DeviceDirectory(folder / "pi")
    home.folder.mkdir()
    write_key(home.folder / KEY, OLD.seed)
    home.write(settings())
    (home.folder / CERTIFICATE).write_text("the old certificate")
    state = State(
        key=OLD.key_id,
        enrolled=True,
        seq_limit=129,
        session=12,
        head_version=6,
        head_seq=44,
        answered_base=4,
        accepted=3,
        receipt_seq=41,
        schema=SCHEMA.encoded,
        residual=RESIDUAL,
        outstanding=outstanding(seal=seal),
    )
    with Outbox(home.folder, OLD.key_id) as outbox:
        outbox.save(state, None, {"updates.accepted": 3})
    renewal = home.renewal()
    renewal.folder.mkdir()
    write_key(renewal.folder / KEY, NEW.seed)
    renewal.write(settings(broker="mqtt://127.0.0.1:2", task="another", code=code, rejoin=rejoin))
    write_secret(renewal.folder / CERTIFICATE, b"the new certificate")
    with Outbox(renewal.folder, NEW.key_id) as outbox:
        outbox.save(State(key=NEW.key_id, enrolled=not code, seq_limit=66, session=2, receipt_seq=40), None, {})
    return home


def kept_in(home: DeviceDirectory) -> State:
    with Outbox(home.folder, NEW.key_id) as outbox:
        assert outbox.counters == {"updates.accepted": 3}
        return outbox.state


def check_succeeded(home: DeviceDirectory, *, seal: bool = False) -> None:
    state = kept_in(home)
    assert (home.identity(), state.key, state.enrolled) == (NEW, NEW.key_id, True)
    assert (state.head_version, state.head_seq, state.answered_base, state.accepted) == (6, 44, 4, 3)
    assert (state.session, state.receipt_seq) == (2, 40)
    assert state.residual is not None
    assert state.residual.tobytes() == RESIDUAL.tobytes()
    update = state.outstanding
    assert update is not None
    assert update.seq == 66 < state.seq_limit  # above all that the new key has used
    before = outstanding(seal=seal)
    assert replace(update, seq=0, sealed=b"", frame_bytes=0).body == before.encoded
    assert (update.base, update.samples, update.metrics) == (before.base, before.samples, before.metrics)
    if seal:
        plain = AGGREGATOR.unseal(update.sealed)
        assert plain == NEW.key_id + (66).to_bytes(8, "little") + before.encoded
    assert home.settings() == settings(broker="mqtt://127.0.0.1:2")
    assert (home.folder / CERTIFICATE).read_text() == "the new certificate"
    assert not list(home.folder.glob("renewal*"))


@pytest.mark.parametrize("seal", [False, True])
def test_the_new_key_takes_the_old_ones_place_and_all_else_stays(tmp_path: Path, seal: bool) -> None:
    home = device(tmp_path, seal=seal)
    key_rotation.finish(home)
    check_succeeded(home, seal=seal)
    key_rotation.finish(home)
    check_succeeded(home, seal=seal)


def test_rejoining_drops_every_counter_that_another_could_have_raised(tmp_path: Path) -> None:
    """Twice, as after a crash before the renewal's folder was removed. The account is the owner's, and stays."""
    home = device(tmp_path, rejoin="yes")
    spent = Account().plus(Cost(kind=DEVICE, noise=1.0, rate=1.0, steps=1))
    with Outbox(home.folder, OLD.key_id) as outbox:
        burnt = replace(outbox.state, head_version=2**62, head_seq=2**62, answered_base=2**62, account=spent)
        outbox.save(burnt, None, outbox.counters)
    shutil.copytree(home.renewal().folder, tmp_path / "copy")
    for _ in range(2):
        key_rotation.finish(home)
        state = kept_in(home)
        assert (home.identity(), state.key, state.enrolled) == (NEW, NEW.key_id, True)
        assert (state.head_version, state.head_seq, state.head_digest) == (0, 0, b"")
        assert (state.answered_base, state.evaluated, state.outstanding, state.residual) == (-1, -1, None, None)
        assert (state.seq_limit, state.session, state.receipt_seq, state.accepted) == (66, 2, 40, 3)
        assert state.account == spent
        assert home.settings() == settings(broker="mqtt://127.0.0.1:2")
        shutil.copytree(tmp_path / "copy", home.renewal().folder)


INVITED = Invitation(
    federation="lab", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key=AGGREGATOR.public.hex(), code="c" * 32
)


@pytest.mark.parametrize("rejoin", [False, True])
@pytest.mark.parametrize("lost", ["removed", "never saved in"])
def test_no_new_key_forgets_what_was_spent_of_an_owners_budget(tmp_path: Path, rejoin: bool, lost: str) -> None:
    """Not by itself: with the outbox the account is gone, and a new one would begin at 0. Nothing is sent before."""
    home = device(tmp_path)
    home.renewal().discard()
    home.write(settings(dp="device", max_epsilon="8", max_delta="1e-5"))
    key_rotation.check_account(home)
    (home.folder / FILE).unlink()
    if lost == "never saved in":
        with Outbox(home.folder, OLD.key_id):
            pass
    with pytest.raises(ConfigError, match="add --account-lost to `ternbus edge rejoin"):
        agent.renew(home, INVITED, digits_numpy.TASK, Options(), Printer(as_json=True), rejoin=rejoin)
    assert not home.renewal().exists()
    home.write(settings())
    key_rotation.check_account(home)


@pytest.mark.slow
def test_a_rejoining_that_is_killed_at_each_point_is_the_one_that_was_not(tmp_path: Path) -> None:
    """One start after the other goes on; there is no broker, and none is reached before the last."""
    folders = [tmp_path / name for name in ("killed", "whole")]
    for folder in folders:
        folder.mkdir()
    home, other = (device(folder, rejoin="yes") for folder in folders)
    for point in ("rotation-saved", "rotation-copied", "rotation-settings-written", "folder-renamed"):
        killed(point, "edge", "run", home.folder, "--timeout", 0)
    key_rotation.finish(home)
    key_rotation.finish(other)
    assert not home.renewal().folder.exists()
    assert repr(kept_in(home)) == repr(kept_in(other))
    assert (home.identity(), home.settings()) == (NEW, other.settings())


@pytest.mark.parametrize("rejoin", ["", "yes"])
def test_a_rotation_that_is_asked_for_again_after_a_kill_is_finished_without_the_invitation(
    tmp_path: Path, rejoin: str
) -> None:
    """The first try may have spent it. A key alone is not enough where the counters are to start anew."""
    home = device(tmp_path, rejoin=rejoin)
    shutil.copytree(home.renewal().folder, tmp_path / "copy")
    assert key_rotation.begin(home, INVITED, rejoin=bool(rejoin)) is None
    assert home.identity() == NEW
    shutil.copytree(tmp_path / "copy", home.renewal().folder)
    assert (key_rotation.begin(home, INVITED, rejoin=True) is None) == bool(rejoin)


def no_settings(home: DeviceDirectory) -> None:
    home.write(settings())


def no_key(home: DeviceDirectory) -> None:
    write_key(home.folder / KEY, OLD.seed)


def neither(home: DeviceDirectory) -> None:
    no_key(home)
    no_settings(home)


def only_the_folder_left(home: DeviceDirectory) -> None:
    pass


@pytest.mark.parametrize("undo", [no_settings, no_key, neither, only_the_folder_left])
def test_a_crash_in_the_middle_is_mended_at_the_next_start(
    tmp_path: Path, undo: Callable[[DeviceDirectory], None]
) -> None:
    home = device(tmp_path)
    shutil.copytree(home.renewal().folder, tmp_path / "copy")
    key_rotation.finish(home)
    undo(home)
    shutil.copytree(tmp_path / "copy", home.renewal().folder)
    key_rotation.finish(home)
    check_succeeded(home)


def test_while_it_is_not_known_which_key_is_good_the_device_does_not_run(tmp_path: Path) -> None:
    home = device(tmp_path, code="a-code")
    with pytest.raises(ConfigError, match="edge join --renew"):
        key_rotation.finish(home)
    home.renewal().write(settings(code="a-code", rejoin="yes"))
    with pytest.raises(ConfigError, match="edge rejoin INVITATION"):
        key_rotation.finish(home)
    assert home.identity() == OLD
    with Outbox(home.folder, OLD.key_id) as outbox:
        assert (outbox.state.key, outbox.state.seq_limit) == (OLD.key_id, 129)


def test_leaving_takes_the_new_key_along(tmp_path: Path) -> None:
    home = device(tmp_path, code="a-code")
    home.erase()
    assert not (home.folder / TOML).exists()
    assert not home.folder.exists()
