"""Table of an ablation in every format, and the sentences on what it reproduces."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archsearch.reports.ablation import page as ablation_page, report, reproduction, table
from archsearch.studies.experiments.ablation import ablate
from archsearch.studies.experiments.ablation_results import Ablation, load_results
from snapgen.errors import InputError
from tests.archsearch.studies import quick
from tests.archsearch.studies.config.test_ablation import LADDER

PUBLISHED: dict[str, Any] = {
    "0": {"frechet_distance": {"value": 3.76}},
    "1": {"params": {"value": -2}, "macs": {"value": -17}, "frechet_distance": {"value": 3.12}},
    "2b": {"latency_ms": {"value": -58.3, "quote": "2.4× faster"}, "frechet_distance": {"quote": "restored"}},
    "3": {"frechet_distance": {"quote": "better"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ablation]:
    """Factory of an ablation with made-up scores; equal arguments give the same ablation."""
    folder = tmp_path_factory.mktemp("ablation")
    cache: dict[str, Ablation] = {}

    def make(**changes: Any) -> Ablation:
        key = json.dumps(changes, sort_keys=True)
        if key not in cache:
            rows = {name: {**row, "published": PUBLISHED.get(name, {})} for name, row in LADDER.items()}
            given = {"rows": rows, "final_row": "3", "one_at_a_time": True, "published_source": "a paper & more"}
            values = {"name": f"rows_{len(cache)}", "ablation": given, "trials": None, **changes}
            values["storage"] = f"sqlite:///{folder / 'study.db'}"
            values["artifacts"] = str(folder / "artifacts")
            settings = quick.settings(folder, **{"protocol": {"train_seeds": [0, 1, 2]}, **values})
            cache[key] = load_results(ablate(settings, quiet=True, scorer=quick.QuickScorer))
        return cache[key]

    return make


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Made = Callable[..., Ablation]


def test_every_format_is_written(made: Made, tmp_path: Path) -> None:
    out = report.write_ablation(made(), tmp_path / "deep" / "table.tex")
    assert out == tmp_path / "deep" / "table.tex"
    assert {path.suffix for path in out.parent.iterdir()} == set(report.SUFFIXES)


def test_another_suffix_is_an_input_error(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a format of the table; use one of the suffixes \.html, \.md"):
        report.write_ablation(made(), tmp_path / "table.pdf")
    assert not list(tmp_path.iterdir())


def test_markdown_has_our_and_the_published_numbers(made: Made) -> None:
    text = table.markdown(made())
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    header = table.header(made(), "ladder")
    at = {name: i for i, name in reversed(list(enumerate(header)))}
    ours = made().result("1").changes["params"]
    assert cells[at["Δ params"]] == f"{ours:+.1f} %".replace("-", "−")
    assert cells[at["published"]] == "−2 %"
    assert cells[at["difference, points"]] == f"{ours + 2:+.1f}".replace("-", "−").replace("+0.0", "0.0")
    assert cells[-1] == "3.12"
    assert "2.4× faster (−58 %)" in text
    assert text.count("## ") == 5
    without = [line for line in text.splitlines() if line.startswith("| 3 without 1 |")]
    assert "published" not in table.header(made(), "leave_one_out")
    assert len(without) == 1


def test_csv_is_read_back_with_the_exact_numbers(made: Made) -> None:
    from archsearch.reports.rendering import tables

    rows = list(csv.DictReader(io.StringIO(tables.csv(report.frame(made())))))
    assert [row["row"] for row in rows] == [r.planned.name for r in made().results]
    by_name = {row["row"]: row for row in rows}
    result = made().result("2b")
    assert float(by_name["2b"]["params_change_percent"]) == pytest.approx(result.changes["params"])
    assert float(by_name["2b"]["latency_ms_published_percent"]) == -58.3
    apart = result.apart("latency_ms")
    assert float(by_name["2b"]["latency_ms_points_apart"]) == pytest.approx(apart)
    effect = result.effects["validation_loss"]
    assert float(by_name["2b"]["validation_loss_difference"]) == pytest.approx(effect.difference.value)
    assert by_name["2b"]["validation_loss_verdict"] == effect.verdict
    assert by_name["0"]["validation_loss_verdict"] == ""
    assert by_name["0"]["latency_source"] == "measured"


def test_latex_is_plain_and_balanced(made: Made) -> None:
    text = table.latex(made())
    assert text.isascii()
    for part in ("table", "tabular"):
        assert text.count(f"\\begin{{{part}}}") == text.count(f"\\end{{{part}}}") == 3
    assert text.count("\\caption{") == text.count("\\label{tab:") == 3
    published = [g for g in table.GROUPS if any("published" in column for column in table.header(made(), g))]
    assert 0 < text.count("points apart: ours minus") == len(published) < 3, "only of columns that are there"
    assert "\\usepackage{booktabs}" in text, "what it needs is named"
    body = [line for line in text.splitlines() if not line.startswith("%")]
    rows = [line for line in body if line.endswith("\\\\") and " & " in line]
    spans = [sum(map(int, re.findall(r"multicolumn\{(\d+)\}", line))) for line in rows if "multicolumn" in line]
    assert all(spans), "the columns of a number stand under its name"
    widths = {line.count(" & ") for line in rows if "multicolumn" not in line}
    assert widths == {len(table.header(made(), g)) - 1 for g in table.GROUPS}
    assert "a paper & more" in text, "comments need no escapes"
    assert "2.4$\\times$ faster ($-$58 \\%)" in text
    assert re.search(r"multicolumn\{4\}\{c\}\{latency\}", text)
    assert "& $\\Delta$ & published & points apart &" in text
    assert "?" not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="TeX is not installed")
def test_latex_compiles_in_a_paper(made: Made, tmp_path: Path) -> None:
    packages = "\\usepackage{booktabs}\n\\usepackage{graphicx}"
    paper = f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{table.latex(made())}\\end{{document}}\n"
    (tmp_path / "paper.tex").write_text(paper)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_json_is_plain(made: Made) -> None:
    plain = report.to_dict(made())
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert {row["row"] for row in plain["rows"]} == {r.planned.name for r in made().results}
    assert plain["sums"][0]["name"] == "params"


def test_the_page_holds_the_table_and_a_chart_of_each_metric(made: Made) -> None:
    page = ablation_page.render(made())
    for name in made().metrics:
        assert f'id="ladder-{name}"' in page
    for r in made().results:
        assert f'<th scope="row">{r.planned.name}</th>' in page
    for line in reproduction.sentences(made()):
        assert line.replace("&", "&amp;") in page


def test_the_chart_has_an_arrow_for_every_row(made: Made) -> None:
    figure = ablation_page.ladder_chart(made(), "validation_loss")
    arrows = [a for a in figure["layout"]["annotations"] if a["showarrow"]]
    assert len(arrows) == len(LADDER) - 1
    for arrow, (name, row) in zip(arrows, list(LADDER.items())[1:], strict=True):
        ours, below = made().result(name), made().result(row["baseline"])
        assert ours.score is not None
        assert below.score is not None
        assert ours.score.latency is not None
        assert below.score.latency is not None
        assert (arrow["x"], arrow["ax"]) == (ours.score.latency.median_ms, below.score.latency.median_ms)
        assert (arrow["y"], arrow["ay"]) == (
            ours.quality["validation_loss"].value,
            below.quality["validation_loss"].value,
        )
        verdict = ours.effects["validation_loss"].verdict
        assert arrow["arrowcolor"] == {"cannot tell": "var(--dominated)"}.get(verdict, f"var(--{verdict})")


def test_sentences_say_what_was_reproduced(made: Made) -> None:
    sentences = reproduction.sentences(made())
    params, macs, latency, quality = sentences
    apart = made().result("1").apart("params")
    assert apart is not None
    assert ("1 of 1 published changes of params" in params) == (abs(apart) <= 1)
    assert "not reproduced (points): row 1 (+1" in macs
    assert "another device" in latency
    assert "1 of 1" in latency
    assert "Quality is the validation loss of short training runs, not the published FID: with 3 seeds" in quality
    directions = {name: reproduction.direction(made(), made().result(name)) for name in LADDER}
    assert directions == {"0": None, "1": "better", "2a": None, "2b": None, "3": "better"}
    assert "of 2 published directions" in quality


def test_sentences_say_that_nothing_was_trained(made: Made) -> None:
    costs = made(objectives=["latency_ms"])
    assert reproduction.sentences(costs)[-1].startswith("Quality was not measured")
    assert "verdict" not in table.header(costs, "ladder")
    assert 'id="ladder-params"' in ablation_page.render(costs)


def predicted(ablation: Ablation, *, fitted: str) -> Ablation:
    """The ablation with its latencies predicted by a model that was fitted to the published change of one row."""
    results = []
    for r in ablation.results:
        assert r.score is not None
        assert r.score.latency is not None
        ms = r.score.latency.median_ms
        told = {"source": "predicted", "device": "iphone-15-pro", "interval_ms": (ms / 2, ms * 2)}
        score = r.score.model_copy(update={"latency": r.score.latency.model_copy(update=told)})
        results.append(replace(r, score=score, is_latency_fitted=r.planned.name == fitted))
    return replace(ablation, results=tuple(results))


def test_what_a_prediction_was_fitted_to_is_not_reproduced(made: Made) -> None:
    circular = predicted(made(), fitted="2b")
    latency = reproduction.sentences(circular)[2]
    assert latency.startswith("Latency is predicted for iphone-15-pro. The prediction was fitted to these published ")
    assert "which therefore do not count as reproduced: row 2b " in latency
    assert "same sign" not in latency
    assert "2.4× faster (−58 %), fitted to" in table.markdown(circular)
    assert report.frame(circular).set_index("row")["latency_ms_fitted_to"]["2b"]
    open_minded = reproduction.sentences(predicted(made(), fitted=""))[2]
    assert "Only its direction is compared: the change has the same sign in" in open_minded
    assert "fitted to" not in open_minded + table.markdown(made())


def test_columns_name_their_intervals_and_a_prediction(made: Made) -> None:
    measured = table.header(made(), "ladder")
    assert "latency ms [quartiles]" in measured
    assert measured[measured.index("validation loss [95 % interval]") + 1] == "difference [95 % interval]"
    columns = table.header(predicted(made(), fitted=""), "ladder")
    assert "predicted latency ms [90 % interval]" in columns
    assert "Δ predicted latency" in columns
    assert not any(name.startswith("latency") for name in columns)
    axis = ablation_page.ladder_chart(predicted(made(), fitted=""), "validation_loss")["layout"]["xaxis"]["title"]
    assert axis["text"] == "Predicted latency (ms)"


def test_sources_say_what_a_latency_is_of_and_which_verdicts_hold_at_once(made: Made) -> None:
    sources = dict(reproduction.sources(made()))
    size = "one pass of the U-Net at batch size 1, a latent of 8 × 8"
    assert sources["latency"].startswith(f"of {size}")
    assert size in sources["params, MACs"]
    assert "these hold for all comparisons at once (Bonferroni):" in sources["quality"]


def test_counts_at_another_size_are_not_a_reproduction(made: Made) -> None:
    other = made()
    settings = other.settings.model_copy(
        update={"ablation": other.ablation.model_copy(update={"published_from": "ablation/snapgen"})}
    )
    sentences = reproduction.sentences(Ablation(other.name, settings, other.attrs, other.results, other.sums))
    assert sentences[0].startswith("Quality is")
    assert sentences[2].startswith("The published networks have another size")


def test_a_row_that_is_missing_is_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = made().settings
    assert settings.ablation is not None
    space = settings.load_space()
    arch = space.architecture(space.references["2b"])
    monkeypatch.setenv("QUICK_FAULT", f"{arch.id}:raise")
    partial = made(seed=11)
    assert (
        reproduction.sentences(partial)[0]
        == "Not finished: 2b (RuntimeError: out of memory), 3 without 3 (RuntimeError: out of memory)."
    )
    assert "RuntimeError: out of memory" in table.markdown(partial)
    assert "ladder-validation_loss" in ablation_page.render(partial)
