"""Private sums at the aggregator: its helpers, the terms of updates, and the contexts that updates have."""
