"""The kinds of a model's tensors that a merge treats apart: statistics, and tensors without negative elements.

Statistics, such as batch norm's mean and variance, are measured on data and not trained. They are averaged; no server
optimizer moves them. Of a non-negative tensor, such as a variance, no published element is below 0. The kinds are no
part of the wire format: a model file states them in its metadata, and the aggregator keeps them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, Final, Self

import numpy.typing as npt

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import DENSE_NAMES

STATISTICS: Final = DENSE_NAMES
NONNEGATIVE: Final = ("*running_var",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKinds:
    """Names of tensors by kind; a tensor may be of both."""

    statistics: frozenset[str] = frozenset()
    nonnegative: frozenset[str] = frozenset()

    @classmethod
    def by_name(cls, names: Iterable[str]) -> Self:
        """The kinds that torch's names tell, for models whose file states none."""
        known = list(names)
        return cls(statistics=matching(known, STATISTICS), nonnegative=matching(known, NONNEGATIVE))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], names: Iterable[str], source: str) -> Self:
        """The kinds in a model file's metadata; by name if it states none. ConfigError if they do not fit ``names``."""
        known = set(names)
        if not metadata.keys() & {"statistics", "nonnegative"}:
            return cls.by_name(known)
        stated = {kind: _listed(metadata.get(kind, "[]"), kind, source) for kind in ("statistics", "nonnegative")}
        for kind, found in stated.items():
            if strange := sorted(found - known):
                raise ConfigError(
                    f"{source}: its metadata {kind!r} names {strange[0][:100]!r}, which is no tensor of the model; "
                    "write the file again with `ternbus edge init-model`"
                )
        return cls(**stated)

    @classmethod
    def loads(cls, text: str) -> Self:
        """What ``dumps`` made."""
        return cls(**{kind: frozenset(names) for kind, names in json.loads(text).items()})

    def dumps(self) -> str:
        """One line of JSON; the same kinds give the same text."""
        return json.dumps({"statistics": sorted(self.statistics), "nonnegative": sorted(self.nonnegative)})

    def metadata(self) -> dict[str, str]:
        """The kinds as a model file states them: each a JSON array of names."""
        return {kind: json.dumps(names) for kind, names in json.loads(self.dumps()).items()}

    @property
    def dense(self) -> list[str]:
        """Patterns of the tensors that must not travel as trits: steps of one size would pass 0."""
        return [escape(name) for name in sorted(self.nonnegative)]

    def check(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """ConfigError if a tensor that is never negative has a negative element."""
        for name in sorted(self.nonnegative & tensors.keys()):
            if (tensors[name] < 0).any():
                raise ConfigError(
                    f"the model's {name} has a negative element, and is one that never has (as a variance): make the "
                    "initial model anew"
                )

    def __or__(self, other: Self) -> Self:
        return type(self)(
            statistics=self.statistics | other.statistics, nonnegative=self.nonnegative | other.nonnegative
        )


def version_metadata(version: int, digest: bytes) -> dict[str, str]:
    """What a model file states of the published version in it."""
    return {"version": str(version), "digest": digest.hex()}


def matching(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    """The names that a glob pattern matches, in upper and lower case as written."""
    wanted = tuple(patterns)
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted))


def _listed(text: str, kind: str, source: str) -> frozenset[str]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{source}: its metadata {kind!r} is no JSON array of names; write the file again")
    return frozenset(found)
