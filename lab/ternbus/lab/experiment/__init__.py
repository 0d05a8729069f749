"""Experiments: grids of scenarios that run in virtual time, and their tables, plots and goals."""
