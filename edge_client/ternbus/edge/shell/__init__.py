"""The I/O of a device: process, directory, SQLite store, training thread and command line."""
