"""A device written from docs/protocol.md alone, without any of Ternbus' code: the proof that the document is enough."""
