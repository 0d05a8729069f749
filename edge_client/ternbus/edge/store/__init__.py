"""The device's store: the outbox, one SQLite file. The device's SQL is only here."""
