"""What several tests share: worlds, peers that lie, brokers, small models."""
