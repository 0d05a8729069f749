"""The testbed: a whole federation on one machine, faults included, and its report."""
