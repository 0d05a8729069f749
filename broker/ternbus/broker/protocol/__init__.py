"""The protocol without I/O: frames, messages, signatures, ternary blocks, the merge log, invitations."""
