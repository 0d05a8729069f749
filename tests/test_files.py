"""Key files and secrets are their owner's alone; a file is replaced whole or not at all; one process holds a lock."""

import multiprocessing
import os
from pathlib import Path

import pytest

from ternbus.broker import files
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import (
    CHUNK_BYTES,
    check_secret,
    chunks,
    is_locked,
    lock,
    read_key,
    read_secret,
    replacing,
    storing,
    write_key,
    write_secret,
)

SEED = bytes(range(32))


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def test_a_key_file_is_kept_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, SEED)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path) == SEED
    write_key(path, SEED)  # again, whole or not at all
    assert names(tmp_path) == ["key"]
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)


def test_a_group_that_may_only_read_a_secret_was_chosen_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"secret")
    path.chmod(0o440)  # which no umask makes
    assert check_secret(path) == path
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    path.chmod(0o640)  # of root, say, for the group of a service
    assert check_secret(path) == path


@pytest.mark.parametrize("mode", [0o660, 0o444, 0o604, 0o602])
def test_a_secret_of_everybody_is_taken_only_where_nobody_can_close_it(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a secret"
    write_secret(path, b"secret")
    path.chmod(mode)
    with pytest.raises(ConfigError) as refused:
        check_secret(path)
    assert str(refused.value).endswith(f"run: chmod 600 '{path}'")
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError) as refused:
        check_secret(path)
    assert str(refused.value).endswith(f"run: sudo chown {owner + 1} '{path}' && sudo chmod 600 '{path}'")
    monkeypatch.setattr(files, "is_read_only", lambda _: True)  # as a secret is mounted into a container
    assert check_secret(path) == path


def test_a_folder_in_place_of_a_secret_is_called_one(tmp_path: Path) -> None:
    for mode in (0o700, 0o755):
        tmp_path.chmod(mode)
        with pytest.raises(ConfigError, match="is a folder: give the path of a file that holds the secret"):
            read_secret(tmp_path)


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"zz" * 32, b"\xff\xfe"])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    write_secret(path, content)
    with pytest.raises(ConfigError, match="is not a key file"):
        read_key(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(tmp_path / "none")


def test_a_write_that_was_cut_short_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "key"
    os.close(os.open(tmp_path / "key.partial", os.O_CREAT | os.O_WRONLY, 0o644))
    write_secret(path, b"secret")
    assert read_secret(path) == b"secret"


def write_half_of(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_bytes(b"ne")
        raise KeyError


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        write_half_of(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model"]
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "folder", "folder/"])
def test_a_folder_is_not_replaced_by_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    path = Path(name)
    with pytest.raises(ConfigError) as caught, storing(path), replacing(path):
        raise KeyError  # it is refused before anything is written
    assert str(caught.value) == f"cannot use {path}: it is a folder, not a file; give the path of a file"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none/deep/file", "there is no folder none/deep; make it, or correct the path"),
        ("file/deep/file", "file is a file, not a folder; give another path"),
    ],
)
def test_an_error_names_the_file_that_was_asked_for(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    path = Path(name)
    with pytest.raises(ConfigError) as caught, storing(path), replacing(path):
        raise KeyError
    assert str(caught.value) == f"cannot use {name}: {said}"


def test_a_folder_in_the_place_of_the_partial_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "key.partial").mkdir()
    with pytest.raises(ConfigError, match=r"key\.partial: it is a folder"), storing(tmp_path / "key"):
        write_secret(tmp_path / "key", b"secret")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.touch()
    with pytest.raises(ConfigError) as caught, storing(path):
        path.mkdir(exist_ok=True)
    assert str(caught.value) == f"cannot use {path}: it is a file, not a folder; give another path"


def test_an_error_of_a_path_that_may_be_right_is_told_in_the_system_s_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^cannot use {tmp_path}: File exists$"), storing(tmp_path):
        tmp_path.mkdir()


def _replace(path: Path, content: bytes) -> None:
    for _ in range(50):
        with replacing(path, concurrent=True) as partial:
            partial.write_bytes(content)


@pytest.mark.slow
def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, contents = tmp_path / "access", [bytes([number]) * 5000 for number in range(3)]
    processes = [multiprocessing.get_context("spawn").Process(target=_replace, args=(path, each)) for each in contents]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["access"]


def test_a_lock_is_held_by_one_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    held = lock(path)
    assert held is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert lock(path) is None
    assert lock(path, patience_s=0.05) is None
    assert is_locked(path)
    held.close()
    assert not is_locked(path)
    again = lock(path)
    assert again is not None
    again.close()


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_a_file_is_read_in_bounded_pieces(tmp_path: Path, size_bytes: int) -> None:
    path, content = tmp_path / "log", os.urandom(size_bytes)
    path.write_bytes(content)
    pieces = list(chunks(path))
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)
