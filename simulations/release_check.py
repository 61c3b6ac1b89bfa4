"""How far the released file is from the adapted network that the sites measured."""

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.run_folder import RunFolder


class ReleaseCheck(BaseModel):
    """What was compared at the end of a run.

    Attributes:
        case: Name of the case whose slices both networks saw.
        difference: Largest difference of any probability, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    case: str
    difference: float = Field(ge=0)

    def __str__(self) -> str:
        """Return it in words."""
        return (
            "largest difference between the released file and the adapted network: "
            f"{self.difference:.1g}"
        )


def save_release_check(folder: RunFolder, check: ReleaseCheck) -> None:
    """Write what was compared into a run folder."""
    write_atomic(folder.path / "release-check.json", check.model_dump_json(indent=2).encode())


def load_release_check(folder: RunFolder) -> ReleaseCheck | None:
    """Return what was compared, or None where nothing was.

    Raises:
        RunError: The file is damaged.
    """
    path = folder.path / "release-check.json"
    if not path.exists():
        return None
    try:
        return ReleaseCheck.model_validate_json(path.read_bytes())
    except ValidationError as error:
        msg = f"{path}: {error.errors()[0]['msg']}"
        raise RunError(msg) from None
