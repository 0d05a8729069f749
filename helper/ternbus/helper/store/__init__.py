"""The helper's durable state in one SQLite file."""
