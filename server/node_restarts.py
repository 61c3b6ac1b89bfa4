"""Which nodes were started again after they were asked something, and so have forgotten it.

Flower's SuperNode keeps what it fetched in memory alone, and its SuperLink counts a fetched
message as delivered: when the program of a site ends in between, nobody hears of it. But the
SuperLink notes when a node last came online.
"""

from collections.abc import Collection

from flwr.serverapp import Grid

LOOK = 5.0  # seconds between two looks


class NodeRestarts:
    """When nodes came online.

    Args:
        grid: Flower's connection to the sites.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._known: dict[int, str] = {}

    def asked(self, nodes: Collection[int]) -> None:
        """Note that nodes are asked something now."""
        online = self._online()
        self._known |= {node: online.get(node, "") for node in nodes}

    def since(self, nodes: Collection[int]) -> set[int]:
        """Return those of these nodes that came online since they were asked last."""
        online = self._online()
        return {n for n in nodes if n in online and online[n] != self._known.get(n, online[n])}

    def online(self, nodes: Collection[int]) -> set[int]:
        """Return those of these nodes that are online."""
        return set(nodes) & self._online().keys()

    def _online(self) -> dict[int, str]:
        return {n.node_id: getattr(n, "last_activated_at", "") for n in self._grid.get_nodes()}
