"""Brokers to run: mosquitto and nats-server, their configuration, certificates and access control."""
