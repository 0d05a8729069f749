"""What shows a federation to others than its operator's terminal: metrics for Prometheus."""
