"""What a plan says: its keys and bounds, schedules, differential privacy as values."""
