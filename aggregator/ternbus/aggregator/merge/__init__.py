"""The arithmetic of a merge: weights, rules, server optimizers, the downlink's block."""
