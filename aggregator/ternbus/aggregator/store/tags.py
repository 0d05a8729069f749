"""Versions that are kept for good, each with its model in a file beside the ledger: those that the operator gave a
name, and the best by a metric, which have the name `best-VERSION`.
"""

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.store import checksums
from ternbus.aggregator.store.ledger import Ledger
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.model_files import load_safetensors, save_safetensors
from ternbus.broker.protocol.schema import Vector, to_tensors, to_vector, vector_digest
from ternbus.broker.protocol.tensor_kinds import version_metadata

FOLDER: Final = "tagged"
FACT: Final = "tags"
BEST_FACT: Final = "best"
BEST: Final = "best-"  # before the version, in the name of one that is kept for its metric
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A version that has a name; ``digest`` is that of its vector, in hex."""

    version: int
    digest: str
    at: float  # Unix seconds


def read(ledger: Ledger) -> dict[str, Tag]:
    """All tags by name, also those of the best versions."""
    return {name: tag for fact in (BEST_FACT, FACT) for name, tag in _read_fact(ledger, fact).items()}


def _read_fact(ledger: Ledger, fact: str) -> dict[str, Tag]:
    return {name: Tag(**row) for name, row in json.loads(ledger.fact(fact) or "{}").items()}


def path(directory: Path, name: str) -> Path:
    """The file with a tag's model."""
    return directory / FOLDER / f"{name}.safetensors"


def put(ledger: Ledger, name: str, version: int, now: float) -> Tag:
    """Give a kept version a name; ConfigError for a name that is none or is taken, or a version that is not kept."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"invalid tag {name!r}: use a-z, 0-9, '.', '_' and '-', at most 64 characters")
    if (known := read(ledger).get(name)) is not None and known.version != version:
        raise ConfigError(f"{name} is version {known.version} already: remove it first, or choose another name")
    if name.startswith(BEST):
        raise ConfigError(f"{name}: names with {BEST} are those of versions.keep_best; choose another name")
    tag = _saved(ledger, name, version, now)
    with ledger.transaction():
        _write(ledger, FACT, {**_read_fact(ledger, FACT), name: tag})
    return tag


def keep_best(ledger: Ledger, versions: Collection[int], below: int, now: float) -> None:
    """Have these versions kept and no others for their metric; the caller has begun a transaction.

    Of those that are not kept yet, the versions ``below`` are saved, which are about to go. The file of one that is no
    longer among them is removed by the next call: until the transaction ends, a row names it.
    """
    known = {tag.version: (name, tag) for name, tag in _read_fact(ledger, BEST_FACT).items()}
    named = {path(ledger.path.parent, name) for name, _ in known.values()}
    for file in set((ledger.path.parent / FOLDER).glob(f"{BEST}*.safetensors")) - named:
        file.unlink(missing_ok=True)
    found = dict(known[version] for version in versions if version in known)
    for version in versions:
        if version not in known and version < below:
            found[f"{BEST}{version}"] = _saved(ledger, f"{BEST}{version}", version, now)
    if set(found) != {name for name, _ in known.values()}:
        _write(ledger, BEST_FACT, found)


def _saved(ledger: Ledger, name: str, version: int, now: float) -> Tag:
    """The tag of a version that is still kept, whose model is written."""
    vector = vector_of(ledger, version)
    tag = Tag(version=version, digest=vector_digest(vector).hex(), at=now)
    file = path(ledger.path.parent, name)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    metadata = ledger.kinds().metadata() | version_metadata(version, bytes.fromhex(tag.digest))
    save_safetensors(file, to_tensors(ledger.schema(), vector), metadata)
    return tag


def remove(ledger: Ledger, name: str) -> None:
    """Take a name away, and its file; ConfigError where there is none."""
    with ledger.transaction():
        found = _read_fact(ledger, FACT)
        if found.pop(name, None) is None:
            if name in _read_fact(ledger, BEST_FACT):
                raise ConfigError(f"{name} is kept for its metric: lower versions.keep_best in aggregator.toml")
            raise ConfigError(f"there is no tag {name!r}; see `ternbus aggregator versions`")
        _write(ledger, FACT, found)
    path(ledger.path.parent, name).unlink(missing_ok=True)


def _write(ledger: Ledger, fact: str, found: dict[str, Tag]) -> None:
    content = json.dumps({name: asdict(tag) for name, tag in found.items()})
    checksums.insert(ledger.db, "facts", (fact, content), replace=True)


def vector_of(ledger: Ledger, version: int) -> Vector:
    """The published vector of a version that is still kept, or has a tag; ConfigError says which are."""
    try:
        return ledger.vector(version)
    except ConfigError as error:
        for name, tag in read(ledger).items():
            if tag.version == version:
                return _read(ledger, name, tag)
        names = ", ".join(f"{tag.version} ({name})" for name, tag in read(ledger).items())
        raise ConfigError(f"{error}{f', and {names}' if names else ''}") from error


def _read(ledger: Ledger, name: str, tag: Tag) -> Vector:
    file = path(ledger.path.parent, name)
    vector = to_vector(ledger.schema(), load_safetensors(file))
    if vector_digest(vector).hex() != tag.digest:
        raise CorruptError(f"{file} is not as it was written; restore it from a backup, or remove the tag {name}")
    return vector
