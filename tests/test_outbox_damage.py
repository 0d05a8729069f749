"""A damaged outbox: `edge join --renew` checks it before the invitation is spent, and keeps what can be read."""

import random
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crash.commands import MENDING, killed
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.files import write_key
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.state import AnsweredUpdate, OutstandingUpdate, State, prepare
from ternbus.edge.learn.local_state import packed
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.privacy import Account
from ternbus.edge.shell import agent, key_rotation
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.options import Options
from ternbus.edge.store import outbox as outboxes
from ternbus.edge.store import outbox_salvage
from ternbus.edge.store.outbox import FILE, Outbox

FLIPS, SEED = 300, 20_260_402
SCHEMA = Schema.of({"w": (400, 10)})
KEY = Identity(b"o" * 32).key_id
RESIDUAL = np.arange(SCHEMA.elements, dtype=np.float32)
STATE = State(
    key=KEY,
    enrolled=True,
    seq_limit=129,
    session=12,
    head_version=6,
    head_seq=44,
    answered_base=4,
    accepted=3,
    schema=SCHEMA.encoded,
    residual=RESIDUAL,
    outstanding=prepare(
        Block.of_float32(SCHEMA, RESIDUAL / np.float32(7)), seq=70, base=5, samples=9, metrics={}, frame_bytes=3000
    ),
    account=Account(epsilon=1.5, delta=1e-5),
    local=packed({"head.weight": np.ones((3, 2), np.float32)}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Outbox(tmp_path, KEY) as outbox:
        for seq in range(2, 60):
            answered = AnsweredUpdate(seq=seq, base=seq, outcome="accepted", version=seq, key=KEY, digest=bytes(32))
            outbox.save(STATE, answered, {"updates.accepted": seq})
    return tmp_path


def root(folder: Path, table: str) -> int:
    """Where a table's first page begins in the file."""
    with closing(sqlite3.connect(folder / FILE)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    return int((page - 1) * size)


def destroy(folder: Path, table: str) -> None:
    content = bytearray((folder / FILE).read_bytes())
    place = root(folder, table)
    content[place : place + 64] = b"\xff" * 64
    (folder / FILE).write_bytes(content)


def test_a_sound_outbox_is_sound(folder: Path) -> None:
    assert outbox_salvage.is_sound(folder)


LOST = {"receipts": "", "residual": "the residual", "outstanding": "the update", "counters": "counters"}


@pytest.mark.parametrize(("table", "lost"), LOST.items())
def test_what_can_be_read_is_kept_and_the_rest_is_named(folder: Path, table: str, lost: str) -> None:
    destroy(folder, table)
    assert not outbox_salvage.is_sound(folder)
    aside, named = outbox_salvage.salvage(folder, KEY, private=True)
    assert (aside / FILE).exists()
    assert lost in " ".join(named)
    assert outbox_salvage.is_sound(folder)
    with Outbox(folder, KEY) as outbox:
        state = outbox.state
    assert (state.head_version, state.head_seq, state.answered_base, state.accepted) == (6, 44, 4, 3)
    assert (state.account, state.schema, state.enrolled) == (STATE.account, SCHEMA.encoded, True)
    assert state.local == STATE.local
    assert (state.residual is None) == (table == "residual")
    assert (state.outstanding is None) == (table == "outstanding")


def test_a_privacy_account_that_is_lost_is_not_begun_anew(folder: Path) -> None:
    destroy(folder, "kept")
    before = (folder / FILE).read_bytes()
    with pytest.raises(CorruptError, match=r"privacy budget is lost: .*`ternbus edge rejoin --account-lost"):
        outbox_salvage.salvage(folder, KEY, private=False)
    assert (folder / FILE).read_bytes() == before
    outbox_salvage.salvage(folder, KEY, private=True, account_lost=True)
    assert outbox_salvage.is_sound(folder)


def test_the_commands_in_errors_take_a_folder_with_a_blank_in_its_name(folder: Path, tmp_path: Path) -> None:
    """As a shell reads them."""
    home = DeviceDirectory(tmp_path / "my pi")
    home.folder.mkdir()
    (folder / FILE).rename(home.folder / FILE)
    destroy(home.folder, "kept")
    settings = Settings(
        federation="lab", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key="ab" * 32, task="digits-numpy",
        dp="device", max_epsilon="8", max_delta="1e-5",
    )  # fmt: skip
    invitation = Invitation(
        federation="lab", device="pi", broker=settings.broker, aggregator_key=settings.aggregator_key, code="c" * 32
    )

    def says(refuse: Callable[[], object], command: str) -> None:
        with pytest.raises((ConfigError, CorruptError)) as refusal:
            refuse()
        named = [shlex.split(text) for text in str(refusal.value).split("`")[1::2] if "my pi" in text]
        assert named[0][1:3] == ["edge", command]
        assert {each[-1] for each in named} == {str(home.folder)}

    says(home.settings, "join")
    home.write(settings)
    says(lambda: home.prepare(invitation, task="digits-numpy", data=None, partition="all"), "run")
    says(lambda: outbox_salvage.salvage(home.folder, KEY, private=True), "rejoin")
    (home.folder / FILE).write_bytes(b"")
    says(lambda: outboxes.check(home.folder), "rejoin")
    says(lambda: key_rotation.check_account(home), "rejoin")
    home.renewal().folder.mkdir()
    home.renewal().write(replace(settings, code="a-code"))
    says(lambda: key_rotation.finish(home), "join")


def test_after_any_damage_it_is_sound_or_refused(folder: Path, tmp_path: Path) -> None:
    chance, whole = random.Random(7), (folder / FILE).read_bytes()
    for number in range(40):
        damaged = tmp_path / str(number)
        damaged.mkdir()
        content = bytearray(whole)
        for _ in range(8):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (damaged / FILE).write_bytes(content)
        if outbox_salvage.is_sound(damaged):
            continue
        try:
            outbox_salvage.salvage(damaged, KEY, private=True)
        except CorruptError:
            continue
        assert outbox_salvage.is_sound(damaged)


def test_a_new_key_is_not_asked_for_where_the_outbox_has_lost_what_it_must_not(folder: Path) -> None:
    """There is no broker: nothing was sent."""
    home = DeviceDirectory(folder)
    write_key(folder / "device.key", b"o" * 32)
    about = {"federation": "lab", "device": "pi", "broker": "mqtt://127.0.0.1:1", "task": "digits-numpy"}
    home.write(Settings(**about, aggregator_key="ab" * 32))
    invitation = Invitation(
        federation="lab", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key="ab" * 32, code="c" * 32
    )
    destroy(folder, "kept")
    with pytest.raises(CorruptError, match="edge rejoin"):
        agent.renew(home, invitation, load_task("digits-numpy"), Options(), print)
    assert not home.renewal().exists()


def facts(update: OutstandingUpdate | None) -> list[object]:
    assert update is not None
    numbers = [update.seq, update.base, update.samples, dict(update.metrics), update.frame_bytes]
    return [*numbers, update.codec, update.encoding, bytes(update.encoded), bytes(update.sealed)]


def content(folder: Path) -> list[object]:
    """All that a device reads in its outbox."""
    with Outbox(folder, KEY) as outbox:
        state, residual = outbox.state, outbox.state.residual
        return [
            repr(replace(state, residual=None, outstanding=None)),
            (state.schema, state.head_digest),
            facts(state.outstanding),
            None if residual is None else residual.tobytes(),
            dict(outbox.counters),
            outboxes.answers(folder),
        ]


def test_a_bit_that_flips_in_an_outbox_is_found_at_open_or_changes_nothing(folder: Path, tmp_path: Path) -> None:
    chance, whole, sound = random.Random(SEED), (folder / FILE).read_bytes(), content(folder)
    found = 0
    for number in range(FLIPS):
        damaged = tmp_path / f"flip-{number}"
        damaged.mkdir()
        flipped = bytearray(whole)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        (damaged / FILE).write_bytes(flipped)
        try:
            assert content(damaged) == sound
        except ConfigError as error:  # the number of the format
            assert "install a newer Ternbus" in str(error)
        except CorruptError as error:
            assert f"`ternbus edge join --renew INVITATION.toml {damaged}`" in str(error) or "has format" in str(error)
            assert "ternbus edge rejoin" in str(error) or "has format" in str(error)
            found += 1
    assert found > FLIPS / 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE residual SET vector = zeroblob(length(vector))", "residual"),
        ("DELETE FROM residual", "residual"),
        ("UPDATE outstanding SET samples = 1000", "outstanding"),
        ("UPDATE kept SET value = '7' WHERE name = 'seq_limit'", "a row of kept"),
        ("DELETE FROM kept WHERE name = 'account'", "account in kept"),
        ("UPDATE counters SET value = 7", "a row of counters"),
        ("UPDATE receipts SET base = '7' WHERE number = 3", "a row of receipts"),
    ],
)
def test_what_was_never_written_is_named(folder: Path, change: str, named: str) -> None:
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        assert db.execute(change).rowcount
    for opening in (lambda: Outbox(folder, KEY), lambda: outboxes.summary(folder)):
        with pytest.raises(CorruptError, match=rf"{named}.* is not as it was written"):
            opening()


def test_what_is_not_as_it_was_written_is_not_salvaged(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        db.execute("UPDATE residual SET vector = zeroblob(length(vector))")
        db.execute("UPDATE kept SET value = '9' WHERE name = 'head_seq'")
    _, lost = outbox_salvage.salvage(folder, KEY, private=True)
    assert lost == ["a row of kept", "head_seq", "the residual", "the receipts of earlier updates"]
    with Outbox(folder, KEY) as outbox:
        assert outbox.state.residual is None
        assert facts(outbox.state.outstanding) == facts(STATE.outstanding)
        assert (outbox.state.account, outbox.state.head_version) == (STATE.account, STATE.head_version)


def test_to_leave_a_federation_removes_the_damaged_outbox(folder: Path) -> None:
    destroy(folder, "receipts")
    outbox_salvage.salvage(folder, KEY, private=True)
    DeviceDirectory(folder).erase()
    assert not folder.exists()


def test_a_save_that_changes_no_tensor_writes_no_tensor(folder: Path) -> None:
    """Their checksums are in `kept`, beside what changes with every save."""
    with Outbox(folder, KEY) as outbox:
        statements: list[str] = []
        outbox._db.set_trace_callback(statements.append)
        outbox.save(replace(outbox.state, head_seq=99), None, {})
    assert [text.split("(")[0] for text in statements if text.startswith("REPLACE")] == ["REPLACE INTO kept "]


@pytest.mark.slow
@pytest.mark.parametrize("point", MENDING)
def test_a_damaged_outbox_is_replaced_or_still_there_after_a_kill(folder: Path, tmp_path: Path, point: str) -> None:
    """There is no broker, so the second attempt ends where the key would be enrolled."""
    home = DeviceDirectory(folder)
    write_key(folder / "device.key", b"o" * 32)
    asked = Invitation(
        federation="lab", device="pi", broker="mqtt://127.0.0.1:1", aggregator_key="ab" * 32, code="c" * 32
    )
    home.write(
        Settings(
            federation="lab", device="pi", broker=asked.broker, task="digits-numpy", aggregator_key=asked.aggregator_key
        )
    )
    invitation = tmp_path / "pi.toml"
    files.write_secret(invitation, asked.dumps().encode())
    destroy(folder, "receipts")
    killed(point, "edge", "join", "--renew", invitation, folder, "--timeout", 0)
    outbox_salvage.settle(folder)
    assert (outbox_salvage.is_sound(folder), list(folder.glob("*.partial"))) == (
        point == "outbox-salvaged",
        [] if point == "outbox-salvaged" else [folder / outbox_salvage.FRESH],
    )
    if point == "outbox-moved-aside":
        outbox_salvage.salvage(folder, KEY, private=True)
    with Outbox(folder, KEY) as outbox:
        assert (outbox.state.account, outbox.state.head_version) == (STATE.account, STATE.head_version)
    assert (len(list(folder.glob("outbox-damaged-*"))), list(folder.glob("*.partial"))) == (1, [])
