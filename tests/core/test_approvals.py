"""Only a model whose exact bytes were approved may run."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dafne_federated.core.approvals import Approvals, home_folder
from dafne_federated.core.errors import ApprovalError, SettingsError
from dafne_federated.core.model_file import ModelFile

MODEL = ModelFile(
    digest="a" * 64,
    model_id="x",
    timestamp_id=1,
    type="DynamicDLModel",
    dimensionality=2,
    is_delta=False,
    metadata={"model_name": "Thigh"},
    functions={},
    kind="keras",
    weights={},
)


def test_approval_is_kept_and_is_for_these_bytes_only(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path / "list.json")
    with pytest.raises(ApprovalError, match=r"Thigh holds program text .* nobody here"):
        approvals.require(MODEL)
    approvals.add(MODEL, "looked at it")
    Approvals(tmp_path / "list.json").require(MODEL)
    assert approvals.entries()[MODEL.digest]["why"] == "looked at it"
    assert not approvals.allows("b" * 64)
    with pytest.raises(ApprovalError):
        approvals.require(replace(MODEL, digest=""))


def test_a_damaged_list_approves_nothing(tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(SettingsError):
            Approvals(tmp_path / "list.json").allows(MODEL.digest)


def test_the_list_is_the_persons_own_by_default(own_home: Path) -> None:
    assert home_folder() == own_home
    assert Approvals().path.parent == own_home


def test_two_commands_at_once_lose_no_approval(tmp_path: Path) -> None:
    def approve(number: int) -> None:
        model = replace(MODEL, digest=f"{number:064x}")
        Approvals(tmp_path / "list.json").add(model, "at once")

    with ThreadPoolExecutor(8) as pool:  # each opens the lock anew, as another process would
        list(pool.map(approve, range(40)))
    assert len(Approvals(tmp_path / "list.json").entries()) == 40
