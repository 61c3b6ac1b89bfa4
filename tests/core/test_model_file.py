"""A `.model` is read without running it, survives a round trip, and bad ones get one line."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.model_file import (
    ModelFile,
    function_constants,
    keras_weights,
    model_labels,
    parse_model,
    read_model,
    serialise_model,
    why_not_adaptable,
    write_model,
)

APPLY = """def apply(model, data):
    LABELS_DICT = {1: 'muscle', 2: 'bone'}
    SIZE = [64, 64]
    import numpy as np
    COMPUTED = np.zeros(3)
    return {}
"""


def content(**changes: Any) -> dict[str, Any]:
    return {
        "model_id": "family",
        "weights": [np.ones((3, 3, 1, 2), np.float32), np.zeros(2, np.float32)],
        "timestamp_id": 1_610_001_000,
        "is_delta": False,
        "data_dimensionality": 2,
        "type": "DynamicDLModel",
        "metadata": {"model_name": "Thigh", "categories": [["MSK"]], "variants": [""]},
        "init_model_function": "def init():\n    pass\n",
        "apply_model_function": APPLY,
        "incremental_learn_function": "def learn(*args):\n    pass\n",
    } | changes


@pytest.fixture
def model() -> ModelFile:
    return parse_model(dill.dumps(content(), protocol=4))


def test_write_then_read_is_the_identity(model: ModelFile, tmp_path: Path) -> None:
    written = write_model(model, tmp_path / "a.model")
    back = read_model(tmp_path / "a.model")
    assert back.digest == written.digest
    assert back.content_digest == model.content_digest
    assert replace(back, weights={}, digest="") == replace(model, weights={}, digest="")
    for key, array in model.weights.items():
        np.testing.assert_array_equal(back.weights[key], array)


def test_dill_reads_what_we_write(model: ModelFile) -> None:
    back = dill.loads(serialise_model(model))
    assert {k: v for k, v in back.items() if k != "weights"} == {
        k: v for k, v in content().items() if k != "weights"
    }
    for got, want in zip(back["weights"], content()["weights"], strict=True):
        np.testing.assert_array_equal(got, want)


def test_equal_content_gives_equal_bytes(model: ModelFile) -> None:
    assert serialise_model(model) == serialise_model(parse_model(serialise_model(model)))


def test_times_do_not_change_the_content_digest(model: ModelFile) -> None:
    later = replace(model, timestamp_id=1, metadata={"federated": {"date": "2030-01-01"}})
    assert later.content_digest == model.content_digest
    other = replace(model, weights={**model.weights, "0001": np.ones(2, np.float32)})
    assert other.content_digest != model.content_digest


def test_what_a_provider_adds_is_not_written(model: ModelFile) -> None:
    full = {**model.metadata, "hash": "x", "hashes": {}, "timestamps": [], "latest_size": 3}
    back = parse_model(serialise_model(replace(model, metadata=full)))
    assert back.metadata == model.metadata


def test_torch_and_ensemble_weights_are_read() -> None:
    torch = pytest.importorskip("torch")
    from collections import OrderedDict

    state = OrderedDict(weight=torch.ones(2, 2), steps=torch.tensor(3))
    one = parse_model(dill.dumps(content(weights=state, type="DynamicTorchModel"), protocol=4))
    many = parse_model(dill.dumps(content(weights=[state, state]), protocol=4))
    assert (one.kind, sorted(one.weights)) == ("torch", ["steps", "weight"])
    assert (many.kind, sorted(many.weights)[:2]) == ("ensemble", ["0/steps", "0/weight"])
    assert "only Keras models" in (why_not_adaptable(one) or "")


def test_labels_are_read_from_the_source(model: ModelFile) -> None:
    assert model_labels(model) == {1: "muscle", 2: "bone"}
    assert function_constants(APPLY)["SIZE"] == [64, 64]
    assert "COMPUTED" not in function_constants(APPLY)


def test_labels_of_dafnes_own_tables_are_found(model: ModelFile) -> None:
    source = "def a(m, d):\n    from dafne_dl.labels.thigh import long_labels as LABELS_DICT\n"
    thigh = replace(model, functions={**model.functions, "apply_model_function": source})
    labels = model_labels(thigh)
    assert labels is not None
    assert labels[1] == "Vastus Lateralis"
    assert len(labels) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "text"}, "weights: expected a list or dictionary of arrays, got str"),
        ({"weights": [np.ones(2), "text"]}, "weight 1: expected an array of numbers, got str"),
        ({"timestamp_id": "now"}, "expected a whole timestamp_id"),
        ({"model_id": 7}, "model_id: expected a text"),
        ({"apply_model_function": 3}, "expected the source text of a function, got int"),
    ],
)
def test_wrong_content_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        parse_model(dill.dumps(content(**changes), protocol=4))


def test_a_model_without_identity_is_refused_in_words() -> None:
    import uuid

    with pytest.raises(ModelFileError, match="carries no identity"):
        parse_model(dill.dumps(content(model_id=uuid), protocol=4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_never_written(
    model: ModelFile, tmp_path: Path, bad: float
) -> None:
    spoilt = replace(model, weights=keras_weights([np.array([1.0, bad], np.float32)]))
    with pytest.raises(ModelFileError, match="weight '0000' has 1 values that are not finite"):
        write_model(spoilt, tmp_path / "a.model")
    assert not list(tmp_path.glob("*.model"))
    assert "not finite" in (why_not_adaptable(spoilt) or "")


def test_metadata_must_be_json(model: ModelFile) -> None:
    with pytest.raises(ModelFileError, match="metadata is not JSON"):
        serialise_model(replace(model, metadata={"array": np.ones(2)}))


def test_a_truncated_file_gets_one_line(model: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "short.model"
    path.write_bytes(serialise_model(model)[:-10])
    with pytest.raises(ModelFileError, match=r"short\.model: not a complete Dafne model") as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


def test_a_text_file_and_a_missing_file_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.model"
    path.write_text("these are notes")
    with pytest.raises(ModelFileError, match=r"notes\.model: not a complete Dafne model"):
        read_model(path)
    with pytest.raises(ModelFileError, match="cannot read model"):
        read_model(tmp_path / "nowhere.model")


def test_another_pickle_is_not_a_model() -> None:
    buffer = io.BytesIO()
    pickle.dump([1, 2], buffer)
    with pytest.raises(ModelFileError, match="expected a dictionary with a 'model_id', got list"):
        parse_model(buffer.getvalue())


@pytest.mark.parametrize("stamp", [10**18, -1, True, 1.5, None])
def test_versions_are_seconds_that_a_calendar_knows(stamp: Any) -> None:
    with pytest.raises(ModelFileError, match="expected a whole timestamp_id"):
        parse_model(pickle.dumps(content(timestamp_id=stamp), protocol=4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_dimensionality": 4}, "data_dimensionality: expected 2 or 3, got 4"),
        ({"data_dimensionality": np.array([2, 3])}, "data_dimensionality: expected int"),
        ({"is_delta": np.array([True, False])}, "is_delta: expected bool, got ndarray"),
        ({"type": ["a"]}, "type: expected str, got list"),
        ({"model_id": "\ud800"}, "not Unicode"),
    ],
)
def test_fields_of_another_kind_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        parse_model(pickle.dumps(content(**changes), protocol=4))


def test_keys_that_are_not_text_are_left_out() -> None:
    odd = {5: 1, ("x_function",): "text", **content()}
    assert sorted(parse_model(pickle.dumps(odd, protocol=4)).functions) == sorted(
        key for key in content() if key.endswith("_function")
    )


@pytest.mark.parametrize("metadata", ["text", [1], {"ewc": np.ones(2)}, {"raw": b"x"}, {1: 2}])
def test_any_metadata_is_read_but_only_json_is_written(metadata: Any) -> None:
    found = parse_model(pickle.dumps(content(metadata=metadata), protocol=4))
    if isinstance(metadata, dict):
        assert found.metadata.keys() == metadata.keys()
        with pytest.raises(ModelFileError, match="metadata is not JSON"):
            serialise_model(found)
        assert "its metadata is not JSON" in (why_not_adaptable(found) or "")
    else:
        assert found.metadata == {"metadata": metadata}


@pytest.mark.parametrize(
    "source",
    [
        "def f(:\n",
        "x\x00y",
        "def f():\n    LABELS_DICT = " + "(" * 500 + "1" + ")" * 500 + "\n",
        "def f():\n    LABELS_DICT = " + "-" * 100_000 + "1\n",
        "def f():\n    LABELS_DICT = {[]: 1}\n",
        "def f():\n    LABELS_DICT = {'a': 'x'}\n",
        "def f():\n    LABELS_DICT = {None: 'x'}\n",
        "def f():\n    LABELS_DICT = {1.5: 'x'}\n",
        "def f():\n    LABELS_DICT = {1: 2}\n",
        "def f():\n    LABELS_DICT = {1: '\\ud800'}\n",
        "def f():\n    LABELS_DICT = 3\n",
    ],
    ids=lambda source: source[-24:].replace("\n", " ").replace("\x00", "NUL"),
)
def test_sources_without_readable_labels_state_none(source: str) -> None:
    functions = {"apply_model_function": source, "incremental_learn_function": source}
    assert model_labels(parse_model(pickle.dumps(content(**functions), protocol=4))) is None


def test_sources_that_are_not_python_have_no_constants() -> None:
    for source in ("def f(:\n", "x\x00y", "-" * 100_000, "def f():\n    A = {[]: 1}\n"):
        assert function_constants(source) == {}


def test_constants_inside_an_array_are_seen() -> None:
    source = (
        "def f():\n    A = np.array([1.037037, 2])\n    B = np.array([x])\n"
        "    C = numpy.array((1, 2))\n    D = np.array([1.5], dtype=int)\n    E = list([1])\n"
    )
    assert function_constants(source) == {"A": [1.037037, 2], "C": (1, 2)}
