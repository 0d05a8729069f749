"""Placeholder until the branch `metrics` is merged."""

from pathlib import Path


def exposition(directory: Path) -> tuple[bytes, str]:
    """(body, content type)."""
    return b"", "text/plain"
