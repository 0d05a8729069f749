"""Training with PyTorch; with the tasks the only place that imports torch."""
