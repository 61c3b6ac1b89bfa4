"""The program of a model is compared with the approved one that is most like it."""

from dataclasses import replace

import pytest

from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.source_changes import source_changes


@pytest.fixture
def model() -> ModelFile:
    sources = NetworkSpec(labels=("a", "b"), size=32, resolution=(1.0, 1.0)).sources()
    return ModelFile(
        digest="1" * 64, model_id="family", timestamp_id=1, type="DynamicDLModel",
        dimensionality=2, is_delta=False, metadata={}, functions=dict(sources), kind="none",
        weights={},
    )  # fmt: skip


def edited(model: ModelFile, digest: str, old: str, new: str, **more: object) -> ModelFile:
    key = "init_model_function"
    text = model.functions[key] or ""
    assert old in text
    functions = {**model.functions, key: text.replace(old, new)}
    return replace(model, digest=digest * 64, functions=functions, **more)


def test_the_same_text_is_the_same_whatever_the_weights(model: ModelFile) -> None:
    changes = source_changes(replace(model, digest="2" * 64), [model])
    assert (changes.kind, changes.known, changes.lines) == ("same", model, ())


def test_with_nothing_approved_all_is_new(model: ModelFile) -> None:
    changes = source_changes(model, [])
    assert (changes.kind, changes.known, changes.functions) == ("new", None, 3)


def test_a_change_is_shown_with_its_lines(model: ModelFile) -> None:
    new = edited(model, "2", "FILTERS = ", "FILTERS = open('x') and ")
    changes = source_changes(new, [model])
    assert (changes.kind, changes.added, changes.removed) == ("changed", 1, 1)
    assert [line for line in changes.lines if line.startswith("+ ")] == [
        next(
            f"+{line}"
            for line in new.functions["init_model_function"].splitlines()
            if "open" in line
        )
    ]
    assert changes.lines[0] == "--- init_model_function (approved)"


def test_a_function_that_came_or_went_is_a_change(model: ModelFile) -> None:
    new = replace(model, digest="2" * 64, functions={**model.functions, "other": "a\nb\n"})
    assert (source_changes(new, [model]).added, source_changes(model, [new]).removed) == (2, 2)


def test_it_is_compared_with_its_family_and_then_with_the_most_similar(model: ModelFile) -> None:
    near = edited(model, "3", "FILTERS = ", "FILTERS = x and ")
    far = edited(model, "4", "\n", "\n\n")
    new = replace(edited(model, "5", "FILTERS = ", "FILTERS = y and "))
    assert source_changes(new, [far, near]).known == near
    assert source_changes(new, [far, replace(near, model_id="else")]).known == far
