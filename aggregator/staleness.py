"""What an update is still worth, by how many versions the model moved on while it was being made."""

from typing import Final

DISCOUNTS: Final = ("polynomial", "constant")


def discount(name: str, exponent: float, staleness: int) -> float:
    """s(tau): ``constant`` is 1; ``polynomial`` is (1 + tau)^-a (Xie et al. 2019, FedAsync, section 5.2)."""
    return 1.0 if name == "constant" else float((1 + staleness) ** -exponent)
