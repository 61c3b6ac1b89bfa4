"""How the server combines what sites send, and what it refuses: strategies by name."""

from dafne_federated.strategies.aggregation import Strategy
from dafne_federated.strategies.alternating import alternating
from dafne_federated.strategies.factors import factors
from dafne_federated.strategies.fedavg import fedavg
from dafne_federated.strategies.frozen_a import frozen_a
from dafne_federated.strategies.global_local import global_local
from dafne_federated.strategies.product import product
from dafne_federated.strategies.shared_a import shared_a
from dafne_federated.strategies.stack import stack

STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg,
    "factors": factors,
    "frozen-a": frozen_a,
    "alternating": alternating,
    "product": product,
    "stack": stack,
    "shared-a": shared_a,
    "global+local": global_local,
}
