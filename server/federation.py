"""What stays the same in all rounds that one process runs."""

from dataclasses import dataclass

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State
from dafne_federated.server.continuation import Continuation
from dafne_federated.server.membership import Members


@dataclass(frozen=True)
class Federation:
    """A run and the sites that take part in it.

    Attributes:
        folder: Where everything is kept.
        info: What the run was started with.
        plan: What is trained.
        members: The sites.
        joined: The first round after they joined.
        first: The state that the run started from.
        continued: What it takes over from earlier versions, if it is one.
        classes: Counts of the classes at all sites, where they pooled them.
    """

    folder: RunFolder
    info: RunInfo
    plan: AdaptationPlan
    members: Members
    joined: int
    first: State
    classes: ClassCounts | None = None
    continued: Continuation | None = None

    @property
    def from_release(self) -> bool:
        """Whether ``first`` is an earlier release; else it changes nothing."""
        return self.continued is not None and self.continued.from_release

    @property
    def settings(self) -> RunSettings:
        """The settings of the run."""
        return self.info.settings
