"""Experiments: grids of scenarios, run in virtual time, as a table, a plot and JSON."""
