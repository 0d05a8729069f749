"""The aggregator as a state machine without I/O."""
