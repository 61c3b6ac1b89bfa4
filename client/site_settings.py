"""What a site says about itself and allows: TOML where people write it, JSON in simulations."""

from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dafne_federated.core.errors import SettingsError, first_fault
from dafne_federated.core.flower_bundle import run_folder_path
from dafne_federated.core.methods import METHODS
from dafne_federated.core.toml_file import checked, read_toml
from dafne_federated.core.wire import SiteName

REFUSED = "refused"  # a node's own configuration: why it does nothing but refuse

_PATHS = frozenset({"data", "cache", "bias_fields", "approvals", "inbox", "privacy_marker"})


class SiteSettings(BaseModel):
    """One site.

    Attributes:
        name: Name of the site.
        data: Folder with its images.
        training: Names of the cases to train on.
        validation: Names of the cases to evaluate on; persons that it does not train on.
        cache: Folder for base models and prepared slices.
        bias_fields: Folder for bias fields, which depend on images alone; by default within
            ``cache``.
        approvals: The list of models that may run here.
        inbox: Folder for bases that came and that nobody approved yet, to be looked at; without
            it they are refused unread.
        classification: Class as Dafne names it, e.g. ``Thigh, Left``; empty for most models.
        label_names: The site's own name of a label, by the label of the model, where it differs.
        annotated: Labels of the model that were annotated here. By default those that the
            folder's label table knows; to be said where the table names what nobody looked for,
            or where a label is annotated and happens to occur in nobody. The others are masked
            out of the loss.
        min_cases: The site takes part only with at least so many training cases.
        max_epochs: Longest training in a round that it agrees to.
        max_seconds: The most that it works on one message, by the clock; by default as long as
            it takes. What needs longer is refused, and nothing of it is kept or sent: no result
            depends on how fast a machine is. A round that hides persons, once it has been paid
            for with epsilon, is finished.
        methods: Methods by which it trains, by the names of the table; by default all.
        least_new_cases: In a federation that goes on, the site announces new training cases as
            soon as there are so many since it trained last.
        rank: Rank of its low-rank pairs, within the bound of the plan: less for few cases or a
            slow line, more for many; by default that of the run.
        share_statistics: Whether numbers about all training slices together may leave the site
            where a run asks for them: for each channel of each normalisation the mean and
            variance of what it is given, how many slices there are, and how many pixels and
            slices hold each label. A site that says no takes part without giving them.
        share_dice: Whether the Dice of each label on the validation cases may leave. A site that
            says no takes part and measures nothing.
        share_loss: Whether the loss of training may leave.
        min_noise: 0 for a site that trains as the run asks. Else it trains only where the run
            hides each person (privacy 'person') with at least this noise, and shares no
            statistics.
        max_epsilon: The most epsilon that its persons' data may be used up to where a run hides
            persons, all runs together; a round that would pass it is refused.
        privacy_marker: A file outside ``cache`` that says how much the ledger in it must hold; in
            TOML by default ``privacy-marker.json``, in a simulation there is none.
        delta: Of that epsilon; must be below 1 / persons.
        threads: CPU threads, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
        precision: Of convolutions in training. ``bfloat16`` is faster where the processor
            computes in it, and slower where it does not. What is trained, sent and evaluated is
            float32 in either case.
        prefix_cache: Whether outputs of frozen layers are kept in ``cache``, where a plan leaves
            the first layers frozen; training is then faster, with the same result.
        prefix_cache_mib: The most that they may take, in MiB; what was not used for the longest
            time is removed, and training goes on without them where one set needs more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SiteName
    data: Path
    training: tuple[str, ...]
    validation: tuple[str, ...]
    cache: Path
    bias_fields: Path | None = None
    approvals: Path
    inbox: Path | None = None
    classification: str = ""
    label_names: dict[str, str] = Field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    min_cases: int = Field(default=1, ge=1)
    max_epochs: int = Field(default=1000, ge=1)
    max_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    methods: tuple[str, ...] | None = None
    least_new_cases: int = Field(default=1, ge=1)
    rank: int | None = Field(default=None, ge=1, le=256)
    share_statistics: bool = True
    share_dice: bool = True
    share_loss: bool = True
    privacy_marker: Path | None = None
    min_noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_epsilon: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    threads: int = Field(default=0, ge=0)
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    prefix_cache: bool = True
    prefix_cache_mib: int = Field(default=8192, ge=1)

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if others := [name for name in methods or () if name not in METHODS]:
            msg = f"expected methods among {', '.join(METHODS)}, got {others[0]!r}"
            raise ValueError(msg)
        return methods


def read_site(path: Path) -> SiteSettings:
    """Read the settings of a site.

    In TOML names are written with hyphens, paths are relative to the file, and ``connection``
    is left to those who start the site's programs.

    Raises:
        SettingsError: The file is missing or a setting is wrong.
    """
    if path.suffix == ".toml":
        return checked(SiteSettings, _toml_values(path), path)
    try:
        return SiteSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot read the settings of the site: {error.strerror}"
        raise SettingsError(msg) from None
    except ValidationError as error:
        msg = f"{path}: {first_fault(error)}"
        raise SettingsError(msg) from None


def _toml_values(path: Path) -> dict[str, Any]:
    values = read_toml(path, "cannot read the settings of the site: no such file")
    values.pop("connection", None)
    values = {name.replace("-", "_"): value for name, value in values.items()}
    values.setdefault("share_statistics", False)  # a hospital says yes, and not nothing
    values.setdefault("privacy_marker", "privacy-marker.json")
    for name in _PATHS & values.keys():
        values[name] = path.parent / str(values[name])
    return values


def site_of(context: Context) -> SiteSettings:
    """Return the site that a Flower node is.

    A node in a hospital is started with ``site``, the path of its file. In a simulation nodes
    are numbered, and the n-th file in ``sites/`` of the run folder is the n-th node.

    Raises:
        SettingsError: Neither is there.
    """
    node: dict[str, Any] = dict(context.node_config)
    if "site" in node:
        return read_site(Path(str(node["site"])))
    files: list[Path] = []
    if "partition-id" in node:
        files = sorted(run_folder_path(context.run_config).glob("sites/*.json"))
    number = int(node.get("partition-id", -1))
    if not 0 <= number < len(files):
        msg = f"this node has no site: expected node configuration 'site', got {sorted(node)}"
        raise SettingsError(msg)
    return read_site(files[number])
