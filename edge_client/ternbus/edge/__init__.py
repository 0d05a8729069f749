"""The device: follows the model, trains on its own data, compresses, and keeps what has no answer yet."""
