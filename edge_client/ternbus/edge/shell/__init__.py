"""What runs a device: process, folder, store, threads and the command line."""
