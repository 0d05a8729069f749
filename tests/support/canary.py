"""Where the aggregator of the canary's federation of processes is killed, in this order."""

KILLED = ("publish-candidate:5", "save:9", "saved:9", "publish-delta:3", "publish-head:4", "publish-candidate:4")
