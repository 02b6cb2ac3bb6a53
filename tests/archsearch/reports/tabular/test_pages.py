"""Pages of a synthetic table: they hold its numbers, and are written as a whole."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pandas
import pytest

from archsearch import cli
from archsearch.reports.tabular import agreement, effects
from archsearch.reports.tabular.replay import Comparison, compare, write_comparison
from archsearch.reports.tabular.report import write_pages
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.tabular.agreement import agreements
from archsearch.studies.tabular.file import load_table, write_table
from archsearch.studies.tabular.replay import settings_of
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from tests.archsearch import synthetic_table


@pytest.fixture(scope="module")
def table() -> BenchmarkTable:
    return synthetic_table.make()


@pytest.fixture(scope="module")
def path(table: BenchmarkTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.csv.gz"
    write_table(table, path)
    return path


@pytest.fixture(scope="module")
def comparison(path: Path) -> Comparison:
    values = {"name": "s", "space": "emoji-factorial", "seeds": {"first": 1, "front": 2}, "trials": 16}
    settings = settings_of(StudyConfig.model_validate({**values, "sampler": "qmc"}), ["random"])
    return compare(path, settings, seeds=6, processes=1)


def call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_factorial_page_has_effects_with_their_intervals(table: BenchmarkTable) -> None:
    found = effects.fits(table)
    page = effects.markdown(table, found)
    row = next(line for line in page.splitlines() if line.startswith("| convs: plain → separable | 2a: worse |"))
    assert "| all.num_kv_heads: null → 1 | 4: open |" in page
    assert "| width: base → wider | – |" in page
    assert row.count("[") >= 3
    assert "+0.04" in row
    assert "1: no self-attention at high resolution" in page
    assert "iphone-15-pro" in page
    frame = effects.frame(found)
    assert set(frame["number"]) >= {"validation_loss", "params", "latency_ms", "iphone-15-pro", "full_size_macs"}
    assert (frame["low"] <= frame["value"]).all()
    assert "each trained with 2 seeds, 24 of them with up to 5." in page
    assert "| 1: no self-attention at high resolution | 3.76 → 3.12 | +0.00" in page
    assert re.search(r"\| 2b: .* \| 3.38 → restored \| −0.0.*\| −15 % \|", page), "published costs"
    assert {"validation loss", "latency", "iphone-15-pro"} <= effects.figures(table, found).keys()


def test_the_ranking_page_says_from_which_budget(table: BenchmarkTable) -> None:
    page = agreement.markdown(table, agreements(table))
    assert "## Against the retrieval (MRR) of 2,400 steps, 64 architectures" in page
    assert "## Against the validation loss of 64 px, 32 architectures" in page
    assert re.search(r"\| validation loss \| 100.0% \| 0.99 \| \*\*0.99 \[0.98, ", page), "fit to rank"
    assert "validation loss t1 | 12.5%" not in page
    assert "The validation loss ranks within 0.02 of its best from" in page
    assert re.search(r"\| validation loss \| 100.0% \| 384 \| 0.99", page), "the noise ceiling of all architectures"
    bare = agreement.markdown(table, [])
    assert "## Noise ceiling" in bare
    assert bare.endswith("The table has no longer runs to compare with.\n")
    assert list(agreement.frame([]).columns) == list(agreement.frame(agreements(table)).columns)


def test_a_comparison_has_every_setting_at_every_mark(comparison: Comparison, path: Path, tmp_path: Path) -> None:
    page = comparison.markdown()
    assert page.count("| qmc |") == page.count("| random |") == 3
    assert "Medians of 6 searches [95 % interval]" in page
    assert "by how much the true validation loss of the candidate that looks best" in page
    assert "simulated times are rough" not in page
    rough = dataclasses.replace(comparison, is_timed=False, traces={"a": next(iter(comparison.traces.values()))[:5]})
    assert "simulated times are rough" in rough.markdown()
    assert "(of fewer than six searches an interval cannot be told)" in rough.markdown()
    assert "[" not in rough.markdown().partition("| setting |")[2], "no interval"
    frame = comparison.by_candidates()
    assert list(frame["candidates"]) == [12, 16, 12, 16]
    assert (frame["hypervolume low"] <= frame["hypervolume"]).all()
    first, last = comparison.by_seconds()["hypervolume"].iloc[[0, 3]]
    assert first < last
    assert comparison.table_runs == 768
    write_comparison(comparison, tmp_path / "replay.md")
    every = pandas.read_csv(tmp_path / "replay.csv")
    assert set(every["setting"]) == {"qmc", "random"}
    assert every["seed"].nunique() == 6
    assert set(every["architecture_id"]) <= load_table(path).entries.keys()
    by_time = comparison.figures()["By simulated time"]["data"]
    assert [trace["name"] for trace in by_time] == ["qmc", "random"]
    assert "By simulated time" in (tmp_path / "replay.html").read_text()


def test_settings_with_another_front_are_refused(path: Path) -> None:
    study = StudyConfig.model_validate({"name": "s", "space": "emoji-factorial", "trials": 4})
    for change in ("{constraints: {params: 1.0e6}}", "{objectives: [validation_loss, params]}"):
        with pytest.raises(InputError, match=f"^--setting {re.escape(change)}: has other objectives or limits"):
            compare(path, settings_of(study, [change]), seeds=1)
    with pytest.raises(InputError, match="constraints: leave none of the 384 architectures"):
        compare(path, settings_of(study.with_changes({"constraints": {"params": 1}}), []), seeds=1)


def test_a_table_with_one_seed_says_what_it_cannot_tell(table: BenchmarkTable) -> None:
    one = synthetic_table.resolved(train_seeds=(0,))
    runs = [
        dataclasses.replace(run, protocol_hash=one.hash)
        for run in table.runs
        if run.protocol_hash == table.protocol.hash and run.seed == 0
    ]
    header = table.header.model_copy(update={"protocols": {one.hash: one}, "num_runs": len(runs)})
    single = dataclasses.replace(table, header=header, runs=tuple(runs))
    page = effects.markdown(single, effects.fits(single))
    assert "each trained with 1 seed. " in page
    assert "is of this one seed: what another would say, one seed cannot tell" in page
    assert "## From seed to seed" not in page


@pytest.mark.parametrize(("kept", "problem"), [(20, "too many runs diverged: 20 arch"), (0, "no run has a valid")])
def test_a_table_of_diverged_runs_is_refused(table: BenchmarkTable, tmp_path: Path, kept: int, problem: str) -> None:
    fine = [*table.entries][:kept]
    runs = tuple(
        run if run.architecture_id in fine else dataclasses.replace(run, diverged=True, scores={}) for run in table.runs
    )
    with pytest.raises(InputError, match=problem):
        write_pages(dataclasses.replace(table, runs=runs), tmp_path / "pages")
    assert not (tmp_path / "pages").exists()


@pytest.mark.slow
def test_the_commands_write_their_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("analyze", str(path), "--out", str(tmp_path / "pages"), monkeypatch=monkeypatch) == 0
    names = {file.name for file in (tmp_path / "pages").iterdir()}
    assert names == {
        "factorial.md",
        "factorial.csv",
        "ranking.md",
        "ranking.csv",
        "figures.html",
        "predictors.md",
        "predictors.csv",
    }
    assert "Against the retrieval (MRR) of 2,400 steps" in (tmp_path / "pages" / "figures.html").read_text()
    arguments = ("replay", "emoji", "--table", str(path), "--seeds", "2", "--trials", "4", "--setting", "random", "-q")
    capsys.readouterr()
    assert call(*arguments, "--out", str(tmp_path / "replay.md"), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "replay.md").read_text().strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replay", "snapgen", "--table", "{table}"), "lacks 384 of the 384 architectures"),
        (("replay", "emoji", "--table", "{folder}/none.csv"), "does not exist"),
        (("replay", "emoji", "--table", "{damaged}"), "line 3, seed"),
        (("replay", "emoji_large", "--table", "{table}"), "lacks 384 of the 384 architectures"),
        (("replay", "{steps}", "--table", "{table}"), "protocol.steps: is 60 against 240"),
        (("analyze", "{damaged}"), "line 3, seed"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(
    path: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import gzip

    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    (tmp_path / "damaged.csv").write_text("\n".join([*lines[:2], lines[2].replace(",0,", ",zero,", 1), *lines[3:]]))
    (tmp_path / "steps.yaml").write_text("space: emoji-factorial\ntrials: 4\nprotocol: {steps: 60}\n")
    names = {"table": path, "folder": tmp_path, "damaged": tmp_path / "damaged.csv", "steps": tmp_path / "steps.yaml"}
    given = [argument.format(**names) for argument in arguments]
    assert call(*given, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
