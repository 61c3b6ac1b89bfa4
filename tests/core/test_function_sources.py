"""Constants go into the sources, and each source stands alone as Dafne needs it."""

import ast

import pytest
from pydantic import ValidationError

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.function_sources import NetworkSpec, thigh_spec, with_constants
from dafne_federated.core.model_file import function_constants

SPEC = NetworkSpec(labels=("a", "b \"quoted\" 'name'"), size=48, resolution=(1.5, 1.5))


@pytest.mark.parametrize("key", SPEC.sources())
def test_each_source_is_one_function_that_imports_all_it_uses(key: str) -> None:
    tree = ast.parse(SPEC.sources()[key])
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    compile(tree, key, "exec")
    # What it reads but never binds must be a builtin.
    bound = {a.arg for n in ast.walk(function) if isinstance(n, ast.arguments) for a in n.args}
    bound |= {n.name for n in ast.walk(function) if isinstance(n, ast.FunctionDef)}
    for node in ast.walk(function):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    assert read - bound <= set(dir(__builtins__)) | set(__builtins__)  # type: ignore[call-overload]


def test_constants_are_what_the_spec_says() -> None:
    learn = function_constants(SPEC.sources()["incremental_learn_function"])
    assert learn["LABELS_DICT"] == {1: "a", 2: "b \"quoted\" 'name'"}
    assert learn["MODEL_SIZE"] == [48, 48]
    assert learn["MODEL_RESOLUTION"] == [1.5, 1.5]
    build = function_constants(SPEC.sources()["init_model_function"])
    assert (build["FILTERS"], build["STRIDES"]) == ([16, 32, 64, 128], [2, 2, 2])


def test_the_thigh_preset_has_twelve_labels_and_dafnes_grid() -> None:
    spec = thigh_spec()
    assert (len(spec.labels), spec.size, spec.strides[-1]) == (12, 250, 3)


@pytest.mark.parametrize(
    "change",
    [{"strides": (2,)}, {"labels": ("a", "a")}, {"labels": ()}, {"size": 4}, {"filters": (8,)}],
)
def test_specs_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NetworkSpec.model_validate({**SPEC.model_dump(), **change})


@pytest.mark.parametrize("source", ["x = 1", "def a(): pass\ndef b(): pass", "not python ("])
def test_other_texts_are_refused(source: str) -> None:
    with pytest.raises(ModelFileError, match="expected the source text of"):
        with_constants(source, {})
