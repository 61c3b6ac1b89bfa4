"""The page of a fine-tuning says what its numbers say, and loads nothing."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.fine_tuning_folder import (
    EpochLine,
    FineTuningFolder,
    FineTuningInfo,
    FineTuningResult,
    Progress,
)
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.simulations.comparison import compare
from dafne_federated.simulations.fine_tuning_report import (
    NEW,
    persons_note,
    verdict,
    write_fine_tuning_report,
)
from dafne_federated.simulations.test_results import Overlay, TestRow


def info_of(plan: AdaptationPlan, **changes: Any) -> FineTuningInfo:
    values: dict[str, Any] = {
        "run": "0" * 32,
        "created": 1_700_000_000,
        "base_name": "<b>Thigh</b>",
        "base_digest": "b" * 64,
        "given_digest": "b" * 64,
        "base_parameters": 26_578_445,
        "plan_digest": plan.digest,
        "settings": FineTuningSettings(schedule="gradual"),
        "classification": "",
        "cases": {"training": ("x",), "validation": ("y",), "test": ("z", "w", "v")},
        "persons": {"training": 1, "validation": 1, "test": 3},
        "versions": {"dafne-federated": "0.1"},
        "command": "dafne-federated finetune 'a' -o b",
    }
    return FineTuningInfo(**values | changes)


def result_of(**changes: Any) -> FineTuningResult:
    values: dict[str, Any] = {
        "written": True,
        "reason": "validation Dice rises from 0.5000 to 0.7000 in epoch 2",
        "epoch": 2,
        "base_dice": 0.5,
        "dice": 0.7,
        "seconds": {"preparing": 3.0, "training": 140.0, "testing": 2.0},
        "digest": "d" * 64,
        "content_digest": "e" * 64,
    }
    return FineTuningResult(**values | changes)


def rows_of(base: float, new: float) -> list[TestRow]:
    return [
        TestRow(
            arm=arm, site="", person=person, case=person, label=label, dice=value + step,
            hd95=2.0, volume_error=-5.0,
        )
        for arm, value in (("base", base), (NEW, new))
        for person, step in (("v", 0.0), ("w", 0.01), ("z", 0.02))
        for label in ("bright", "dark")
    ]  # fmt: skip


def lines_of(dice: tuple[float | None, ...]) -> list[EpochLine]:
    return [
        EpochLine(
            epoch=n, stage="head" if n == 1 else "all", parameters=9, features=n == 1,
            learning_rate=0.003, loss=2.0 - 0.1 * n, dice=value, best=True, seconds=1.0,
        )
        for n, value in enumerate(dice, start=1)
    ]  # fmt: skip


def overlay_of(person: str) -> Overlay:
    truth = np.zeros((20, 16), np.uint8)
    truth[4:10, 4:10], truth[12:16, 4:10] = 1, 2
    return Overlay(
        site="", person=person, case=person, slice_index=0, image=truth.astype(np.float32),
        truth=truth, predictions={"base": truth * 0, NEW: truth}, spacing=np.ones(2),
    )  # fmt: skip


@pytest.fixture
def page(tmp_path: Path, small_plan: AdaptationPlan, make_state: Any) -> str:
    state = make_state(1)
    progress = Progress("s" * 64, (12, 4), 0.5, lines_of((0.6, 0.7)), state, state, {})
    path = write_fine_tuning_report(
        FineTuningFolder(tmp_path), info_of(small_plan), small_plan, progress, result_of(),
        rows_of(0.5, 0.7), [overlay_of(name) for name in ("v", "w", "z")],
    )  # fmt: skip
    return path.read_text()


def test_the_page_loads_nothing_and_escapes_names(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|url\(", page)
    assert "<b>Thigh</b>" not in page
    assert "&lt;b&gt;Thigh&lt;/b&gt;" in page
    assert page.count("Research software, not a medical device.") == 2


def test_the_page_shows_the_figures(page: str, small_plan: AdaptationPlan) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "raised mean Dice from 0.51 to 0.71 on 3 persons" in text
    assert "bright 3 0.510 0.710 +0.200 2.0 2.0 5.0 (\u22125.0) 5.0 (\u22125.0)" in text
    assert f"{small_plan.parameters:,}".replace(",", "\u202f") in text.replace(" ", "\u202f")
    assert "2\u202fmin 20\u202fs" in page  # 140 s of training
    for rank in ("lowest", "median", "highest"):
        assert text.count(f"({rank} Dice of all test persons)") == 1
    assert "head, on kept features" in text


def test_without_persons_to_test_on_the_page_says_so(
    tmp_path: Path, small_plan: AdaptationPlan, make_state: Any
) -> None:
    state = make_state(1)
    progress = Progress("s" * 64, (12, 0), None, lines_of((None, None)), state, state, {})
    info = info_of(small_plan, persons={"training": 1, "validation": 0, "test": 0})
    result = result_of(base_dice=None, dice=None, reason="nobody to validate on")
    text = write_fine_tuning_report(
        FineTuningFolder(tmp_path), info, small_plan, progress, result, [], []
    ).read_text()
    assert "There were no test persons." in text
    assert "Nothing is known about the quality of the new model" in text
    assert "1 person: all images train" in text


def test_the_verdict_warns_where_test_persons_lose(small_plan: AdaptationPlan) -> None:
    compared = compare(rows_of(0.7, 0.5), ())
    words = " ".join(verdict(info_of(small_plan), result_of(), compared))
    assert "lowered mean Dice from 0.71 to 0.51" in words
    assert "do not use the new model" in words


def test_the_verdict_of_nothing_written(small_plan: AdaptationPlan) -> None:
    result = result_of(written=False, epoch=0, dice=0.5, reason="no epoch is above")
    first, second = verdict(info_of(small_plan), result, None)
    assert first == "Fine-tuning found nothing that is better than the base."
    assert second == "No new model was written: no epoch is above."


def test_the_verdict_says_what_new_labels_mean(small_plan: AdaptationPlan) -> None:
    words = " ".join(verdict(info_of(small_plan, given_digest="9" * 64), result_of(), None))
    assert "The labels are new, so the output layer was, too" in words


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 0, 0), "1 person: all images train"),
        ((1, 1, 0), "2 persons: nobody was left to test on."),
        ((2, 0, 1), "3 persons: nobody was left to choose an epoch"),
        ((2, 1, 1), ""),
    ],
)
def test_too_few_persons_are_said_in_words(counts: tuple[int, int, int], words: str) -> None:
    names = ("training", "validation", "test")
    note = persons_note(dict(zip(names, counts, strict=True)))
    assert note.startswith(words)
    assert bool(note) == bool(words)
