"""A folder without a ledger: one that never held an aggregator, or one whose ledger is lost."""

from pathlib import Path
from typing import Final

from ternbus.aggregator.store.remedy import restore_backup
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.path_errors import quoted

KEY: Final = "aggregator.key"
TOML: Final = "aggregator.toml"
PARTIAL: Final = ".partial"  # of an aggregator whose making goes on, or was cut short


def is_lost(path: Path) -> bool:
    """Whether an aggregator's key or settings are there, but its ledger ``path`` is not."""
    folder = path.parent
    if path.exists() or (folder / PARTIAL).is_dir():
        return False
    return any((folder / name).exists() for name in (KEY, TOML))


def missing(path: Path) -> ConfigError | CorruptError:
    """What to raise where there is no ledger ``path``; a new one beside an old key would give its numbers again."""
    shown = quoted(path.parent)
    if is_lost(path):
        return CorruptError(f"{path} is missing: {restore_backup(path.parent)}")
    return ConfigError(f"{path.parent} holds no aggregator; make one with: ternbus aggregator init {shown} …")
