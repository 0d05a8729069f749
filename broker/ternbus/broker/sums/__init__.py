"""Private sums: what devices, helpers and the aggregator compute and exchange (docs/protocol.md, section 16)."""
