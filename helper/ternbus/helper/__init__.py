"""The helper of private sums: a small process of another party than the aggregator's, which only opens sums."""
