"""The version of Ternbus, read from the metadata of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def software() -> str:
    """What peers are told of this program, such as "ternbus 0.1.0"; no number where Ternbus is not installed."""
    try:
        return f"ternbus {version('ternbus')}"
    except PackageNotFoundError:
        return "ternbus"
