"""What an update costs on the wire, as the README says."""

from benchmarks.uplink import measure
from ternbus.broker.protocol.ternary import RAW, ZSTD


def test_a_raw_update_stays_within_its_bound() -> None:
    """1.6 bits a ternary parameter, 4 bytes a dense one, 500 bytes a part."""
    size = measure(RAW)
    assert size.frame_bytes <= size.bound_bytes


def test_zstd_finds_the_zeros() -> None:
    """About 1.25 bits a parameter on a Gaussian update, whose entropy is 1.22 a trit."""
    assert 1.2 < measure(ZSTD).bits_per_parameter < 1.32
