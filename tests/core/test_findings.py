"""What a model needs is read from its file, and names are listed as people write them."""

from dafne_federated.core.findings import (
    ModelExpectation,
    enumerated,
    expectation_of,
    model_label,
)
from dafne_federated.core.model_file import ModelFile


def make_model(source: str, **metadata: object) -> ModelFile:
    functions = {"incremental_learn_function": source, "apply_model_function": source}
    return ModelFile(
        digest="",
        model_id="m",
        timestamp_id=1,
        type="DynamicDLModel",
        dimensionality=2,
        is_delta=False,
        metadata=dict(metadata),
        functions=dict(functions),
        kind="keras",
        weights={},
    )


def test_what_a_model_needs_is_read_from_its_file() -> None:
    source = (
        "def learn(model):\n    LABELS_DICT = {2: 'rectus', 1: 'vastus'}\n"
        "    MODEL_RESOLUTION = [1.5, 2]\n    MODEL_SIZE = (96, 64)\n"
    )
    expected = ModelExpectation(("vastus", "rectus"), "Axial", (1.5, 2.0), (96, 64))
    assert expectation_of(make_model(source, orientation="Transversal")) == expected
    assert expectation_of(make_model(source, orientation="")).plane == ""
    assert expectation_of(make_model(source, orientation="Sagittal")).plane == "Sagittal"


def test_a_model_that_states_nothing_expects_nothing() -> None:
    sources = ["def learn(model):\n    pass\n", "def learn(model):\n    MODEL_SIZE = [0, 'x']\n"]
    for source in sources:
        assert expectation_of(make_model(source)) == ModelExpectation((), "", None, None)


def test_a_side_counts_as_its_label() -> None:
    assert model_label("vastus_L", ("vastus",)) == "vastus"
    assert model_label("vastus_L", ("vastus_L",)) == "vastus_L"
    assert model_label("vastus_M", ("vastus",)) is None


def test_long_lists_are_cut() -> None:
    assert enumerated([]) == ""
    assert enumerated(["a"]) == "a"
    assert enumerated("abc") == "a, b and c"
    assert enumerated(range(10)) == "0, 1, 2, 3, 4, 5, 6 and 3 more"
