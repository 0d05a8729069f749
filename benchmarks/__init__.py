"""Figures, each printed by a command that the reader can run: ``python -m benchmarks.NAME [--json]``."""
