"""The process of a helper: its directory, its event loop, and `ternbus helper`."""
