"""The report of an evolving study, alone and compared with a sampler's search, on made-up rounds."""

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
from archsearch.reports.evolution.charts import importance_map, path_chart
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.evolution.section import EvolutionSection
from archsearch.reports.study.data import load_study_data
from archsearch.stats.estimate import Estimate
from snapgen.architecture import block_index
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
def evolution(study: optuna.Study) -> Evolution:
    rounds = data.load_evolution(load_study_data(study))
    assert rounds is not None
    return rounds


@pytest.fixture(scope="module")
def written(study: optuna.Study, other: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_report.write_report(study, tmp_path_factory.mktemp("page") / "report.html", compare_with=other)


def test_a_search_has_no_rounds(other: optuna.Study, tmp_path: Path) -> None:
    assert data.load_evolution(load_study_data(other)) is None
    assert "evolution-title" not in study_report.write_report(other, tmp_path / "r.html").read_text()
    assert "## Rounds" not in (tmp_path / "r.md").read_text()
    assert "## The block table" not in (tmp_path / "r.md").read_text()


def test_the_map_has_every_block_of_every_round(evolution: Evolution) -> None:
    figure = importance_map(evolution)
    go.Figure(figure)
    heat, dots = figure["data"]
    assert heat["x"] == [0, 1, 2, 3, 4, 5]
    valued = sum(cell is not None for row in heat["z"] for cell in row)
    assert valued == sum(len(s.round.worths) for s in evolution.rounds)
    assert valued + len(dots["x"]) == sum(len(s.blocks) for s in evolution.rounds)
    marks = [mark for row in heat["text"] for mark in row] + dots["text"]
    assert marks.count("×") == sum(len(s.round.removed) for s in evolution.rounds) > 0
    assert marks.count("+") == sum(len(s.round.copied) for s in evolution.rounds) > 0
    first = evolution.rounds[0].round.worths[0]
    row = figure["layout"]["yaxis"]["ticktext"].index("ResNet 0")
    assert first.label in heat["hovertext"][row][0]
    assert f"costs {first.ms:.3g} ms" in heat["hovertext"][row][0]


def test_colors_follow_the_importance_and_have_a_color_bar(evolution: Evolution) -> None:
    heat = importance_map(evolution)["data"][0]
    cells = [
        (heat["z"][i][j], w.value)
        for j, step in enumerate(evolution.rounds)
        for w in step.round.worths
        for i, row in enumerate(heat["hovertext"])
        if f"<b>{w.label}</b>," in row[j]
    ]
    assert [z for z, _ in sorted(cells)] == sorted(z for z, _ in cells)
    assert [v for _, v in sorted(cells)] == sorted(v for _, v in cells)
    bar = heat["colorbar"]
    assert len(bar["tickvals"]) == len(bar["ticktext"]) > 2
    assert "0" in bar["ticktext"]


def test_the_path_joins_each_round_with_its_parent(evolution: Evolution, other: optuna.Study) -> None:
    figure = path_chart(evolution, "validation_loss", load_study_data(other))
    go.Figure(figure)
    joined = next(t for t in figure["data"] if t["mode"] == "lines" and None in t["x"])
    assert joined["x"].count(None) == len(evolution.rounds) - 1
    assert {n["text"] for n in figure["layout"]["annotations"]} >= {"0", "5", f"target {factory.TARGET_MS:g} ms"}
    hovers = [text for t in figure["data"] for text in t.get("hovertext", [])]
    assert sum("Round" in text for text in hovers) == len(evolution.rounds)
    assert sum("emoji_blocks" in text for text in hovers) == 14
    assert any("removed CA" in text for text in hovers)


def test_rounds_in_words_and_numbers(evolution: Evolution) -> None:
    header, rows, _ = tables.rounds(evolution)
    assert {len(header)} == {len(row) for row in rows}
    assert header[3:5] == ("measured ms [quartiles]", "ms by the block table")
    assert rows[0][1:3] == ["robust training", "trained with block dropout"]
    assert rows[1][2].startswith("removed ")
    assert rows[-1][1] == "final training"
    assert float(rows[-1][-1]) == pytest.approx(evolution.last.round.training_macs / 1e12, rel=0.01)


def test_an_abandoned_round_is_counted_in_what_was_spent(evolution: Evolution) -> None:
    """Round 5 is made a child of round 3; the training of the abandoned round 4 is still counted."""
    rounds = list(evolution.rounds)
    before = rounds[3].round.training_macs
    own = 7e9
    last = rounds[5].round.model_copy(update={"parent": 3, "training_macs": before + own})
    rounds[5] = data.RoundResult(last, rounds[5].candidate)
    branched = Evolution(evolution.study, tuple(rounds))
    assert branched.cumulative_macs[5] == pytest.approx(rounds[4].round.training_macs + own)
    assert branched.action(branched.last).startswith("from round 3: ")


def test_counts_of_both_networks_add_up(evolution: Evolution) -> None:
    counts = tables.block_counts(evolution)
    blocks = [(b.kind) for b in evolution.last.blocks]
    assert sum(c.transformers[1] for c in counts) == blocks.count("transformer")
    assert sum(c.residual[1] for c in counts) == blocks.count("residual")
    assert sum(c.residual[0] for c in counts) == 13
    published = tables.counts(tables.PUBLISHED_COUNTS)
    assert published.rows[-1] == ["All", "16 → 14", "88\u00a0%", "22 → 17", "77\u00a0%"]


def test_the_published_counts_are_the_presets() -> None:
    """The shipped presets hold the table, with their lowest level in its middle."""
    from snapgen.architecture.presets import preset

    for i, name in enumerate(("sd15", "snapfusion")):
        arch = preset(name)
        where = {f"Down {n + 1}": arch.down[n] for n in range(3)} | {f"Up {n + 1}": arch.up[n] for n in range(3)}
        for counts in tables.PUBLISHED_COUNTS:
            levels = [where.get(counts.level.partition(",")[0])]
            if counts.level == "Middle":
                levels = [arch.down[3], arch.mid, arch.up[3]]
            assert sum(level.num_transformers for level in levels) == counts.transformers[i]
            assert sum(level.num_res_blocks for level in levels) == counts.residual[i]


def test_the_best_of_each_at_the_target_for_the_same_compute(evolution: Evolution, other: optuna.Study) -> None:
    both = baseline.compare(evolution, load_study_data(other))
    assert both.mismatch == ""
    assert both.budget < both.baseline_entries[-1].training_macs
    equal, baseline_row, full, _ = (dict(zip(both.table.header, row, strict=True)) for row in both.table.rows)
    limit = evolution.settings.max_ms
    eligible = [s for s in evolution.rounds if s.latency and s.latency.median_ms <= limit]
    best = min(eligible, key=lambda s: s.round.quality.value)
    assert equal["Best at the target"] == full["Best at the target"] == f"round {best.round.number}"
    cheap = [e for e in both.baseline_entries if e.training_macs <= both.budget and e.latency.median_ms <= limit]
    assert baseline_row["Best at the target"] == (min(cheap, key=lambda e: e.quality.value).title if cheap else "none")
    assert float(baseline_row["TMACs used"]) <= both.budget / 1e12


@pytest.mark.parametrize(
    ("evolved", "verdict"), [((0.30, 0.01), "better"), ((0.50, 0.01), "worse"), ((0.41, 0.01), "cannot tell")]
)
def test_the_verdict_is_by_both_intervals(evolved: tuple[float, float], verdict: str) -> None:
    def entry(value: float, half: float) -> baseline.BaselineEntry:
        return baseline.BaselineEntry(
            "", Estimate(value=value, low=value - half, high=value + half), latency_record(), 1
        )

    assert baseline._verdict(entry(*evolved), entry(0.4, 0.02)).startswith(verdict)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("validation_pairs", 64, "validation_pairs is 512 here, 64 there"), ("data_digest", "other", "data_digest is")],
)
def test_other_pairs_or_data_are_not_compared(evolution: Evolution, field: str, value: Any, message: str) -> None:
    protocol = copy.deepcopy(factory.RESOLVED)
    (protocol["protocol"] if field in protocol["protocol"] else protocol)[field] = value
    section = EvolutionSection.create(evolution, load_study_data(factory.sampled(candidates=3, protocol=protocol)))
    assert section.comparison is not None
    assert message in section.comparison.mismatch
    assert message in section.html()
    assert message in section.markdown()
    assert "its other candidates" not in section.html()


def test_different_training_is_compared_and_mentioned(evolution: Evolution) -> None:
    protocol = copy.deepcopy(factory.RESOLVED)
    protocol["protocol"] |= {"steps": 240, "train_seeds": [0, 1]}
    both = baseline.compare(evolution, load_study_data(factory.sampled(candidates=3, protocol=protocol)))
    assert both.mismatch == ""
    assert any("steps 900 here, 240 there" in line for line in both.remarks)
    counted = both.baseline.candidates[0].score.cost.macs
    assert both.baseline_entries[0].training_macs == 3 * counted * 240 * protocol["protocol"]["batch_size"]


def test_training_that_is_inherited_is_counted_first(evolution: Evolution) -> None:
    elastic = factory.sampled(candidates=3)
    elastic.set_user_attr("settings", elastic.user_attrs["settings"] | {"supernet_audit": {"supernet_images": 5000}})
    plain, both = (baseline.compare(evolution, load_study_data(s)) for s in (factory.sampled(candidates=3), elastic))
    more = 3 * 5000 * both.baseline.candidates[0].score.cost.macs
    assert [e.training_macs for e in both.baseline_entries] == pytest.approx(
        [e.training_macs + more for e in plain.baseline_entries]
    )


def test_the_page_and_its_tables(written: Path) -> None:
    text = written.read_text()
    assert {"importance-map", "path-validation_loss"} <= data_of(text)["charts"].keys()
    assert "Comparison with emoji_blocks" in text
    assert "within 10\u00a0%" in text
    markdown = written.with_suffix(".md").read_text()
    assert "| 5 | final training | trained further |" in markdown
    assert "| All | 16 → 14 |" in markdown
    assert "| equal for both | emoji_blocks |" in markdown


def test_time_outside_the_blocks_is_shown(study: optuna.Study) -> None:
    table = tables.load_block_table(study.user_attrs)
    assert table is not None
    shown = re.search(r"of which ([\d.]+) ms are outside the blocks", tables.check_lines(table)[0])
    assert shown is not None
    rest = table.predict(table.architecture) - sum(map(table.block_ms, block_index.blocks(table.architecture)))
    assert float(shown[1]) == pytest.approx(rest, rel=0.03)


def test_rounds_that_have_only_begun(tmp_path: Path) -> None:
    begun = factory.evolved(tmp_path, rounds=2, metric="retrieval")
    assert "Text–image cosine, negated" in study_report.write_report(begun, tmp_path / "r.html").read_text()
