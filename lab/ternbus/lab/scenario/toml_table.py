"""Typed access to the keys of a TOML table, with errors for wrong types and unknown keys."""

from collections.abc import Mapping

from ternbus.broker.errors import ConfigError
from ternbus.broker.spelling import meant


def within(name: str, value: float, least: float, most: float) -> None:
    """Raises `ConfigError` for a value, of the key ``name``, that is not from ``least`` to ``most``."""
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value:g}, but must be from {least:g} to {most:g}")


class Table:
    """One table of a file. Errors contain its `name`, which is "" for the root."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self._values = values
        self._name = name
        self._known: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._values)

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        raise self._wrong(key, value, "a string")

    def texts(self, key: str) -> tuple[str, ...] | None:
        value = self._get(key)
        if value is None or (isinstance(value, list) and all(isinstance(each, str) and each for each in value)):
            return None if value is None else tuple(value)
        raise self._wrong(key, value, "a list of strings")

    def switch(self, key: str) -> bool | None:
        value = self._get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, value, "true or false")

    def whole(self, key: str) -> int | None:
        value = self._get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong(key, value, "a whole number")

    def number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self._wrong(key, value, "a number")

    def table(self, key: str) -> "Table":
        """The subtable; empty if the file has none."""
        value = self._get(key)
        if isinstance(value, Mapping):
            return Table(value, self._path(key))
        if value is None:
            return Table({}, self._path(key))
        raise self._wrong(key, value, f"a table: [{self._path(key)}]")

    def rows(self, key: str) -> list["Table"]:
        """The tables of `[[key]]`."""
        value = self._get(key)
        if value is None:
            return []
        if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            return [Table(row, self._path(key)) for row in value]
        raise self._wrong(key, value, f"a list of tables: [[{self._path(key)}]]")

    def rest(self) -> Mapping[str, object]:
        """All keys and values, for a caller that checks them."""
        return self._values

    def refuse_unknown(self) -> None:
        """Raise `ConfigError` for a key that was not read before."""
        for key in self._values:
            if key not in self._known:
                known = ", ".join(self._known)
                raise ConfigError(f"unknown key {self._path(key)!r}{meant(key, self._known)}; known keys: {known}")

    def _get(self, key: str) -> object:
        self._known.append(key)
        return self._values.get(key)

    def _path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key

    def _wrong(self, key: str, value: object, kind: str) -> ConfigError:
        return ConfigError(f"{self._path(key)} is {value!r}, but must be {kind}")
