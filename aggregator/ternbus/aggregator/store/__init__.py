"""The aggregator's disk: the ledger, update bodies, vectors. SQL is only here."""
