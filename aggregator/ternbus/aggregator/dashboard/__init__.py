"""The dashboard: a process beside a running aggregator that shows it to browsers, and acts as its commands do."""
