"""The progress display of a run, and its report, plot and output folder."""
