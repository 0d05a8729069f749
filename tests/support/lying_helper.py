"""A helper's process that lies while the file LIES is in its folder: it takes no mask out of the sums that it opens."""

import sys
from pathlib import Path

from ternbus.broker.sums.words import Words
from ternbus.command import main
from ternbus.helper.core.ask_check import CheckedAsk

LIES = "lies"


def run(folder: Path) -> None:
    honest = CheckedAsk.sum_of_masks

    def sum_of_masks(self: CheckedAsk, helper: bytes) -> Words:
        return self.layout.zeros() if (folder / LIES).exists() else honest(self, helper)

    CheckedAsk.sum_of_masks = sum_of_masks  # type: ignore[method-assign]
    main(["helper", "run", str(folder)])


if __name__ == "__main__":
    run(Path(sys.argv[1]))
