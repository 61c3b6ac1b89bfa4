"""Our models run in the real Dafne, and nothing runs that nobody approved."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.errors import ApprovalError, DataError, ModelFileError  # noqa: E402
from dafne_federated.core.evaluation import evaluate_case  # noqa: E402
from dafne_federated.core.metrics import mean_dice  # noqa: E402
from dafne_federated.core.model_file import ModelFile, read_model, write_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402


@pytest.fixture
def file(trained: Any) -> ModelFile:
    return read_model(trained.path)


def upstream(trained: Any) -> Any:
    """The model as Dafne itself opens it."""
    from dafne_dl.model_loaders import generic_load_model

    with trained.path.open("rb") as handle:
        return generic_load_model(handle, install_deps=False)


def test_training_reached_its_task(trained: Any) -> None:
    assert trained.dice > 0.9


def test_dafne_applies_it(trained: Any, make_case: Any) -> None:
    case = make_case("new", 77)
    model = upstream(trained)
    for options in ({}, {"classification": "Squares", "split_laterality": True}):
        for index in range(case.image.shape[-1]):
            found = model.apply(
                {"image": case.image[..., index], "resolution": np.array([1.0, 1.0]), **options}
            )
            assert set(found) == {"bright", "dark"}
            for name, mask in found.items():
                assert mask.shape == case.image.shape[:2]
                truth = case.masks[name][..., index]
                overlap = 2 * (truth & (mask > 0)).sum() / (truth.sum() + (mask > 0).sum())
                assert overlap > 0.8


def test_dafne_retrains_it_and_what_it_dumps_is_ours_to_read(trained: Any, make_case: Any) -> None:
    case = make_case("new", 78, slices=6)
    model = upstream(trained)
    before = [array.copy() for array in model.get_weights()]
    masks = [
        {f"{name}_L": mask[..., i].astype(np.uint8) for name, mask in case.masks.items()}
        for i in range(6)
    ]
    data = {"image_list": [case.image[..., i] for i in range(6)], "resolution": np.ones(2)}
    model.incremental_learn(data, masks, 3, 5)
    after = model.get_weights()
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert 0 < sum(changed) < len(changed)  # batch statistics stay, kernels move
    assert all(np.isfinite(array).all() for array in after)
    buffer = io.BytesIO()
    model.dump(buffer)
    from dafne_federated.core.model_file import parse_model

    dumped = parse_model(buffer.getvalue())
    assert dumped.model_id == read_model(trained.path).model_id
    assert len([name for name, source in dumped.functions.items() if source]) == 9


def test_ours_and_dafnes_way_of_applying_agree(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    case = make_case("new", 79)
    running = RunningModel(file, trained.approvals)
    ours = running.apply(case)
    model = upstream(trained)
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for index in range(case.image.shape[-1]):
        theirs = model.apply({"image": case.image[..., index], "resolution": np.array([1.0, 1.0])})
        for name, mask in theirs.items():
            np.testing.assert_array_equal(ours[name][..., index], mask > 0)
    rows = evaluate_case(running, case)
    assert (mean_dice(rows) or 0) > 0.85


def test_slices_that_nobody_looked_at_say_nothing_about_a_model(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    whole = make_case("new", 79)
    drawn = {n: m & (np.arange(m.shape[-1]) < 2) for n, m in whole.masks.items()}
    running = RunningModel(file, trained.approvals)
    alone = replace(
        whole, image=whole.image[..., :2], masks={n: m[..., :2] for n, m in whole.masks.items()}
    )
    partly, fully = (
        evaluate_case(running, replace(whole, masks=drawn, partly=partly), distances=False)
        for partly in (True, False)
    )
    want = evaluate_case(running, alone, distances=False)
    assert [row.dice for row in partly] == [row.dice for row in want]
    assert all(low.dice < row.dice - 0.2 for low, row in zip(fully, partly, strict=True))


def test_slices_are_those_that_dafnes_generator_holds(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    case = make_case("new", 80)
    slices = RunningModel(file, trained.approvals).prepare(case)
    assert slices is not None
    assert slices.images.shape == (4, 40, 40)
    assert slices.channels == 3
    assert slices.images.max() == pytest.approx(600)  # Dafne's grey scale
    assert slices.weights.min() > 0
    for value, name in enumerate(("bright", "dark"), start=1):
        np.testing.assert_array_equal(slices.labels == value, np.moveaxis(case.masks[name], -1, 0))


def test_a_slice_with_one_of_two_labels_is_trained_on(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    case = make_case("new", 81)
    case.masks["dark"][..., :2] = False
    slices = RunningModel(file, trained.approvals).prepare(case)
    assert slices is not None
    assert len(slices) == 4
    assert set(np.unique(slices.labels[0])) == {0, 1}
    empty = replace(case, masks={"dark": np.zeros_like(case.masks["dark"])})
    assert RunningModel(file, trained.approvals).prepare(empty) is None


def test_sides_are_united_and_constant_slices_left_out(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    case = make_case("new", 82)
    left = case.masks.pop("bright")
    right = left.copy()
    left[:, :10], right[:, 10:] = False, False
    case.masks.update({"bright_L": left, "bright_R": right})
    image = case.image.copy()
    image[..., 0] = 7.0
    running = RunningModel(file, trained.approvals)
    slices = running.prepare(replace(case, image=image))
    assert slices is not None
    assert len(slices) == 3
    np.testing.assert_array_equal(slices.labels[0] == 1, (left | right)[..., 1])
    assert not running.apply(replace(case, image=image))["bright"][..., 0].any()


def test_nothing_runs_without_approval(trained: Any) -> None:
    file = read_model(trained.path)
    nobody = Approvals(trained.path.parent / "nobody.json")
    with pytest.raises(ApprovalError, match="nobody here has approved it"):
        RunningModel(file, nobody)


def test_a_changed_byte_needs_a_new_approval(trained: Any, file: ModelFile) -> None:
    evil = "def init_model():\n    raise SystemExit('it ran')\n"
    changed = replace(file, functions={**file.functions, "init_model_function": evil})
    written = write_model(changed, trained.path.parent / "evil.model")
    with pytest.raises(ApprovalError):
        RunningModel(written, trained.approvals)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def learn(m, d, o, bs, n):\n    m.model.train_on_batch(1, 2)\n", "uses 'train_on_batch'"),
        (
            "def learn(m, d, o, bs, n):\n    m.model.compile(loss=None)\n    m.model.fit([1])\n",
            "does not compile a loss and fit on a list of prepared slices",
        ),
    ],
)
def test_another_way_of_training_is_refused_with_the_reason(
    trained: Any, file: ModelFile, source: str, words: str, make_case: Any
) -> None:
    changed = replace(file, functions={**file.functions, "incremental_learn_function": source})
    written = write_model(changed, trained.path.parent / "other.model")
    trained.approvals.add(written, "test")
    running = RunningModel(written, trained.approvals)
    with pytest.raises(ModelFileError, match=words):
        running.prepare(make_case("new", 83))


def test_a_model_that_dafne_cannot_build_gets_one_error(trained: Any, file: ModelFile) -> None:
    broken = "def init_model():\n    raise ValueError('no such layer')\n"
    changed = replace(file, functions={**file.functions, "init_model_function": broken})
    written = write_model(changed, trained.path.parent / "broken.model")
    trained.approvals.add(written, "test")
    with pytest.raises(ModelFileError, match="cannot build this model: ValueError: no such layer"):
        RunningModel(written, trained.approvals)


def changed(trained: Any, file: ModelFile, **functions: str) -> RunningModel:
    """The model with other functions, approved."""
    other = replace(file, functions={**file.functions, **functions})
    written = write_model(other, trained.path.parent / "changed.model")
    trained.approvals.add(written, "test")
    return RunningModel(written, trained.approvals)


LABELS = "    LABELS_DICT = {1: 'bright', 2: 'dark'}\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "returned a NoneType, expected masks by label name"),
        ("return {'bright': [[1]]}", "mask of another size for 'bright'.*got \\(1, 1\\)"),
        ("return {'bright_L': d['image']}", "unknown label 'bright_L'"),
        ("return d['nothing']", "case 'new': the model's apply function failed: KeyError"),
        ("raise SystemExit(0)", "case 'new': the model's apply function failed: SystemExit: 0"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ],
)
def test_an_apply_function_that_fails_is_one_error(
    trained: Any, file: ModelFile, make_case: Any, body: str, words: str
) -> None:
    source = f"def apply(m, d):\n{LABELS}    {body}\n"
    running = changed(trained, file, apply_model_function=source)
    with pytest.raises(ModelFileError, match=words) as caught:
        running.apply(make_case("new", 84))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def learn(*a):\n    raise KeyError('x')\n", "training function failed: KeyError: 'x'"),
        ("def learn(*a):\n    raise SystemExit\n", "training function failed: SystemExit"),
        ("learn = 3\n", "training function failed: TypeError"),
        ("def learn(m, *a):\n    m.model.optimizer.lr = 3\n", "uses 'optimizer'"),
    ],
)
def test_a_training_function_that_fails_is_one_error(
    trained: Any, file: ModelFile, make_case: Any, source: str, words: str
) -> None:
    running = changed(trained, file, incremental_learn_function=source)
    with pytest.raises(ModelFileError, match=words):
        running.prepare(make_case("new", 85))


def test_a_key_press_still_ends_the_program(trained: Any, file: ModelFile, make_case: Any) -> None:
    source = "def learn(*a):\n    raise KeyboardInterrupt\n"
    with pytest.raises(KeyboardInterrupt):
        changed(trained, file, incremental_learn_function=source).prepare(make_case("new", 86))


def test_a_model_that_exits_while_it_is_built_gets_one_error(trained: Any, file: ModelFile) -> None:
    source = "def init():\n    raise SystemExit(3)\n"
    with pytest.raises(ModelFileError, match="cannot build this model: SystemExit: 3"):
        changed(trained, file, init_model_function=source)


def test_preprocessing_that_fails_names_the_case(
    trained: Any, file: ModelFile, make_case: Any
) -> None:
    case = make_case("new", 87)
    case.image[10:20, 10:20, 0] = np.inf
    with pytest.raises(DataError, match="case 'new': a slice has no signal"):
        RunningModel(file, trained.approvals).prepare(case)


def test_each_label_has_one_name_in_all_functions(trained: Any, file: ModelFile) -> None:
    apply, learn = (
        str(file.functions[key]) for key in ("apply_model_function", "incremental_learn_function")
    )
    twice = {
        "apply_model_function": apply.replace("'dark'", "'bright'"),
        "incremental_learn_function": learn.replace("'dark'", "'bright'"),
    }
    with pytest.raises(ModelFileError, match="expected a name of its own for each label"):
        changed(trained, file, **twice)
    with pytest.raises(ModelFileError, match="other labels than its apply function"):
        changed(trained, file, incremental_learn_function=learn.replace("'dark'", "'grey'"))
