"""A federation of real processes that are killed, or whose disk fails, compared with one that nothing happened to."""
