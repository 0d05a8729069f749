"""Names, keys, signatures, sealed boxes, and the proof that joins a device."""

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
    seal,
    verify,
)

PI = Identity(bytes(range(32)))


@pytest.mark.parametrize("name", ["a", "0", "lab-2", "a" * 32, "aggregator"])
def test_names_of_federations(name: str) -> None:
    assert check_federation(name) == name


@pytest.mark.parametrize("name", ["", "-lab", "Lab", "lab_2", "a" * 33, "läb", "lab\n", "a b", "a/b", "+"])
def test_names_that_are_no_federation_s(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid federation name"):
        check_federation(name)


@pytest.mark.parametrize("name", ["a", "0", "pi-01_b", "a" * 64, "my-aggregator"])
def test_names_of_devices(name: str) -> None:
    assert check_device(name) == name


@pytest.mark.parametrize(
    "name", ["", "_a", "-a", "PI", "a" * 65, "aggregator", "aggregator-lab", "aggregators", "a.b", "pi\n", "a/b", "#"]
)
def test_names_that_are_no_device_s(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid device name"):
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
