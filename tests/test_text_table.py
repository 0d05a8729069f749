"""Tables for terminals: columns as wide as what is in them, and no blanks at the end of a line."""

from ternbus.broker.text_table import text_table


def test_columns_are_aligned_and_as_wide_as_their_widest_cell() -> None:
    rows = [("pi", 5, "idle"), ("a-device-with-a-name", 12_345, None)]
    assert text_table({"device": "<", "updates": ">", "state": "<"}, rows) == [
        "device                updates  state",
        "pi                          5  idle",
        "a-device-with-a-name    12345",
    ]


def test_a_table_without_rows_is_its_headings() -> None:
    assert text_table({"device": "<", "updates": ">"}, []) == ["device  updates"]
