"""The server: it accepts signed updates, merges them under a staleness bound, and publishes the model."""
