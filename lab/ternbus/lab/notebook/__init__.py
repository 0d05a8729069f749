"""Federations on arrays, from Python: the simulation of `lab.virtual` with data, callbacks and results in memory."""
