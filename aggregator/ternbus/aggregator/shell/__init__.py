"""What runs an aggregator: process, threads, directory and the command line."""
