"""The card files of helpers, from which a federation with private sums is created."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import load_toml
from ternbus.broker.protocol.identity import check_helper, is_public_key
from ternbus.broker.sums.terms import MASK

KEYS: Final = ("name", "federation", "key")
ADVICE: Final = "give the card.toml that `ternbus helper init` has written"


def settings_of(paths: Sequence[Path], federation: str, kind: str = MASK) -> dict[str, object]:
    """The settings of private sums with these helpers, with dotted keys; ConfigError for a file that is no card.

    All helpers must open sums of this ``kind``.
    """
    helpers: dict[str, str] = {}
    for path in paths:
        name, key = read(path, federation)
        if (found := load_toml(path).get("kind", MASK)) != kind:
            raise ConfigError(f"{path} is of a helper of kind {found}: give --private-kind {found}, or another card")
        if name in helpers:
            raise ConfigError(f"{path}: two helpers have the name {name}; make one of them anew with --name")
        helpers[name] = key
    return {"private.helpers": helpers} | ({"private.kind": kind} if kind != MASK else {})


def read(path: Path, federation: str) -> tuple[str, str]:
    """Name and public key in a helper's card; ConfigError for another federation's, or for another file."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: {ADVICE}")
    table = load_toml(path)
    for name in KEYS:
        if not isinstance(table.get(name), str):
            raise ConfigError(f"{path} lacks the text {name!r}: {ADVICE}")
    if table["federation"] != federation:
        raise ConfigError(
            f"{path} is the card of a helper of federation {table['federation']!r}, not {federation!r}: {ADVICE}"
        )
    if not is_public_key(table["key"]):
        raise ConfigError(f"{path}: 'key' is not a public key of 64 hex digits: {ADVICE}")
    return check_helper(table["name"]), table["key"].lower()
