"""The key `partition` of a scenario: the kinds of `edge join --partition`, without the number of a device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.edge.learn.partition_spec import Kind, Partition, PartitionError, listed

AUTO: Final = "auto"  # `UNEQUAL` if the data have classes, else "iid"
UNEQUAL: Final = "dirichlet:0.5"
DEVICES: Final = 8
DEVICES_OF_DATA: Final = -(2**31)  # as many as the data have owners; never written in a scenario
FORMS: Final[dict[Kind, str]] = {
    "all": '"all"',
    "iid": '"iid"',
    "dirichlet": '"dirichlet:ALPHA"',
    "quantity": '"quantity:ALPHA"',
    "shards": '"shards:K"',
    "natural": '"natural"',
    "by": '"by:COLUMN"',
}


def by_label(partition: str) -> bool:
    """Whether the number of parts depends on the data: by owner, or by the values of a column."""
    return partition == "natural" or partition.startswith("by:")


def part_of(partition: str, device: int, devices: int, seed: int) -> str:
    """The device's part of the data, in the form of `edge join --partition`."""
    if partition == "all":
        return partition
    if by_label(partition):
        return f"{partition}:{device}"
    if partition == AUTO:
        partition = UNEQUAL
    part = f"{partition}:{device}/{devices}"
    return part if partition == "iid" else f"{part}:{seed}"


def devices_in_words(devices: int) -> str:
    return "as many devices as the data have owners" if devices == DEVICES_OF_DATA else counted(devices, "device")


def check(partition: str) -> None:
    """Raise `ConfigError` for a partition that is none, in the words of a scenario."""
    with in_scenario_words(partition):
        try:
            Partition.parse(part_of(partition, 0, 1, 0))
        except PartitionError:
            raise
        except ConfigError:
            raise PartitionError(partition, "there is no such partition", [*FORMS]) from None


@contextmanager
def in_scenario_words(partition: str) -> Iterator[None]:
    """Name the scenario's key in place of the option of a device."""
    try:
        yield
    except PartitionError as error:
        raise refusal(partition, error.problem, error.kinds) from error


def refusal(partition: str, problem: str, kinds: Sequence[Kind] = ()) -> ConfigError:
    advice = f": write partition = {listed([FORMS[kind] for kind in kinds])}" if kinds else ""
    return ConfigError(f'partition = "{partition}": {problem}{advice}')
