"""Training of an adapted network by its suffix alone, where that is possible."""

import logging

from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.errors import AdapterError
from dafne_federated.core.loss_parts import Loss
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.suffix_network import SuffixNetwork
from dafne_federated.core.training import AdapterTraining, OnEpoch, TrainingResult

log = logging.getLogger(__name__)


class SuffixTraining:
    """Trains the same variables as ``AdapterTraining``, to the same values, in less time.

    With a cache that has room, only the suffix runs, on features from disk. Else all of the
    network runs, with its frozen normalisations folded. What was compiled is kept.

    Args:
        adapted: The network with its plan.
        loss: The loss of the base's own training function.
    """

    def __init__(self, adapted: AdaptedNetwork, loss: Loss) -> None:
        self.adapted = adapted
        self._loss = loss
        self._suffix: SuffixNetwork | None = None
        self._compiled: dict[bool, AdapterTraining] = {}
        self._cut_off()

    def run(
        self,
        slices: PreparedSlices,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        on_epoch: OnEpoch | None = None,
        cache: PrefixCache | None = None,
    ) -> TrainingResult:
        """Train from the state that is written in the network, with a fresh optimiser.

        Args:
            slices: Training slices.
            epochs: Passes over them.
            batch_size: Slices in a step.
            learning_rate: Of Adam.
            seed: Order of the slices; the same seed gives the same bits.
            on_epoch: Called with the epoch, 1 first, and its loss.
            cache: Where features are kept, if they may be.
        """
        if self._suffix and self._suffix.statistics != self.adapted.statistics:
            self._cut_off()
        cached = None
        if cache and self._suffix and self._suffix.saved:
            cached = cache.slices(self._suffix, slices)
        training = self._training(cached is not None)
        return training.run(cached or slices, epochs, batch_size, learning_rate, seed, on_epoch)

    def _cut_off(self) -> None:
        """Cut the suffix off with the statistics that are stored in the network now."""
        self._compiled.clear()
        try:
            self._suffix = SuffixNetwork(self.adapted)
        except AdapterError as error:
            log.info("training the network as it is: %s", error)

    def _training(self, cached: bool) -> AdapterTraining:
        if cached not in self._compiled:
            network: AdaptedNetwork | SuffixNetwork = self.adapted
            if self._suffix:
                network = self._suffix if cached else SuffixNetwork(self.adapted, saved=False)
            self._compiled[cached] = AdapterTraining(network, self._loss)
        return self._compiled[cached]
