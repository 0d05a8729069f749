"""The I/O of an aggregator: process, threads, directory and command line."""
