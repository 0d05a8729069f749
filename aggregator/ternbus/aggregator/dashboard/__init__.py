"""An aggregator for others than its operator's terminal: metrics for Prometheus, and the dashboard, a process beside it
that serves a page to browsers and acts as the commands do.
"""
