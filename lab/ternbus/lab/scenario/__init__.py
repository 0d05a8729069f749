"""Scenarios of lab runs: devices, speeds, partition, faults and end."""
