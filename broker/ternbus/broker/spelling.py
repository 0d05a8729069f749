"""What a misspelt name may have meant."""

from collections.abc import Iterable, Mapping

from ternbus.broker.errors import ConfigError


def meant(name: str, known: Iterable[str]) -> str:
    """As in " (do you mean patience?)"; empty if no known name is close."""
    import difflib  # noqa: PLC0415 - for an error only: a device that runs has no memory for it

    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (do you mean {close[0]}?)" if close else ""


def refuse_unknown(given: Mapping[str, object], known: Iterable[str], what: str) -> None:
    """Raise `ConfigError` for the first name that is unknown. ``what`` has it, as in "simulate() has no argument"."""
    names = list(known)
    for name in given:
        if name not in names:
            raise ConfigError(f"{what} {name!r}{meant(name, names)}: there are {', '.join(names)}")
