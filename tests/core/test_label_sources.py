"""Function sources get other labels by rule, and what the rules do not know is refused."""

import ast

import pytest

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.label_sources import relabelled
from dafne_federated.core.model_file import source_labels

BUILD, APPLY, LEARN = (
    f"{name}_function" for name in ("init_model", "apply_model", "incremental_learn")
)
OURS = NetworkSpec(labels=("a", "b"), size=32, resolution=(1.0, 1.0)).sources()
TABLE = "LABELS_DICT = {1: 'a', 2: 'b'}"
OLD = {1: "a", 2: "b"}

# The ways in which Dafne's own models state things, in few words: a table of dafne_dl and
# numbers (here of its leg model, 6 labels), and a table in each function.
LEG = {
    BUILD: """def build():
        from keras.layers import Conv2D
        x = Conv2D(filters=32, kernel_size=(7, 7))(x)
        return Conv2D(filters=7, kernel_size=(1, 1))(x)""",
    APPLY: """def apply(m, d):
        try:
            from dafne_dl.labels.leg import long_labels as LABELS_DICT
        except ModuleNotFoundError:
            from dl.labels.leg import long_labels as LABELS_DICT
        one = m.predict(d)[0, :, :, :13]
        return {name: one.argmax(2) == v for v, name in LABELS_DICT.items()}""",
    LEARN: """def learn(m, d, o, bs=5, n=5):
        from dafne_dl.labels.leg import inverse_labels
        return process(inverse_labels, d, o)""",
}
NAMES = source_labels(LEG[APPLY])
TEMPLATE = {
    BUILD: f"""def build():
        {TABLE}
        WIDTH = max(list(LABELS_DICT.keys())) + 1
        return Conv2D(filters=WIDTH, kernel_size=(3, 3))(Conv2D(filters=3)(x))""",
    APPLY: f"""def apply(m, d):
        {TABLE}
        WIDTH = len(LABELS_DICT) + 1
        return m.predict(d)[..., :WIDTH].argmax(2)""",
    LEARN: f"def learn(m, d, o, bs=5, n=5):\n        {TABLE}",
}


def widths(source: str) -> list[str]:
    """What a source gives as filters, and where it cuts channels, once its names are set."""
    scope: dict[str, object] = {}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            exec(ast.unparse(node), scope)
        if isinstance(node, ast.keyword) and node.arg == "filters":
            found.append(node.value)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            found += [i.upper for i in node.slice.elts if isinstance(i, ast.Slice) and i.upper]
    return [eval(ast.unparse(node), scope) for node in found]


@pytest.mark.parametrize("labels", [["x"], ["x", "y", "z"], [f"label {i}" for i in range(40)]])
def test_all_that_counts_labels_follows(labels: list[str]) -> None:
    new = dict(enumerate(labels, start=1))
    leg = relabelled(LEG, NAMES or {}, labels)
    assert widths(str(leg[BUILD])) == [32, len(labels) + 1]
    assert widths(str(leg[APPLY])) == [len(labels) + 1]
    template = relabelled(TEMPLATE, OLD, labels)
    assert sorted(widths(str(template[BUILD]))) == sorted([3, len(labels) + 1])
    assert widths(str(template[APPLY])) == [len(labels) + 1]
    for functions in (leg, template, relabelled(OURS, OLD, labels)):
        assert [source_labels(functions[key]) for key in (BUILD, APPLY, LEARN)] == [new] * 3
        assert all("dafne_dl.labels" not in str(source) for source in functions.values())


def test_names_by_label_are_turned_around() -> None:
    learn = str(relabelled(LEG, NAMES or {}, ["x", "y"])[LEARN])
    scope: dict[str, object] = {"process": lambda *given: given[0]}
    exec(learn, scope)
    assert scope["learn"](None, None, None) == {"x": 1, "y": 2}  # type: ignore[operator]


@pytest.mark.parametrize("functions", [OURS, TEMPLATE, LEG], ids=["ours", "template", "leg"])
def test_there_and_back_is_the_identity(functions: dict[str, str]) -> None:
    old = NAMES or {} if functions is LEG else OLD
    # 31 labels: the head is then as wide as other layers of the leg model.
    wide = [f"label {i}" for i in range(31)]
    once = relabelled(functions, old, list("pqr"))
    there = relabelled(once, dict(enumerate("pqr", start=1)), wide)
    assert relabelled(there, dict(enumerate(wide, start=1)), list("pqr")) == once


def test_what_states_no_labels_stays_to_the_byte() -> None:
    functions = {
        **OURS,
        "calc_delta_function": "def f( a ):  return a",
        "apply_delta_function": None,
    }
    new = relabelled(functions, OLD, ["x"])
    for key in ("calc_delta_function", "apply_delta_function"):
        assert new[key] == functions[key]


def test_a_name_for_the_width_is_followed_to_where_it_is_set() -> None:
    build = "def build():\n    N = 42\n    M = N\n    return f(Conv2D(M)(x), (8, M))"
    old = dict(enumerate([f"l{i}" for i in range(41)], start=1))
    apply = f"def apply(m, d):\n    LABELS_DICT = {old!r}\n    return m.predict(d)[..., :42]"
    new = relabelled({BUILD: build, APPLY: apply}, old, ["x"])
    assert "N = max(LABELS_DICT) + 1" in str(new[BUILD])
    assert widths(str(new[APPLY])) == [2]


def with_table(rest: str) -> str:
    return f"def f(m=None, d=None):\n    {TABLE}\n    {rest}"


@pytest.mark.parametrize(
    ("key", "source", "words"),
    [
        (BUILD, "def f(): return Conv2D(9)(x)", "one layer .* of 3 output channels, found 0"),
        (BUILD, "def f(): return Conv2D(3)(Dense(3)(x))", "show the head: .* found 2"),
        (BUILD, "def f():\n    for i in k:\n        x = Conv2D(3)(x)", "inside a loop"),
        (BUILD, "def f():\n    y = Conv2D(3)(x)\n    return Reshape((9, 9, 3))(y)", "number 3"),
        (BUILD, "def f(): return Conv2D(n)(x)", "found 0"),
        (
            BUILD,
            "def f(): pass\ndef g(): pass",
            "init model function is not the source text of one",
        ),
        (BUILD, "x = (", "init model function is not the source text of one"),
        (APPLY, "def f(m, d): return m", "apply model function states no labels"),
        (LEARN, "def f(m, d): return m", "incremental learn function states no labels"),
        (APPLY, with_table("LABELS_DICT = {1: 'a'}"), "in several places"),
        (APPLY, "def f():\n    if x:\n        LABELS_DICT = {1: 'a'}", "not at its top"),
        (APPLY, with_table("LABELS_DICT[3] = 'c'"), "more with LABELS_DICT than read"),
        (APPLY, with_table("LABELS_DICT.update(x)"), "more with LABELS_DICT than read"),
        (APPLY, with_table("return d[..., :2]"), "cuts channels at '2': expected 3"),
        (APPLY, with_table("return d[0, :, :, :n]"), "cuts channels at 'n': expected 3"),
        (APPLY, with_table("return d[..., :3], x if n == 2 else y"), "has the number 2"),
        (APPLY, with_table("return d[..., :3], 'b'"), "names the label 'b' outside"),
        (LEARN, "def f():\n    LABELS_DICT = {1: 'b', 2: 'a'}", "has another LABELS_DICT than"),
        (
            LEARN,
            "def f():\n    from dafne_dl.labels.leg import short_labels",
            "imports 'short_labels' of dafne_dl.labels.leg, which is not known",
        ),
    ],
)
def test_what_is_not_known_is_refused_with_function_and_reason(
    key: str, source: str, words: str
) -> None:
    with pytest.raises(ModelFileError, match=words):
        relabelled({**OURS, key: source}, OLD, ["x"])


def test_a_source_made_to_take_forever_ends_in_an_answer() -> None:
    doubled = "\n".join(f"    a{i + 1} = a{i} + a{i}" for i in range(200))
    source = f"def f():\n    {TABLE}\n    a0 = 1\n{doubled}\n    return Conv2D(a200)(x)"
    with pytest.raises(ModelFileError, match="found 0"):
        relabelled({**OURS, BUILD: source}, OLD, ["x"])
    deep = f"def f(): return {'+'.join(['1'] * 3000)}"
    with pytest.raises(ModelFileError, match="other labels"):
        relabelled({**OURS, BUILD: deep}, OLD, ["x"])
