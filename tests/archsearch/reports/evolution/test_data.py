"""The report of an evolving study, alone and beside a sampler's search, on invented rounds."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import pytest

from archsearch.reports import study_report
from archsearch.reports.evolution import baseline, data, tables
from archsearch.reports.evolution.charts import path_chart, worth_map
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.evolution.section import EvolutionSection
from archsearch.reports.study.data import load_study_data
from archsearch.stats.estimate import Estimate
from snapgen.architecture import block_index
from snapgen.errors import InputError
from tests.archsearch.reports import factory
from tests.archsearch.reports.test_study_report import data_of
from tests.records import latency_record


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    return factory.evolved(tmp_path_factory.mktemp("run"), rounds=6)


@pytest.fixture(scope="module")
def other() -> optuna.Study:
    return factory.sampled()


@pytest.fixture(scope="module")
def found(study: optuna.Study) -> Evolution:
    rounds = data.load_evolution(study, load_study_data(study))
    assert rounds is not None
    return rounds


@pytest.fixture(scope="module")
def written(study: optuna.Study, other: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_report.write_report(study, tmp_path_factory.mktemp("page") / "report.html", beside=other)


def test_a_search_has_no_rounds(other: optuna.Study, tmp_path: Path) -> None:
    assert data.load_evolution(other, load_study_data(other)) is None
    assert "evolution-title" not in study_report.write_report(other, tmp_path / "r.html").read_text()
    assert not (tmp_path / "r.md").exists()
    with pytest.raises(InputError, match="does not evolve"):
        study_report.write_report(other, tmp_path / "r.html", beside=other)


def test_the_map_has_every_block_of_every_round(found: Evolution) -> None:
    figure = worth_map(found)
    go.Figure(figure)
    heat, silent = figure["data"]
    assert heat["x"] == [0, 1, 2, 3, 4, 5]
    valued = sum(cell is not None for row in heat["z"] for cell in row)
    assert valued == sum(len(s.round.worths) for s in found.steps)
    assert valued + len(silent["x"]) == sum(len(s.blocks) for s in found.steps)
    marks = [mark for row in heat["text"] for mark in row] + silent["text"]
    assert marks.count("×") == sum(len(s.round.removed) for s in found.steps) > 0
    assert marks.count("+") == sum(len(s.round.copied) for s in found.steps) > 0
    first = found.steps[0].round.worths[0]
    row = figure["layout"]["yaxis"]["ticktext"].index("ResNet 0")
    assert first.label in heat["hovertext"][row][0]
    assert f"costs {first.ms:.3g} ms" in heat["hovertext"][row][0]


def test_colours_go_by_worth_and_bar_tells_it(found: Evolution) -> None:
    heat = worth_map(found)["data"][0]
    cells = [
        (heat["z"][i][j], w.value)
        for j, step in enumerate(found.steps)
        for w in step.round.worths
        for i, row in enumerate(heat["hovertext"])
        if f"<b>{w.label}</b>," in row[j]
    ]
    assert [z for z, _ in sorted(cells)] == sorted(z for z, _ in cells)
    assert [v for _, v in sorted(cells)] == sorted(v for _, v in cells)
    bar = heat["colorbar"]
    assert len(bar["tickvals"]) == len(bar["ticktext"]) > 2
    assert "0" in bar["ticktext"]


def test_the_path_joins_each_round_with_its_parent(found: Evolution, other: optuna.Study) -> None:
    figure = path_chart(found, "validation_loss", load_study_data(other))
    go.Figure(figure)
    joined = next(t for t in figure["data"] if t["mode"] == "lines" and None in t["x"])
    assert joined["x"].count(None) == len(found.steps) - 1
    assert {n["text"] for n in figure["layout"]["annotations"]} >= {"0", "5", f"target {factory.TARGET_MS:g} ms"}
    hovers = [text for t in figure["data"] for text in t.get("hovertext", [])]
    assert sum("Round" in text for text in hovers) == len(found.steps)
    assert sum("emoji_blocks" in text for text in hovers) == 14
    assert any("removed CA" in text for text in hovers)


def test_rounds_in_words_and_numbers(found: Evolution) -> None:
    header, rows = tables.round_header(found), tables.round_rows(found)
    assert {len(header)} == {len(row) for row in rows}
    assert header[3:5] == ["measured ms", "by the block table, ms"]
    assert rows[0][1:3] == ["robust training", "trained with block dropout"]
    assert rows[1][2].startswith("removed ")
    assert rows[-1][1] == "final training"
    assert float(rows[-1][-1]) == pytest.approx(found.last.round.training_macs / 1e12, rel=0.01)


def test_an_abandoned_round_is_counted_in_what_was_spent(found: Evolution) -> None:
    """Round 5 made to come from round 3: what round 4 took was spent all the same."""
    steps = list(found.steps)
    before = steps[3].round.training_macs
    own = 7e9
    last = steps[5].round.model_copy(update={"parent": 3, "training_macs": before + own})
    steps[5] = data.RoundResult(last, steps[5].candidate)
    branched = Evolution(found.facts, tuple(steps))
    assert branched.spent[5] == pytest.approx(steps[4].round.training_macs + own)
    assert branched.action(branched.last).startswith("from round 3: ")


def test_counts_of_both_networks_add_up(found: Evolution) -> None:
    counts = tables.counted(found)
    blocks = [(b.kind) for b in found.last.blocks]
    assert sum(c.transformers[1] for c in counts) == blocks.count("transformer")
    assert sum(c.residual[1] for c in counts) == blocks.count("residual")
    assert sum(c.residual[0] for c in counts) == 13
    published = tables.count_rows(tables.PUBLISHED)
    assert published[-1] == ["All", "16 → 14", "88\u00a0%", "22 → 17", "77\u00a0%"]


def test_the_published_counts_are_the_presets() -> None:
    """The shipped presets hold the table, with their lowest level in its middle."""
    from snapgen.architecture.presets import preset

    for i, name in enumerate(("sd15", "snapfusion")):
        arch = preset(name)
        where = {f"Down {n + 1}": arch.down[n] for n in range(3)} | {f"Up {n + 1}": arch.up[n] for n in range(3)}
        for counts in tables.PUBLISHED:
            stages = [where.get(counts.stage.partition(",")[0])]
            if counts.stage == "Middle":
                stages = [arch.down[3], arch.mid, arch.up[3]]
            assert sum(s.transformers for s in stages) == counts.transformers[i]
            assert sum(s.residual_blocks for s in stages) == counts.residual[i]


def test_the_best_of_each_at_the_target_for_the_same_compute(found: Evolution, other: optuna.Study) -> None:
    both = baseline.compare(found, load_study_data(other))
    assert both.refused == ""
    assert both.budget < both.theirs[-1].spent
    same, theirs, whole, _ = (dict(zip(baseline.COLUMNS, row, strict=True)) for row in baseline.rows(both))
    limit = found.settings.most_ms
    able = [s for s in found.steps if s.latency and s.latency.median_ms <= limit]
    best = min(able, key=lambda s: s.round.quality.value)
    assert same["Best at the target"] == whole["Best at the target"] == f"round {best.round.number}"
    cheap = [e for e in both.theirs if e.spent <= both.budget and e.latency.median_ms <= limit]
    assert theirs["Best at the target"] == (min(cheap, key=lambda e: e.quality.value).title if cheap else "none")
    assert float(theirs["TMACs used"]) <= both.budget / 1e12


@pytest.mark.parametrize(
    ("mine", "verdict"), [((0.30, 0.01), "better"), ((0.50, 0.01), "worse"), ((0.41, 0.01), "cannot tell")]
)
def test_the_verdict_is_by_both_intervals(mine: tuple[float, float], verdict: str) -> None:
    def entry(value: float, half: float) -> baseline.BaselineEntry:
        return baseline.BaselineEntry(
            "", Estimate(value=value, low=value - half, high=value + half), latency_record(), 1
        )

    assert baseline._decided(entry(*mine), entry(0.4, 0.02)).startswith(verdict)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("validation_pairs", 64, "validation_pairs is 512 here, 64 there"), ("data_digest", "other", "data_digest is")],
)
def test_other_pairs_or_data_are_not_compared(found: Evolution, field: str, value: Any, message: str) -> None:
    protocol = copy.deepcopy(factory.RESOLVED)
    (protocol["protocol"] if field in protocol["protocol"] else protocol)[field] = value
    section = EvolutionSection.of(found, load_study_data(factory.sampled(candidates=3, protocol=protocol)))
    assert section.rivals is not None
    assert message in section.rivals.refused
    assert message in section.html()
    assert message in section.markdown()
    assert "its other candidates" not in section.html()


def test_other_training_is_compared_and_said(found: Evolution) -> None:
    protocol = copy.deepcopy(factory.RESOLVED)
    protocol["protocol"] |= {"steps": 240, "seeds": [0, 1]}
    both = baseline.compare(found, load_study_data(factory.sampled(candidates=3, protocol=protocol)))
    assert both.refused == ""
    assert any("steps 900 here, 240 there" in line for line in both.remarks)
    counted = both.other.candidates[0].score.cost.macs
    assert both.theirs[0].spent == 3 * counted * 240 * protocol["protocol"]["batch"] * 2


def test_training_that_is_inherited_is_counted_first(found: Evolution) -> None:
    elastic = factory.sampled(candidates=3)
    elastic.set_user_attr("settings", elastic.user_attrs["settings"] | {"elastic": {"supernet_images": 5000}})
    plain, both = (baseline.compare(found, load_study_data(s)) for s in (factory.sampled(candidates=3), elastic))
    more = 3 * 5000 * both.other.candidates[0].score.cost.macs
    assert [e.spent for e in both.theirs] == pytest.approx([e.spent + more for e in plain.theirs])


def test_the_page_and_its_tables(written: Path) -> None:
    text = written.read_text()
    assert {"worth-map", "path-validation_loss"} <= data_of(text)["charts"].keys()
    assert "Beside emoji_blocks" in text
    assert "within 10\u00a0%" in text
    markdown = written.with_suffix(".md").read_text()
    assert "| 5 | final training | trained on |" in markdown
    assert "| All | 16 → 14 |" in markdown
    assert "| the same for both | emoji_blocks |" in markdown


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_what_is_no_blocks_is_shown_as_the_blocks_are(study: optuna.Study, power: float) -> None:
    """With a curve, blocks' milliseconds are shares of it; the fixed part is the rest of the whole."""
    table = tables.table_of(study.user_attrs)
    assert table is not None
    table = table.model_copy(update={"power": power, "scale": 2.0})
    shown = re.search(r"([\d.]+) ms are no block's", tables.check_lines(table)[0])
    assert shown is not None
    rest = table.predict(table.architecture) - sum(map(table.of, block_index.blocks(table.architecture)))
    assert float(shown[1]) == pytest.approx(rest, rel=0.03)


def test_rounds_that_have_only_begun(tmp_path: Path) -> None:
    begun = factory.evolved(tmp_path, rounds=2, metric="retrieval")
    assert "Text–image cosine, negated" in study_report.write_report(begun, tmp_path / "r.html").read_text()
