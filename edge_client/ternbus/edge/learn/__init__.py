"""Local training without a framework: the Task and Trainer protocols, partitions, TernGrad, noise, accounting."""
