"""A simulated federation in virtual time: the cores of real services, real training, a network in memory."""
