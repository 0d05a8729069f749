"""The server: accepts signed updates, merges them under a staleness bound, republishes the model, never loses one."""
