"""The section of the report that compares the space's references with what the search proposed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from archsearch.reports.study.data import load_study_data
from archsearch.reports.study.references import ReferenceSection
from archsearch.reports.study_report import write_report
from archsearch.score import Cost, Quality, Score
from archsearch.spaces.loading import load_space
from tests.archsearch.reports import factory
from tests.records import latency_record

EMOJI = load_space("emoji")
SNAPGEN = EMOJI.references["snapgen"]
NEAR = {**SNAPGEN, "qk_norm": 0, "rope": 0}
FAR = {**EMOJI.base_point, "all.ffn_ratio": 0}
SLOW = {**EMOJI.base_point, "all.ffn_ratio": 1}


def section(
    folder: Path, points: list[tuple[str | None, dict[str, int], float, float]], *, seeds: int = 2, proxy: str = ""
) -> ReferenceSection:
    """The section of a study of these names, points, losses and milliseconds; its seeds differ by 0.002 of the loss."""
    study = factory.create(folder, candidates=0)
    for slot, (name, point, loss, ms) in enumerate(points):
        by_seed = [loss + d for d in ((-0.001, 0.001) if slot % 2 else (0.001, -0.001))[:seeds]]
        quality = Quality(
            validation_loss=factory.estimate(by_seed, 0.03),
            extractor="e",
            protocol_hash=factory.HASH,
            training_seconds=1,
            proxy=proxy or None,
        )
        cost = Cost(params=10**6, macs=10**7, activation_bytes=10**5)
        factory.add(study, EMOJI, slot, point, Score(cost=cost, latency=latency_record(ms), quality=quality), name=name)
    if proxy:
        study.set_user_attr("space", {**study.user_attrs["space"], "proxy": {"name": proxy}})
    return ReferenceSection(load_study_data(study))


CANDIDATES: list[tuple[str | None, dict[str, int], float, float]] = [
    ("base", EMOJI.base_point, 0.60, 8.0),
    ("snapgen", dict(SNAPGEN), 0.50, 4.0),
    (None, NEAR, 0.48, 3.0),  # better and faster than the reference
    (None, FAR, 0.501, 2.0),  # as good within the noise, at half its latency
    (None, SLOW, 0.47, 5.0),  # too slow to count for the gap
]


def test_the_distance_from_the_front_has_its_interval(tmp_path: Path) -> None:
    found = section(tmp_path, CANDIDATES)
    heads = ("Validation loss [95 % interval]", "Latency (ms) [quartiles]", "gap [95 % interval]")
    assert found.distances().header[:5] == ("reference", *heads, "ratio")
    (row,) = found.distances().rows
    name, loss, ms, gap, ratio = row[:5]
    assert name == "snapgen"
    assert loss.startswith("0.5")
    assert ms == "4.00"
    value, _, interval = gap.partition(" ")
    assert value == "+0.0200"
    low, high = (float(end.strip("[]").replace("−", "-")) for end in interval.split(", "))
    assert 0 < low < 0.02 < high < 0.04  # not as wide as the intervals that candidates have alone
    assert ratio == "1.33 (2.00)"


def test_a_reference_ahead_of_all_others_has_a_gap_below_zero_and_no_ratio(tmp_path: Path) -> None:
    (row,) = (
        section(tmp_path, [("base", EMOJI.base_point, 0.60, 2.0), CANDIDATES[1], (None, FAR, 0.58, 3.0)])
        .distances()
        .rows
    )
    assert row[3].startswith("−0.08")
    assert row[4] == "–"


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    found = section(tmp_path, CANDIDATES, seeds=1)
    assert found.distances().rows[0][4] == "1.33"
    assert "[" not in "".join(found.distances().rows[0])
    assert "With a single seed the gap has no interval." in found.introduction()


def test_shared_choices_are_those_of_what_the_search_proposed(tmp_path: Path) -> None:
    found = section(tmp_path, CANDIDATES)
    assert {c.number for c in found._proposed} == {2, 3, 4}
    rows = {row[0]: row[1:] for row in found.choices("snapgen").rows}
    assert list(rows) == [knob.name for knob in EMOJI.knobs]
    assert rows["convs"][:3] == ("separable ×2", "1 of 3", "33\u00a0%")
    assert rows["rope"][:2] == ("true", "0 of 3")
    shared = [sum(point[knob] == SNAPGEN[knob] for knob in SNAPGEN) for point in (NEAR, FAR, SLOW)]
    assert found.distances().rows[0][5] == f"{sum(shared) / 3:.1f} of 14"
    best = found.study.best
    assert found.distances().rows[0][6] == f"{sum(best.point[knob] == SNAPGEN[knob] for knob in SNAPGEN)} of 14"
    for knob, row in rows.items():
        assert (row[3] == "same") == (best.point[knob] == SNAPGEN[knob])
    by_chance = sum(1 / len(knob.choices) for knob in EMOJI.knobs)
    assert f"a random point shares {by_chance:.1f}" in found.summary("snapgen")
    assert "snapgen is not on the front" in found.summary("snapgen")


def test_a_reference_without_a_score_keeps_its_choices(tmp_path: Path) -> None:
    found = section(tmp_path, [CANDIDATES[0], *CANDIDATES[2:]])
    assert found.distances().rows[0][1:5] == ("not scored", "–", "–", "–")
    assert len(found.choices("snapgen").rows) == 14


@pytest.mark.parametrize(
    ("state", "record", "shown"),
    [
        ("PRUNED", {"infeasible": "latency_ms 12, limit 9"}, "infeasible: latency_ms 12, limit 9"),
        ("FAIL", {"error": "RuntimeError: out of memory"}, "failed: RuntimeError: out of memory"),
        ("FAIL", {"error": "MeasurementError: no conv", "refused": True}, "rejected: MeasurementError: no conv"),
    ],
)
def test_a_reference_that_was_tried_says_why_it_has_no_score(
    tmp_path: Path, state: str, record: dict[str, object], shown: str
) -> None:
    study = factory.create(tmp_path, candidates=0)
    cost = Cost(params=10**6, macs=10**7, activation_bytes=10**5)
    quality = factory.made_up_quality(EMOJI.base, random.Random(0))
    base = Score(cost=cost, latency=latency_record(), quality=quality)
    factory.add(study, EMOJI, 0, EMOJI.base_point, base, name="base")
    score = Score(cost=cost) if state == "PRUNED" else None
    factory.add(study, EMOJI, 1, SNAPGEN, score, name="snapgen", state=state, **record)
    found = ReferenceSection(load_study_data(study))
    assert found.distances().rows[0][1:5] == (shown, "–", "–", "–")
    assert f"| snapgen | {shown} |" in found.markdown()


def test_of_many_references_only_the_last_ones_choices_are_listed(tmp_path: Path) -> None:
    found = section(tmp_path, CANDIDATES)
    space = found.study.attrs["space"]
    space["references"] |= dict.fromkeys(("row 1", "row 2", "last"), space["references"]["snapgen"])
    assert found._listed == ["last"]
    assert len(found.distances().rows) == 4


def test_the_section_is_on_the_page_and_in_markdown(tmp_path: Path) -> None:
    page = write_report(factory.create(tmp_path), tmp_path / "report.html")
    assert '<section id="references"' in page.read_text()
    assert "### Choices of snapgen" in page.with_suffix(".md").read_text()


def test_a_space_without_references_has_no_section(tmp_path: Path) -> None:
    study = factory.create(tmp_path)
    study.set_user_attr("space", {**EMOJI.to_dict(), "references": {}})
    page = write_report(study, tmp_path / "report.html")
    assert 'id="references"' not in page.read_text()
    assert not page.with_suffix(".md").exists()


@pytest.mark.parametrize("objectives", [("latency_ms", "params"), ("validation_loss",)])
def test_without_quality_and_cost_only_choices_are_compared(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    found = ReferenceSection(load_study_data(factory.create(tmp_path, objectives=objectives)))
    assert found.distances().header == ("reference", "choices shared by the front", "by the recommended")
    assert "Gap" not in found.introduction()
    assert "<table" in found.html()


def test_every_number_of_a_twin_says_so(tmp_path: Path) -> None:
    found = section(tmp_path, CANDIDATES, proxy="small")
    assert found.distances().header[1] == "Validation loss of the twin in small [95 % interval]"
    assert "Gap: a design's validation loss of the twin in small, minus" in found.introduction()
    assert found.distances().header[2] == "Latency (ms) [quartiles]"
