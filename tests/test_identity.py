"""Names, keys and the files that keep them, sealed boxes, and the proof that joins a device."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.identity import (
    Identity,
    check_device,
    check_federation,
    enroll_proof,
    key_id,
    read_secret,
    seal,
    verify,
    write_secret,
)

PI = Identity(bytes(range(32)))


@pytest.mark.parametrize("name", ["a", "0", "lab-2", "a" * 32, "aggregator"])
def test_names_of_federations(name: str) -> None:
    assert check_federation(name) == name


@pytest.mark.parametrize("name", ["", "-lab", "Lab", "lab_2", "a" * 33, "läb", "lab\n", "a b", "a/b", "+"])
def test_names_that_are_no_federation_s(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a federation"):
        check_federation(name)


@pytest.mark.parametrize("name", ["a", "0", "pi-01_b", "a" * 64, "my-aggregator"])
def test_names_of_devices(name: str) -> None:
    assert check_device(name) == name


@pytest.mark.parametrize(
    "name", ["", "_a", "-a", "PI", "a" * 65, "aggregator", "aggregator-lab", "aggregators", "a.b", "pi\n", "a/b", "#"]
)
def test_names_that_are_no_device_s(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a device"):
        check_device(name)


def test_a_key_never_shows() -> None:
    assert PI.seed.hex() not in repr(PI)
    assert repr(PI.seed) not in repr(PI)
    assert key_id(PI.public) == PI.key_id
    assert len(PI.key_id) == 8
    assert Identity.generate() != Identity.generate()


@given(st.binary(max_size=100), st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_a_signature_is_of_one_message(one: bytes, other: bytes) -> None:
    signature = PI.sign(one)
    verify(PI.public, one, signature)
    if one != other:
        with pytest.raises(ProtocolError, match="bad-signature"):
            verify(PI.public, other, signature)


@given(st.binary(max_size=100), st.binary(max_size=40), st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_anything_else_as_a_signature_or_key_is_refused(signature: bytes, public: bytes, message: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad-signature"):
        verify(PI.public, message, signature)
    with pytest.raises(ProtocolError, match="bad-signature"):
        verify(public, message, PI.sign(message))


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_a_sealed_box_opens_for_its_owner_only(plain: bytes) -> None:
    box = seal(PI.public, plain)
    assert PI.unseal(box) == plain
    with pytest.raises(ProtocolError, match="bad-seal"):
        Identity(bytes(32)).unseal(box)
    with pytest.raises(ProtocolError, match="bad-seal"):
        PI.unseal(plain)
    with pytest.raises(ProtocolError, match="bad-seal"):
        PI.unseal(box[:-1])


def test_a_proof_binds_code_federation_device_and_key() -> None:
    proofs = {
        enroll_proof(code, federation, device, public)
        for code in ("one", "two")
        for federation in ("lab", "b")
        for device in ("pi", "pi2")
        for public in (PI.public, bytes(32))
    }
    assert len(proofs) == 16


def test_a_key_file_is_kept_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "key"
    PI.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path) == PI
    PI.save(path)  # again, whole or not at all
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(path)


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"zz" * 32, b"\xff\xfe"])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    write_secret(path, content)
    with pytest.raises(ConfigError, match="is not a key file"):
        Identity.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret(tmp_path / "none")


def test_a_write_that_was_cut_short_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "key"
    os.close(os.open(tmp_path / "key.partial", os.O_CREAT | os.O_WRONLY, 0o644))
    write_secret(path, b"secret")
    assert read_secret(path) == b"secret"
