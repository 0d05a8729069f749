"""Private sums at the aggregator, without I/O: which updates become a set, and what the sum of a set says."""
