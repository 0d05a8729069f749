"""A federation in virtual time: the same cores, real training, a network in memory."""
