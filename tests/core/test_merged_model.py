"""A merged model is a newer version of its base, under a name that Dafne can read back."""

from typing import Any

import pytest

from dafne_federated.core.merged_model import release_name


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("Thigh", "Thigh_2000"),
        ("My_Model", "My-Model_2000"),
        ("../../x", "x_2000"),
        ("", "Model_2000"),
    ],
)
def test_release_names_are_what_dafne_can_read_back(name: str, want: str) -> None:
    class Base:
        metadata: dict[str, Any] = {"model_name": name}  # noqa: RUF012
        timestamp_id = 1000

    assert release_name(Base(), 2000) == want  # type: ignore[arg-type]
