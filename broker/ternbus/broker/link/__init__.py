"""The MQTT client: a persistent session with a broker, whose events are delivered as values."""
