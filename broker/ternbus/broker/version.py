"""The version of Ternbus, read from the metadata of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def software() -> str:
    """The name and version for peers, such as "ternbus 0.1.0"; only the name if Ternbus is not installed."""
    try:
        return f"ternbus {version('ternbus')}"
    except PackageNotFoundError:
        return "ternbus"
