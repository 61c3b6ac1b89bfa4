"""Training of an adapted network by its suffix alone, where that is possible."""

import logging

from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.errors import AdapterError
from dafne_federated.core.loss_parts import Loss
from dafne_federated.core.methods import frozen_share, worth_keeping
from dafne_federated.core.network_layers import Precision, describe_layers
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.suffix_network import SuffixNetwork
from dafne_federated.core.training import (
    AdapterTraining,
    Batches,
    OnEpoch,
    Trainable,
    TrainingResult,
)

log = logging.getLogger(__name__)


class SuffixTraining:
    """Trains the same variables as ``AdapterTraining``, to the same values, in less time.

    With a cache that has room, only the suffix runs, on features from disk. Else all of the
    network runs, with its frozen normalisations folded. What was compiled is kept.

    Args:
        adapted: The network with its plan.
        loss: The loss of the base's own training function.
        precision: See ``SuffixNetwork``; a network that has no suffix trains in float32.
        proximal: See ``AdapterTraining``.
    """

    def __init__(
        self,
        adapted: AdaptedNetwork,
        loss: Loss,
        precision: Precision = "float32",
        proximal: float = 0.0,
    ) -> None:
        self.adapted = adapted
        self.loss = loss
        self._proximal = proximal
        self._precision = precision
        self._suffix: SuffixNetwork | None = None
        self._networks: dict[bool, Trainable] = {}
        self._compiled: dict[bool, AdapterTraining] = {}
        layers = describe_layers(adapted.network)
        self._worth_keeping = worth_keeping(frozen_share(layers, adapted.plan.targets))
        self._cut_off()

    @property
    def apart(self) -> bool:
        """Whether what is compiled is beside the adapted network, and not the network itself."""
        return self._suffix is not None

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
        training, batches = self.on(slices, cache)
        return training.run(batches, epochs, batch_size, learning_rate, seed, on_epoch)

    def on(
        self, slices: PreparedSlices, cache: PrefixCache | None = None
    ) -> tuple[AdapterTraining, Batches]:
        """Return what trains on ``slices``, and the slices as it takes them.

        Args:
            slices: Slices; those to train on and others.
            cache: Where features are kept, if they may be.

        Returns:
            The training, and a ``CachedSlices`` if features are kept, else ``slices``.
        """
        network, batches = self.network(slices, cache)
        cached = batches is not slices
        if cached not in self._compiled:
            self._compiled[cached] = AdapterTraining(network, self.loss, self._proximal)
        return self._compiled[cached], batches

    def network(
        self, slices: PreparedSlices, cache: PrefixCache | None = None
    ) -> tuple[Trainable, Batches]:
        """Return the network or suffix that is to be trained, and what it is trained on.

        See ``on``; the network is the same object for as long as its suffix is up to date.
        """
        if self._suffix and self._suffix.statistics != self.adapted.statistics:
            self._cut_off()
        cached = None
        if cache and self._suffix and self._suffix.saved and self._worth_keeping:
            cached = cache.slices(self._suffix, slices)
        return self._network(cached is not None), slices if cached is None else cached

    def _cut_off(self) -> None:
        """Cut the suffix off with the statistics that are stored in the network now."""
        self._networks.clear()
        self._compiled.clear()
        try:
            self._suffix = SuffixNetwork(self.adapted, precision=self._precision)
        except AdapterError as error:
            log.info("training the network as it is: %s", error)

    def _network(self, cached: bool) -> Trainable:
        if cached not in self._networks:
            network: Trainable = self.adapted
            if self._suffix:
                network = self._suffix
                if not cached:
                    network = SuffixNetwork(self.adapted, saved=False, precision=self._precision)
            self._networks[cached] = network
        return self._networks[cached]
