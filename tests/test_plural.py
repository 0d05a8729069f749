"""Numbers with their nouns."""

from ternbus.broker.plural import counted


def test_one_is_singular() -> None:
    assert [counted(count, "update") for count in (0, 1, 2)] == ["0 updates", "1 update", "2 updates"]
    assert [counted(count, "entry") for count in (1, 2)] == ["1 entry", "2 entries"]
    assert counted(2, "day") == "2 days"
