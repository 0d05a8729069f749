"""The grammar of `--partition`: which part of the training data a device has."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from ternbus.broker.errors import ConfigError

LARGEST_SHARE = 0.4  # the held-out part must be smaller than the rest
LARGEST_ALPHA = 1e6  # parts are equal long before; much larger values overflow

Kind = Literal["all", "iid", "dirichlet", "quantity", "shards", "natural", "by"]

DEVICE_FORMS: Final[dict[Kind, str]] = {
    "all": "all",
    "iid": "iid:I/N",
    "dirichlet": "dirichlet:ALPHA:I/N:SEED",
    "quantity": "quantity:ALPHA:I/N:SEED",
    "shards": "shards:K:I/N:SEED",
    "natural": "natural:I",
    "by": "by:COLUMN:I",
}

_HALVES = re.compile(r"([^;]+);(train|test):([0-9.eE+-]{1,20})")
_NATURAL = re.compile(r"natural:(\d{1,9})")
_BY = re.compile(r"by:([^;\x00-\x1f\x7f]{1,200}):(\d{1,9})")
_IID = re.compile(r"iid:(\d{1,9})/(\d{1,9})")
_SHARDS = re.compile(r"shards:(\d{1,9}):(\d{1,9})/(\d{1,9}):(\d{1,9})")
_SKEWED = re.compile(r"(dirichlet|quantity):([0-9.eE+-]{1,20}):(\d{1,9})/(\d{1,9}):(\d{1,9})")


def listed(forms: Sequence[str]) -> str:
    """As in "a, b or c"."""
    return " or ".join([", ".join(forms[:-1]), forms[-1]] if len(forms) > 1 else forms)


FORMS = listed([*DEVICE_FORMS.values()])


class PartitionError(ConfigError):
    """A part that these data do not have. `problem` says why, and `kinds` which kinds of partition they do have.

    The text is for the owner of a device. The lab says the same in the words of a scenario.
    """

    def __init__(self, spec: str, problem: str, kinds: Sequence[Kind] = ()) -> None:
        self.problem = problem
        self.kinds = tuple(kinds)
        advice = f": write {listed([DEVICE_FORMS[kind] for kind in kinds])}" if kinds else ""
        super().__init__(f"--partition {spec}: {problem}{advice}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A parsed specification: part `index` of `parts`, of a kind of partition and its arguments.

    The number of parts of `natural` and `by` depends on the data, and `parts` is 0. `share` of the part is held out;
    `half` is "test" for the held-out samples, "train" for the others, and "" for all.
    """

    spec: str  # without a half
    kind: Kind = "all"
    index: int = 0
    parts: int = 1
    alpha: float = math.inf
    shards: int = 0
    column: str = ""
    seed: int = 0
    half: Literal["", "train", "test"] = ""
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.parts and not 0 <= self.index < self.parts:
            raise self._error(f"the parts are numbered 0 to {self.parts - 1}: choose one of them")
        if self.kind in ("iid", "dirichlet", "quantity", "shards") and not self.parts:
            raise self._error("the number of parts is 0: it must be at least 1")
        if not (0 < self.alpha <= LARGEST_ALPHA or math.isinf(self.alpha)):
            raise self._error(f"alpha is {self.alpha:g}: it must be above 0 and at most {LARGEST_ALPHA:g}")
        if self.kind == "shards" and not self.shards:
            raise self._error("the number of shards of a device is 0: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise self._error(f"the seed is {self.seed}: it must be from 0 to {2**32 - 1}")
        if self.half and not 0 < self.share <= LARGEST_SHARE:
            raise ConfigError(
                f"the held-out share of the data is {self.share:g}: it must be above 0 and at most {LARGEST_SHARE}"
            )

    def _error(self, problem: str) -> PartitionError:
        return PartitionError(self.spec, problem)

    @property
    def needs_labels(self) -> bool:
        """Whether the part depends on the targets."""
        return self.kind in ("dirichlet", "shards") or bool(self.half)

    @property
    def whole_data(self) -> "Partition":
        """The same for all parts of the data."""
        return replace(self, spec="", index=0, half="", share=0.0)

    @classmethod
    def parse(cls, spec: str) -> "Partition":
        """Parse a specification. Raises `ConfigError`, with the valid forms."""
        if found := _HALVES.fullmatch(spec):
            half: Literal["train", "test"] = "test" if found[2] == "test" else "train"
            return replace(cls.parse(found[1]), half=half, share=_number(found[3], spec))
        if spec == "all":
            return cls(spec=spec)
        if found := _NATURAL.fullmatch(spec):
            return cls(spec=spec, kind="natural", index=int(found[1]), parts=0)
        if found := _BY.fullmatch(spec):
            return cls(spec=spec, kind="by", column=found[1], index=int(found[2]), parts=0)
        if found := _IID.fullmatch(spec):
            return cls(spec=spec, kind="iid", index=int(found[1]), parts=int(found[2]))
        if found := _SHARDS.fullmatch(spec):
            shards, index, parts, seed = map(int, found.groups())
            return cls(spec=spec, kind="shards", shards=shards, index=index, parts=parts, seed=seed)
        if found := _SKEWED.fullmatch(spec):
            kind: Kind = "dirichlet" if found[1] == "dirichlet" else "quantity"
            index, parts, seed = map(int, found.groups()[2:])
            return cls(spec=spec, kind=kind, alpha=_number(found[2], spec), index=index, parts=parts, seed=seed)
        raise ConfigError(f"invalid partition {spec!r}: write {FORMS}; I is from 0")


def _number(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PartitionError(spec, f"{text!r} is not a number: write for example 0.5") from None
