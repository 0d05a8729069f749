"""The protocol without I/O: frames, messages, signatures, blocks, the log of merges, invitations."""
