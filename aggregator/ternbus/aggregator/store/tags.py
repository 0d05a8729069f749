"""Tags, the operator's names for versions. A tag keeps the model of its version, in a file beside the ledger."""

import json
import re
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
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A version that has a name; ``digest`` is that of its vector, in hex."""

    version: int
    digest: str
    at: float  # Unix seconds


def read(ledger: Ledger) -> dict[str, Tag]:
    """All tags by name."""
    return {name: Tag(**row) for name, row in json.loads(ledger.fact(FACT) or "{}").items()}


def path(directory: Path, name: str) -> Path:
    """The file with a tag's model."""
    return directory / FOLDER / f"{name}.safetensors"


def put(ledger: Ledger, name: str, version: int, now: float) -> Tag:
    """Give a kept version a name; ConfigError for a name that is none or is taken, or a version that is not kept."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"invalid tag {name!r}: use a-z, 0-9, '.', '_' and '-', at most 64 characters")
    if (known := read(ledger).get(name)) is not None and known.version != version:
        raise ConfigError(f"{name} is version {known.version} already: remove it first, or choose another name")
    vector = vector_of(ledger, version)
    tag = Tag(version=version, digest=vector_digest(vector).hex(), at=now)
    file = path(ledger.path.parent, name)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    metadata = ledger.kinds().metadata() | version_metadata(version, bytes.fromhex(tag.digest))
    save_safetensors(file, to_tensors(ledger.schema(), vector), metadata)
    with ledger.transaction():
        _write(ledger, {**read(ledger), name: tag})
    return tag


def remove(ledger: Ledger, name: str) -> None:
    """Take a name away, and its file; ConfigError where there is none."""
    with ledger.transaction():
        found = read(ledger)
        if found.pop(name, None) is None:
            raise ConfigError(f"there is no tag {name!r}; see `ternbus aggregator versions`")
        _write(ledger, found)
    path(ledger.path.parent, name).unlink(missing_ok=True)


def _write(ledger: Ledger, found: dict[str, Tag]) -> None:
    content = json.dumps({name: asdict(tag) for name, tag in found.items()})
    checksums.insert(ledger.db, "facts", (FACT, content), replace=True)


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
