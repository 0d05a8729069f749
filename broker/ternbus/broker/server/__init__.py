"""mosquitto and nats-server as child processes: configuration, certificates, access control, counts of refusals."""
