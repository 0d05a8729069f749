"""Coverage-guided fuzzing of all parsers of untrusted input: ``python -m fuzz --help``."""
