"""How the server combines what sites send, and what it refuses: strategies by name."""

from dafne_federated.strategies.aggregation import Strategy
from dafne_federated.strategies.factors import factors
from dafne_federated.strategies.product import product

STRATEGIES: dict[str, Strategy] = {"factors": factors, "product": product}
