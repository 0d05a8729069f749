"""What the exit code of a Ternbus command says. The units in deploy/systemd know 2 and 4, which no restart mends."""

from typing import Final

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1  # no broker, a full disk, a timeout, a check that found faults, stopped with work unfinished
EXIT_CONFIG: Final = 2  # the operator's to mend; as for a wrong option
EXIT_REFUSED: Final = 3  # a device: the aggregator has revoked or refused it
EXIT_BUDGET: Final = 4  # a device: its privacy budget is spent
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
