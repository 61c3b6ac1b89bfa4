"""A new task keeps what the base learned, has its own labels and identity, and runs in Dafne."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.model_file import (
    ModelFile,
    keras_weights,
    model_labels,
    parse_model,
    read_model,
    serialise_model,
    write_model,
)
from dafne_federated.core.new_task import NOISE, new_task

SPEC = NetworkSpec(labels=("a", "b"), size=32, resolution=(1.0, 1.0), filters=(4, 6), strides=(2,))


@pytest.fixture
def base() -> ModelFile:
    generator = np.random.default_rng(0)
    shapes = [(3, 3, 1, 4), (4,), (3, 3, 4, 3), (3,), (1, 1, 4, 3), (3,)]
    return ModelFile(
        digest="d" * 64,
        model_id="family",
        timestamp_id=1_610_001_000,
        type="DynamicDLModel",
        dimensionality=2,
        is_delta=False,
        metadata={
            "model_name": "Leg",
            "categories": [["MSK"]],
            "variants": ["", "Left"],
            "info": {"Description": "old", "Author": "Ada", "Modality": "MRI"},
            "federated": {"run": "an earlier one"},
        },
        functions=dict(SPEC.sources()),
        kind="keras",
        weights=keras_weights([generator.normal(size=s).astype(np.float32) for s in shapes]),
    )


def test_only_the_head_changes_and_kept_labels_keep_their_columns(base: ModelFile) -> None:
    new = new_task(base, ["new", "b", "newer"], seed=4)
    assert model_labels(new) == {1: "new", 2: "b", 3: "newer"}
    assert new.weights.keys() == base.weights.keys()
    for key in ("0000", "0001", "0002", "0003"):
        assert new.weights[key].tobytes() == base.weights[key].tobytes()
    for key in ("0004", "0005"):
        old, array = base.weights[key], new.weights[key]
        assert array.shape == (*old.shape[:-1], 4)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[..., 0], old[..., 0])
        np.testing.assert_array_equal(array[..., 2], old[..., 2])
        foreground = (old[..., 1] + old[..., 2]) / 2
        for column in (1, 3):
            np.testing.assert_allclose(array[..., column], foreground, atol=6 * NOISE * old.std())
        assert (array[..., 1] != array[..., 3]).all()


def test_a_base_of_one_label_gives_that_column(base: ModelFile) -> None:
    weights = base.weights | {k: base.weights[k][..., :2] for k in ("0004", "0005")}
    functions = dict(replace_labels(SPEC, ("a",)).sources())
    one = replace(base, weights=weights, functions=functions)
    new = new_task(one, ["x", "y"], seed=0)
    for column in (1, 2):
        difference = new.weights["0004"][..., column] - weights["0004"][..., 1]
        assert 0 < np.abs(difference).max() < 6 * NOISE * weights["0004"].std()


def replace_labels(spec: NetworkSpec, labels: tuple[str, ...]) -> NetworkSpec:
    return spec.model_copy(update={"labels": labels})


def test_the_same_arguments_give_the_same_file_and_others_another_family(base: ModelFile) -> None:
    first = new_task(base, ["x", "b"], seed=1)
    assert serialise_model(first) == serialise_model(new_task(base, ["x", "b"], seed=1))
    others = [
        new_task(base, ["x", "b"], seed=2),
        new_task(base, ["b", "x"], seed=1),
        new_task(replace(base, model_id="other"), ["x", "b"], seed=1),
        base,
    ]
    assert len({first.model_id, *(other.model_id for other in others)}) == 5
    assert first.content_digest != others[0].content_digest


def test_it_says_what_it_is_and_where_it_comes_from(base: ModelFile) -> None:
    new = new_task(base, ["x", "b"], seed=1, name="Tendons (leg)")
    told = parse_model(serialise_model(new)).metadata
    assert told.pop("derived_from") == {
        "base_sha256": "d" * 64,
        "base_name": "Leg",
        "base_model_id": "family",
        "base_timestamp": 1_610_001_000,
        "base_labels": ["a", "b"],
        "kept_labels": ["b"],
        "seed": 1,
    }
    assert told == {
        "model_name": "Tendons (leg)",
        "categories": [["MSK"]],
        "variants": ["", "Left"],
        "info": {
            "Description": "Segmentation of x, b",
            "Author": "dafne-federated, from a model of Ada",
            "Modality": "MRI",
        },
    }
    assert new_task(base, ["x"], seed=1).metadata["model_name"] == "Leg new task"
    assert new.timestamp_id > base.timestamp_id


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "expected 1 to 127 names, got 0"),
        ([f"l{i}" for i in range(128)], "expected 1 to 127 names, got 128"),
        (["x", ""], "printable characters, no space around, got ''"),
        (["x "], "no space around, got 'x '"),
        (["x\ny"], r"printable characters.*'x\\ny'"),
        (["x", "y", "x"], "expected different names, got x, y, x"),
        (["b", "a"], r"the base has these already \(a, b\)"),
    ],
)
def test_labels_that_cannot_be_are_refused(base: ModelFile, labels: list[str], words: str) -> None:
    with pytest.raises(DafneFederatedError, match=words):
        new_task(base, labels, seed=1)


@pytest.mark.parametrize("name", ["", "  ", "a_b", "a,b", "Leg", "Müller", "a\nb"])
def test_names_that_dafne_would_not_take_are_refused(base: ModelFile, name: str) -> None:
    with pytest.raises(DafneFederatedError, match="name: expected letters"):
        new_task(base, ["x"], seed=1, name=name)


def test_traps_of_sides_are_refused(base: ModelFile) -> None:
    assert model_labels(new_task(base, ["x_L", "x_R"], seed=1)) == {1: "x_L", 2: "x_R"}
    sided = replace(base, functions=dict(SPEC.model_copy(update={"sides": True}).sources()))
    with pytest.raises(DafneFederatedError, match=r"'x_L' would never be trained.*use 'x'"):
        new_task(sided, ["x_L", "x_R"], seed=1)
    learn = "def f(*a):\n    LABELS_DICT = {1: 'a', 2: 'b'}\n    common_input_process_split(a)"
    both = replace(base, functions={**base.functions, "incremental_learn_function": learn})
    new_task(both, ["x", "y"], seed=1)
    with pytest.raises(DafneFederatedError, match=r"at least 2 names.*a single label"):
        new_task(both, ["x"], seed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "torch", "type": "DynamicTorchModel"}, "only Keras models"),
        ({"kind": "ensemble", "type": "DynamicEnsembleModel"}, "only Keras models"),
        ({"is_delta": True}, "a difference between two versions"),
        ({"functions": {}}, "has no init model function"),
        ({"dimensionality": 3}, "only slice-wise"),
    ],
)
def test_other_kinds_of_models_are_refused(base: ModelFile, changes: Any, words: str) -> None:
    with pytest.raises(DafneFederatedError, match=f"cannot start a new task: .*{words}"):
        new_task(replace(base, **changes), ["x"], seed=1)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 3, 1, 3), (3,), (1, 1, 3, 4), (4,)],
        [(1, 1, 4, 3), (3,), (3,), (3,), (3,), (3,)],
        [(1, 1, 4, 3), (3,), (2, 2, 3, 5)],
        [(3,)],
    ],
)
def test_a_last_layer_that_is_not_the_head_is_refused(base: ModelFile, shapes: Any) -> None:
    other = replace(base, weights=keras_weights([np.ones(s, np.float32) for s in shapes]))
    with pytest.raises(DafneFederatedError, match=r"expected a last layer with a kernel.*of 3"):
        new_task(other, ["x"], seed=1)


def test_byte_code_in_place_of_a_source_is_refused_when_it_is_read() -> None:
    import pickle

    content = {"model_id": "x", "timestamp_id": 1, "init_model_function": b"code"}
    with pytest.raises(DafneFederatedError, match="expected the source text of a function"):
        parse_model(pickle.dumps(content, protocol=4))


def upstream(path: Path) -> Any:
    """The model as Dafne itself opens it."""
    from dafne_dl.model_loaders import generic_load_model

    with path.open("rb") as handle:
        return generic_load_model(handle, install_deps=False)


def check_in_dafne(new: ModelFile, path: Path, labels: list[str], size: int) -> None:
    """Dafne loads it, its network has the channels, and it applies and learns these labels."""
    write_model(new, path)
    model = upstream(path)
    assert model.model.output_shape == (None, size, size, len(labels) + 2)
    for key, array in zip(sorted(new.weights), model.get_weights(), strict=True):
        np.testing.assert_array_equal(array, new.weights[key])
    generator = np.random.default_rng(0)
    images = [generator.normal(100, 5, (size, size)).astype(np.float32) for _ in range(2)]
    masks = []
    for image in images:
        masks.append({})
        for index, label in enumerate(labels):
            mask = np.zeros((size, size), np.uint8)
            mask[8:14, 4 + 8 * index : 10 + 8 * index] = 1
            image[mask > 0] += 30 * (index + 1)
            masks[-1][f"{label}_R"] = mask
    # One side: Dafne's search for two legs would not end on these images.
    resolution = np.array(model_resolution(new))
    shared = {"resolution": resolution, "classification": "Task, Right"}
    found = model.apply({"image": images[0], "split_laterality": False, **shared})
    assert list(found) == labels
    assert all(mask.shape == (size, size) for mask in found.values())
    before = [array.copy() for array in model.get_weights()]
    model.incremental_learn({"image_list": images, **shared}, masks, 1, 1)
    after = model.get_weights()
    assert all(np.isfinite(array).all() for array in after)
    assert (before[-1] != after[-1]).all()  # the bias of each channel learns


def model_resolution(model: ModelFile) -> list[float]:
    """The pixel size at which the model works, in mm."""
    text = str(model.functions["apply_model_function"])
    (found,) = re.findall(r"MODEL_RESOLUTION = (?:np.array\()?\[([\d., ]+)\]", text)
    return [float(value) for value in found.split(",")]


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_dafne_runs_and_retrains_it(trained: Any, tmp_path: Path) -> None:
    labels = ["bright", "grey", "third"]
    new = new_task(read_model(trained.path), labels, seed=1)
    check_in_dafne(new, tmp_path / "new.model", labels, 40)


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_a_new_head_starts_warm_and_a_plan_made_on_it_trains(
    trained: Any, tmp_path: Path, make_case: Callable[..., Any]
) -> None:
    from dafne_federated.core.adapters import AdaptedNetwork
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan
    from dafne_federated.core.settings import RunSettings
    from dafne_federated.core.state import initial_state
    from dafne_federated.core.training import AdapterTraining

    def named(case: Any) -> Any:
        return replace(case, masks={"bright": case.masks["bright"], "shade": case.masks["dark"]})

    new = new_task(read_model(trained.path), ["shade", "bright"], seed=1)
    approvals = Approvals(tmp_path / "approved.json")
    written = write_model(new, tmp_path / "new.model")
    approvals.add(written, "test")
    running = RunningModel(written, approvals)
    assert running.labels == ("shade", "bright")

    case = named(make_case("new", 90))

    def dice(masks: Any, name: str) -> float:
        both = 2 * (masks[name] & case.masks[name]).sum()
        return float(both / max(masks[name].sum() + case.masks[name].sum(), 1))

    assert dice(running.apply(case), "bright") > 0.5
    plan = make_plan(running, RunSettings(rank=2))
    assert plan.labels == ("shade", "bright")
    assert plan.targets[-1].shape == (3,)
    slices = running.prepare_all(named(make_case(f"p{i}", i)) for i in range(3))
    adapted = AdaptedNetwork(running.network, plan)
    adapted.write(initial_state(plan, 0))
    assert running.loss is not None
    AdapterTraining(adapted, running.loss).run(slices, 15, 4, 1e-2, 1)
    after = running.apply(case, adapted.predict)
    assert dice(after, "shade") > 0.6
    assert dice(after, "bright") > 0.8


UPSTREAM = {
    "thigh": ("generate_thigh_split_model.py", 250),
    "leg": ("generate_leg_split_model.py", 216),
    "template": ("src/dafne_models/resources/generate_model.py.tmpl", 64),
}
TEMPLATE_CONSTANTS = {
    "LABELS_DICT": "{1: 'a', 2: 'b'}",
    "MODEL_SIZE": "[64, 64]",
    "MODEL_RESOLUTION": "[1.0, 1.0]",
    "N_LEVELS": "3",
    "N_CONV_LAYERS": "2",
    "INITIAL_KERNEL_SIZE": "2",
    "BIASCORRECTION_LEVELS": "2",
    "BIASCORRECTION_NORMALIZE": "-1",
    "MODEL_NAME": "'made'",
    "MODEL_UID": "'made'",
}


def generated(file: Path) -> ModelFile:
    """A model of the functions in one of Dafne's generators, with few filters."""
    import ast

    from dafne_federated.core.model_runtime import build_model

    text = file.read_text()
    for name, value in TEMPLATE_CONSTANTS.items():
        text = text.replace(f"%%{name}%%", value)
    functions = [ast.unparse(n) for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    build, apply, learn = functions
    build = re.sub(
        r"filters=(32|64|128|256|512|1024)\b", lambda m: f"filters={int(m[1]) // 16}", build
    )
    sources = {
        "init_model_function": build,
        "apply_model_function": apply,
        "incremental_learn_function": learn,
    }
    return build_model("made", sources, 1_610_001_000, {"model_name": "Made"})


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", UPSTREAM)
def test_dafnes_own_models_start_new_tasks(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    checkout = request.config.getoption("--dafne-models")
    if not checkout:
        pytest.skip("give --dafne-models a checkout of Dafne's model generators to run this")
    file, size = UPSTREAM[name]
    base = generated(Path(checkout) / file)
    old = list((model_labels(base) or {}).values())
    labels = ["new", old[0], "other"]
    new = new_task(base, labels, seed=1)
    check_in_dafne(new, tmp_path / "new.model", labels, size)
    again = new_task(new, old, seed=1, name="Back")
    assert model_labels(again) == model_labels(base)
    with pytest.raises(DafneFederatedError, match="'x_L' would never be trained"):
        new_task(base, ["x_L", "x_R"], seed=1)
