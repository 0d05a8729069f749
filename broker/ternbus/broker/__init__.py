"""The bus: what a message is, how it is signed, packed, cut and carried, and brokers to run."""
