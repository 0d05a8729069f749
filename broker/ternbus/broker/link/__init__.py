"""The MQTT connection: a persistent session with a broker, and what happens to it, as events."""
