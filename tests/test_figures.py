"""README's figures are those of the runs whose results lie in ``benchmarks/results``."""

from benchmarks.figures import BEGIN, END, README, section


def test_what_readme_says_is_what_was_measured() -> None:
    shown = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == section(), "run: python -m benchmarks.figures --write"
