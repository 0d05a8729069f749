"""Training with PyTorch. Only this room and the tasks import torch."""
