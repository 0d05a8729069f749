"""The values that labels of metrics may have: no peer can make a new one, whatever it sends."""

from typing import Final

OTHER: Final = "other"  # for whatever is in none of these, as of a ledger that a later version wrote

# Of `health.Finding.kind`.
FINDINGS: Final = (
    "all-stale", "broker-disk", "broker-refuses", "broker-silent", "canary-silent", "certificate", "cloned",
    "disconnected", "disk", "diverging", "dropped", "evaluator", "failing", "held", "helpers", "hung", "newer-version",
    "nobody", "not-running", "offline", "refused", "silent", "stale", "stalled", "withdrawn",
)  # fmt: skip

# Publications of the aggregator that the broker lost, refused or took too slowly.
LOST: Final = ("broker-dropped", "broker-refused", "unacknowledged")

# Why a message or an update is refused: reasons of a ProtocolError, and those that the core counts by itself.
REFUSED: Final = (
    "bad-answer", "bad-ask", "bad-body", "bad-box", "bad-boxes", "bad-card", "bad-ciphertext", "bad-codec",
    "bad-digest", "bad-element", "bad-encoding", "bad-entry", "bad-header", "bad-key", "bad-length", "bad-log",
    "bad-meta", "bad-min", "bad-plan", "bad-private", "bad-request", "bad-revocations", "bad-scale", "bad-schema",
    "bad-seal", "bad-seq", "bad-signature", "bad-statistics", "bad-sum", "bad-terms", "bad-trits", "bad-vector",
    "bad-words", "bad-zstd", "base-in-future", "closed", "evaluator", "header-too-long", "helper-behind",
    "not-a-frame", "not-asked", "not-evaluator", "not-granted", "not-in-group", "not-private", "old-candidate",
    "old-card", "old-session", "old-update", "private-only", "qos-0", "refused-enroll", "replaced-key",
    "replayed-metrics", "revoked-key", "short-part", "sum-out-of-range", "too-fast", "too-large", "too-long",
    "too-many-enrolments", "too-many-metrics", "too-many-receipts", "too-much-work", "unfinished", "unknown-device",
    "unknown-helper", "unknown-key", "unknown-topic", "wrong-context", "wrong-federation", "wrong-sender",
    "wrong-topic",
)  # fmt: skip
