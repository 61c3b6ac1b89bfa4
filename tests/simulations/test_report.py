"""The report says what was measured, in one file that loads and runs nothing."""

import pickle
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.gate_decision import GateDecision, GateLine
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import initial_state
from dafne_federated.simulations.report import write_report
from dafne_federated.simulations.test_results import (
    ARMS,
    Overlay,
    TestRow,
    save_overlays,
    save_test_rows,
)
from tests.browser import complaints, needs_browser, on_a_phone

EVIL = '</td><script>alert("x")</script>'
NORTH, SOUTH = "north", f"south {EVIL}"
VASTUS, RECTUS = "vastus $x_1$", 'rectus"><img src=x onerror=alert(1)>'
NOTICE = "Research software, not a medical device."
BASE = bytes(1_000_000)
# Dice of base, local only and federated, by site, person, case and label
MEASURED = {
    (NORTH, "p1", "c1", VASTUS): (0.5, 0.70, 0.8),
    (NORTH, "p1", "c2", VASTUS): (0.7, 0.70, 0.8),
    (NORTH, f"p2 {EVIL}", f"c3 {EVIL}", VASTUS): (0.8, 0.80, 1.0),
    (NORTH, "p1", "c1", RECTUS): (0.3, 0.40, 0.5),
    (SOUTH, "p3", "c4", VASTUS): (0.6, 0.625, 0.64),
}
# by hand: north vastus ((0.5 + 0.7) / 2 + 0.8) / 2 = 0.7, all labels (0.7 + 0.3) / 2 = 0.5, all
# sites (0.5 + 0.6) / 2 = 0.55; local only 0.75, 0.575, 0.6; federated 0.9, 0.7, 0.67
EXPECTED = {
    "north vastus": ["2", "0.700", "0.750", "+0.050", "0.900", "+0.200"],
    "north": ["2", "0.500", "0.575", "+0.075", "0.700", "+0.200"],
    "south": ["1", "0.600", "0.625", "+0.025", "0.640", "+0.040"],
    "all": ["3", "0.550", "0.600", "+0.050", "0.670", "+0.120"],
}


@dataclass
class Page(HTMLParser):
    """Tags, attributes, table rows and text of a page; fails on tags that do not match."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def close(self) -> None:
        super().close()
        assert self._open == []


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _new_run(tmp_path_factory.mktemp("full") / "run")
    _add_rounds(folder, 3)
    _finish(folder)
    _add_tests(folder)
    return write_report(folder)


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return _parse(full)


def test_the_verdict_says_what_the_numbers_carry(page: Page) -> None:
    assert "raised mean Dice from 0.55 to 0.67 on persons that nobody trained on" in page.text
    assert "(3 persons of 2 sites; higher in 3 of 3 persons)" in page.text
    assert "training each site alone reached 0.60." in page.text
    assert "Released as Limb_1.model, the state after round 2: it is better." in page.text


def test_tables_show_the_means_that_a_hand_computes(page: Page) -> None:
    start = page.rows.index(["Label", "Persons", *_heads()])
    rows = page.rows[start + 1 :]
    assert rows[0] == ["north"]
    assert rows[1] == [VASTUS, *EXPECTED["north vastus"]]
    assert rows[2] == [RECTUS, "1", "0.300", "0.400", "+0.100", "0.500", "+0.200"]
    assert rows[3] == ["all labels", *EXPECTED["north"]]
    assert rows[4] == [SOUTH]
    assert rows[6] == ["all labels", *EXPECTED["south"]]
    assert rows[7:9] == [["All sites"], ["all labels", *EXPECTED["all"]]]


def test_distance_and_volume_are_shown_by_arm(page: Page) -> None:
    # HD95 is 10 mm times what is missing from a Dice of 1, the volume error -10 % times it
    volumes = [f"{size} (\N{MINUS SIGN}{size})" for size in ("4.0", "3.8", "3.6")]
    row = [VASTUS, "1", "4.0", "3.8", "3.6", *volumes]
    assert row in page.rows


def test_a_label_drawn_where_it_is_not_is_counted(page: Page) -> None:
    assert [RECTUS, "0 of 1", "0 of 1", "0 of 1", "1 of 1", "0 of 1", "0 of 1"] in page.rows


def test_refusals_are_listed_with_their_reasons(page: Page) -> None:
    assert [f"far {EVIL}", "joining", "did not take part", f"not approved {EVIL}"] in page.rows
    assert [SOUTH, "2", "refused", f"array 'a' {EVIL}"] in page.rows


def test_traffic_is_summed_and_compared_with_whole_models(page: Page) -> None:
    # down: 2 sites x 3 rounds x 0.05 MB and the base twice; up: 2 sites x 3 rounds x 0.025 MB;
    # whole models: 6 down and 4 up of 1 MB
    assert "received 2.30 MB and sent 0.15 MB" in page.text
    assert "would have taken 10.0 MB: this run took 24.5\u202f% of that" in page.text
    row = ["1", "north", "1.050", "0.025", "7.5", "1.5", "4", "40", "CPU", "ok"]
    assert row in page.rows
    assert ["2", SOUTH, "0.050", "0.025", *["\N{EN DASH}"] * 4, "", "refused"] in page.rows


def test_validation_dice_behind_the_release_are_shown(page: Page) -> None:
    assert [VASTUS, "2", "0.500", "0.700", "+0.200"] in page.rows


def test_lineage_and_method_are_shown(page: Page) -> None:
    for word in (sha256(BASE), "d" * 64, "e" * 64, "dafne-federated simulate <here>", "0.1.0-test"):
        assert word in page.text
    # conv (3, 3, 2, 4) at rank 2: 18 x 2 and 2 x 4; delta: 5
    assert "lora, rank 2, 2 weight arrays changed, 49 trained parameters" in page.text


def test_the_notice_stands_at_top_and_bottom(page: Page) -> None:
    text = page.text.strip()
    assert text.count(NOTICE) == 2
    assert text.endswith(NOTICE)
    assert text.index(NOTICE) < text.index("Run abababab")


def test_nothing_is_loaded_and_nothing_runs(full: Path, page: Page) -> None:
    html = full.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|javascript:", html)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "base",
        "form",
    }
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or "data:"
            assert value.startswith("data:"), (tag, name)


def test_names_are_shown_as_they_are_and_never_obeyed(page: Page) -> None:
    for name in (EVIL, VASTUS, RECTUS):
        assert name in page.text
    assert len([tag for tag, a in page.tags if tag == "img" and a["src"] == "x"]) == 0


def test_every_picture_has_a_size_and_every_figure_words(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(int(a["width"] or 0) > 0 and int(a["height"] or 0) > 0 for a in pictures)
    words = {a["alt"] for a in pictures if a["alt"]}
    assert f"Mean Dice of 2 persons of {NORTH}: base 0.50, local only 0.57, federated 0.70" in words
    assert f"Federated model on slice 3 of c3 {EVIL}" in words
    assert f"Dice of {NORTH} over rounds: {VASTUS} from 0.50 to 0.70" in words


def test_overlays_name_lowest_and_highest_person(page: Page) -> None:
    assert f"{SOUTH}, p3 (lowest Dice of all test persons)" in page.text
    assert f"{NORTH}, p2 {EVIL} (highest Dice of all test persons)" in page.text


def test_the_same_folder_gives_the_same_bytes(full: Path) -> None:
    before = full.read_bytes()
    assert write_report(RunFolder(full.parent)) == full
    assert full.read_bytes() == before


def test_the_report_of_a_version_compares_with_its_start_and_with_the_base(tmp_path: Path) -> None:
    def decided(change: float) -> GateDecision:
        lines = (
            GateLine(site="", label=VASTUS, persons=7, change=change, lower=None, falls=False),
        )
        return GateDecision(
            accepted=True, reason="", few=False, persons=7, change=change, lines=lines
        )

    folder = _new_run(tmp_path / "run")
    _add_rounds(folder, 3)
    _finish(folder)
    both = decided(0.111).model_copy(update={"against": "start", "base": decided(0.222)})
    for decision, shown in (
        (decided(0.222), {"base": "+0.222"}),
        (both, {"start": "+0.111", "base": "+0.222"}),
    ):
        folder.finish(folder.result().model_copy(update={"decision": decision}))
        page = _parse(write_report(folder))
        heads = [row[3] for row in page.rows if row[2:3] == ["Persons who accept"]]
        assert heads == [f"vs {name}" for name in shown]
        changes = [row[3] for row in page.rows if row[1:3] == ["all together", "7"]]
        assert changes == list(shown.values())
        assert ("from the release that this version started from" in page.text) == (len(shown) > 1)


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    page = _parse(write_report(_new_run(tmp_path / "run")))
    assert "has not ended: 0 of 2 rounds of training are on record" in page.text
    for note in ("No round is on record yet", "No test on unseen persons", "Nothing was refused"):
        assert note in page.text
    assert page.text.count(NOTICE) == 2


def test_a_run_that_is_going_on_says_so(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    _add_rounds(folder, 1)
    page = _parse(write_report(folder))
    assert "has not ended: 1 of 2 rounds" in page.text
    assert "No decision about a release is on record yet" in page.text


def test_a_deployment_is_judged_by_its_validation_persons(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    _add_rounds(folder, 3)
    _finish(folder)
    page = _parse(write_report(folder))
    assert "raised mean Dice from 0.50 to 0.70 on the validation persons of 1 site" in page.text
    assert "expect less on new ones" in page.text
    assert "No overlays are on record" in page.text


def test_a_report_without_the_base_has_no_ratio(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    _add_rounds(folder, 3)
    folder.base.unlink()
    page = _parse(write_report(folder))
    assert "sent 0.15 MB" in page.text
    assert "whole model" not in page.text


def test_trained_parameters_are_a_share_of_those_of_a_base_that_can_be_read(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    weights = [np.zeros((7, 70), np.float32)]
    folder.base.write_bytes(pickle.dumps({"model_id": "m", "timestamp_id": 1, "weights": weights}))
    page = _parse(write_report(folder))
    assert "49 trained parameters beside 490 of the base (10\u202f%)" in page.text


def test_a_site_whose_test_persons_have_no_label_is_shown_without_a_mean(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    nothing = {"person": "p", "case": "c", "label": VASTUS, "dice": None, "hd95": None}
    rows = [TestRow(arm=arm, site=SOUTH, volume_error=None, **nothing) for arm in ARMS]
    save_test_rows(folder, [*rows, *_rows(NORTH, "q", "d", VASTUS, (0.5, 0.6, 0.7))])
    page = _parse(write_report(folder))
    assert ["all labels", "0", *["\N{EN DASH}"] * 5] in page.rows
    assert ["all labels", "1", "0.500", "0.600", "+0.100", "0.700", "+0.200"] in page.rows


def test_a_run_without_a_release_says_why(tmp_path: Path) -> None:
    folder = _new_run(tmp_path / "run")
    _add_rounds(folder, 3)
    _finish(folder, released=False)
    page = _parse(write_report(folder))
    assert "Nothing was released: it is better." in page.text
    assert "Released as" not in page.text


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not found; is .* the folder of a run"):
        write_report(RunFolder(tmp_path))


@pytest.mark.parametrize("name", ["events.jsonl", "result.json", "test.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = _new_run(tmp_path / "run")
    (folder.path / name).write_text('{"event": "members"}\n')
    with pytest.raises(RunError, match=re.escape(name)):
        write_report(folder)


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_it_on_a_phone_without_complaint(full: Path, tmp_path: Path) -> None:
    html = full.read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    assert complaints(tmp_path / "report.html", tmp_path) == ""
    seen = on_a_phone(html, tmp_path)
    assert seen.inner == 360
    assert seen.content <= seen.inner
    assert seen.broken == 0
    assert seen.images > 10


def _heads() -> list[str]:
    return ["base", "local only", "vs base", "federated", "vs base"]


def _parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def _new_run(path: Path) -> RunFolder:
    plan = AdaptationPlan(
        base_digest=sha256(BASE),
        method="lora",
        rank=2,
        max_rank=4,
        scale=1.0,
        labels=(VASTUS, RECTUS),
        targets=(
            Target(key="0000", layer="conv", kind="conv", shape=(3, 3, 2, 4)),
            Target(key="0001", layer="head", kind="delta", shape=(5,)),
        ),
    )
    info = RunInfo(
        run="ab" * 16,
        created=1_700_000_000,
        base_digest=plan.base_digest,
        base_name=f"Limb {EVIL} {'x' * 80}",
        plan_digest=plan.digest,
        settings=RunSettings(rounds=2),
        versions={"dafne-federated": "0.1.0-test"},
        command="dafne-federated simulate <here>",
    )
    return RunFolder.create(path, info, plan, BASE)


def _add_rounds(folder: RunFolder, count: int) -> None:
    state = initial_state(folder.plan(), 1)
    folder.event("members", sites=[NORTH], declined={f"far {EVIL}": f"not approved {EVIL}"})
    for number in range(1, count + 1):
        trained = number <= 2
        sites = {}
        for site in (NORTH, SOUTH):
            sites[site] = SiteRound(
                status="ok",
                training_cases=4 if trained else 0,
                training_slices=40 if trained else 0,
                seconds=7.5 if trained else 0.0,
                evaluation_seconds=1.5,
                bytes_down=50_000 + (len(BASE) if number == 1 else 0),
                bytes_up=25_000,
                dice={VASTUS: 0.4 + 0.1 * number, RECTUS: None} if site == NORTH else {},
                dice_cases={VASTUS: 2, RECTUS: 0} if site == NORTH else {},
                device="CPU",
            )
        if number == 2:
            sites[SOUTH] = SiteRound(
                status="refused", reason=f"array 'a' {EVIL}", bytes_down=50_000, bytes_up=25_000
            )
        line = RoundLine(
            round=number,
            trained=trained,
            sites=sites,
            aggregation_error=0.01 if trained else None,
            state_digest="c" * 64,
            seconds=20.0,
        )
        folder.finish_round(line, state)


def _finish(folder: RunFolder, released: bool = True) -> None:
    result = RunResult(
        released=released,
        reason="it is better",
        round=2 if released else None,
        release="Limb_1.model" if released else "",
        release_digest="d" * 64 if released else "",
        content_digest="e" * 64 if released else "",
        base_dice={NORTH: {VASTUS: 0.5, RECTUS: None}},
        dice={NORTH: {VASTUS: 0.7, RECTUS: None}},
    )
    folder.finish(result)


def _add_tests(folder: RunFolder) -> None:
    rows = [row for key, values in MEASURED.items() for row in _rows(*key, values)]
    for arm in ARMS:  # the label is not there; only the base draws it
        drawn = 0.0 if arm == "base" else None
        rows.append(
            TestRow(
                arm=arm, site=SOUTH, person="p3", case="c4", label=RECTUS,
                dice=drawn, hd95=None, volume_error=None,
            )
        )  # fmt: skip
    save_test_rows(folder, rows)
    save_overlays(
        folder, [_overlay(NORTH, f"p2 {EVIL}", f"c3 {EVIL}"), _overlay(SOUTH, "p3", "c4")]
    )


def _rows(
    site: str, person: str, case: str, label: str, values: tuple[float, ...]
) -> list[TestRow]:
    return [
        TestRow(
            arm=arm, site=site, person=person, case=case, label=label,
            dice=dice, hd95=10 * (1 - dice), volume_error=-10 * (1 - dice),
        )
        for arm, dice in zip(ARMS, values, strict=True)
    ]  # fmt: skip


def _overlay(site: str, person: str, case: str) -> Overlay:
    rng = np.random.default_rng(3)
    truth = np.zeros((20, 24), np.uint8)
    truth[4:10, 5:15], truth[12:16, 6:12] = 1, 2
    return Overlay(
        site=site,
        person=person,
        case=case,
        slice_index=2,
        image=rng.normal(size=(20, 24)).astype(np.float32),
        truth=truth,
        predictions={arm: np.roll(truth, shift, 1) for shift, arm in enumerate(ARMS)},
        spacing=np.array([2.0, 1.0]),
        orientation="RA",
    )
