from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pandas
import plotly.graph_objects as go
import pytest

from archsearch.reports import study_report
from archsearch.reports.rendering import formatting, html
from archsearch.reports.study import charts, data as study_data, summary
from archsearch.reports.study.knob_effects import knob_table
from archsearch.score import ProtocolMismatch, Quality, Score
from archsearch.spaces.loading import load_space
from archsearch.stats.pareto import front
from archsearch.studies.search import candidates
from snapgen.errors import InputError
from snapgen.io import atomic
from tests.archsearch.reports import factory

HOSTILE = {
    2: "</script><script>window.owned = 1</script>",
    3: '<img src="https://example.invalid/x.png" onerror="window.owned = 1">',
    4: "a | \"quoted\", 'name' & more",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    study = factory.create(folder, candidates=24, names=HOSTILE)
    return study_report.write_report(study, folder / "report.html")


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def empty(name: str = "emoji") -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, directions=["minimize", "minimize"])
    study.set_user_attr("settings", {"name": name, "objectives": list(factory.OBJECTIVE_NAMES)})
    study.set_user_attr("space", load_space("emoji").to_dict())
    return study


def test_another_ending_than_html_is_an_input_error(tmp_path: Path) -> None:
    """The CSV would be written over the page."""
    with pytest.raises(InputError, match=r"is not the name of an HTML file; end it in \.html"):
        study_report.write_report(factory.create(tmp_path, candidates=3), tmp_path / "table.csv")
    assert not list(tmp_path.glob("table*"))


def as_predicted(study: optuna.Study) -> optuna.Study:
    """A copy of the study with its latencies predicted."""
    copy = optuna.create_study(directions=study.directions)
    for key, value in study.user_attrs.items():
        copy.set_user_attr(key, value)
    for trial in study.get_trials():
        score = trial.user_attrs["score"]
        ms = score["latency"]["median_ms"]
        score["latency"] |= {"source": "predicted", "device": "iphone-15-pro", "interval_ms": [ms / 2, ms * 2]}
        trial.user_attrs |= {"score": score}
        copy.add_trial(trial)
    return copy


def test_a_prediction_says_so_wherever_it_stands(tmp_path: Path) -> None:
    study = as_predicted(factory.create(tmp_path, candidates=12, samples=False))
    data = study_data.load_study_data(study)
    assert data.label("latency_ms") == "predicted latency"
    assert data.axis("latency_ms") == "Predicted latency (ms)"
    assert data.column("latency_ms") == "Predicted latency (ms) [90 % interval]"
    assert "predicted latency" in data.reason
    (row,) = (row for row in summary.recommended(data)["rows"] if row["label"] == "predicted latency")
    best = data.value_of(data.best, "latency_ms")
    assert best is not None
    assert row["interval"] == "90 % interval"
    assert f"{row['value']} {row['ends']}" == formatting.format_value(best, "latency_ms", ends=True)
    figure = charts.front_chart(data, "validation_loss", "latency_ms")
    assert figure["layout"]["xaxis"]["title"]["text"] == "Predicted latency (ms)"
    page = study_report.write_report(study, tmp_path / "r.html").read_text()
    assert "Latency (ms)</button>" not in page


def test_columns_name_the_interval_in_their_brackets(written: Path) -> None:
    page = written.read_text()
    assert "Validation loss [95 % interval]</button>" in page
    assert "Latency (ms) [quartiles]</button>" in page


def test_costs_are_counted_and_not_estimated(tmp_path: Path) -> None:
    """Rotary embeddings have no parameters; a regression over candidates finds some."""
    data = study_data.load_study_data(factory.create(tmp_path, candidates=30, samples=False))
    table = knob_table(data, ["params", "validation_loss", "latency_ms"])
    params, loss, latency = table.columns
    assert params.note.startswith("counted exactly, for the neighbors of ")
    assert loss.note.startswith("n = ")
    assert latency.note.startswith("n = "), "a measured latency is estimated"
    groups = {row.name: changes for row, changes in (*table.significant, *table.insignificant)}
    (rope,) = groups["rope"]
    assert rope.cells[0] is not None
    assert (rope.cells[0].text, rope.cells[0].verdict) == ("0\N{NO-BREAK SPACE}%", "no effect")
    depth = groups["levels[1].transformer_depth"][0].cells[0]
    assert depth is not None
    assert depth.verdict in ("better", "worse")
    assert "[" not in depth.text


def test_a_latency_says_what_it_is_of(tmp_path: Path) -> None:
    study = factory.create(tmp_path, candidates=12, samples=False)
    protocol = {**factory.PROTOCOL, "protocol": {**factory.PROTOCOL["protocol"], "num_inference_steps": 10}}
    protocol["protocol"]["guidance_scale"] = 2.0
    study.set_user_attr("protocol", protocol)
    study.set_user_attr("trained_latent_size", 4)
    data = study_data.load_study_data(study)
    what = "one pass of the U-Net at batch size 1, a latent of 8 × 8 (64 px) and 16 context tokens"
    assert what in summary.headline(data)
    text = dict(summary.sources(data))["a latency is of"]
    assert "an image of the protocol's 10 steps, two passes each for guidance 2 takes 20 passes, " in text
    warning = "Candidates are trained at a latent of 4 × 4 (32 px), but cost and latency are those at 8 × 8"
    assert any(line.startswith(warning) for line in summary.warnings(data, {}))
    study.set_user_attr("trained_latent_size", 8)
    data = study_data.load_study_data(study)
    assert "8 × 8 (32 px)" in summary.headline(data)
    assert not any("trained at a latent" in line for line in summary.warnings(data, {}))


def test_report_is_one_file_without_external_resources(written: Path) -> None:
    text = written.read_text()
    head = text[: text.index("<script>")]
    assert "default-src 'none'" in head
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', head)
    assert text.count("plotly.js v") == 1
    assert written.stat().st_size < 8_000_000
    assert sorted(p.suffix for p in written.parent.glob("report*")) == [".csv", ".html", ".md"]


def test_every_figure_is_valid_plotly(written: Path) -> None:
    data = data_of(written.read_text())
    figures = [*data["fronts"].values(), *data["charts"].values()]
    assert len(data["fronts"]) == 3 * 4
    assert set(data["charts"]) == {
        "hypervolume",
        "seeds-validation_loss",
        "seeds-frechet_distance",
        "seeds-kernel_distance",
    }
    for figure in figures:
        go.Figure(figure)  # raises on a property that plotly does not know
        assert any(len(trace["x"]) for trace in figure["data"])


def test_hostile_names_stay_text(written: Path) -> None:
    text = written.read_text()
    assert "<script>window.owned" not in text
    assert "<img src=" not in text
    assert {c["title"] for c in data_of(text)["candidates"].values()} >= set(HOSTILE.values())
    assert all("<img" not in c["hover"] for c in data_of(text)["candidates"].values())


def test_csv_holds_every_candidate(written: Path) -> None:
    frame = pandas.read_csv(written.with_suffix(".csv"))
    assert len(frame) == 24
    assert list(frame["trial"]) == list(range(24))
    assert frame["name"].tolist()[:5] == ["base", "snapgen", *HOSTILE.values()]
    scored = frame[frame["state"] == "scored"]
    assert (scored["validation_loss_low"] < scored["validation_loss"]).all()
    assert frame.loc[frame["state"] == "infeasible", "validation_loss"].isna().all()
    assert frame["recommended"].sum() == 1
    assert {"knob convs", "latency_ms", "latency_source", "params", "validation_loss_seed_1"} <= set(frame.columns)


def test_front_in_the_page_is_the_studys(written: Path) -> None:
    frame = pandas.read_csv(written.with_suffix(".csv"))
    scored = frame[frame["state"] == "scored"]
    for row in scored.itertuples():
        beaten = scored[(scored["validation_loss"] < row.validation_loss) & (scored["latency_ms"] < row.latency_ms)]
        assert row.front == beaten.empty
    line = data_of(written.read_text())["fronts"]["validation_loss/latency_ms"]["data"][0]
    assert line["x"] == sorted(scored.loc[scored["front"], "latency_ms"])


@pytest.mark.parametrize("state", ["FAIL", "PRUNED", None])
def test_nothing_scored_is_a_clear_error(tmp_path: Path, state: str | None) -> None:
    study, space = empty(), load_space("emoji")
    if state:
        score = factory.made_up(space.base, random.Random(0)).model_copy(update={"quality": None})
        factory.add(study, space, 0, space.base_point, score if state == "PRUNED" else None, state=state, error="boom")
    with pytest.raises(InputError, match=r"study emoji: has no scored candidate.*; run archsearch search"):
        study_report.write_report(study, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_single_candidate_makes_a_page(tmp_path: Path) -> None:
    text = study_report.write_report(factory.create(tmp_path, candidates=1), tmp_path / "r.html").read_text()
    assert "Only 1 candidate is scored" in text
    assert "cannot be estimated from 1 candidate" in text
    assert "needs at least 8 different candidates" in text


def test_failed_running_and_reused_trials_are_distinguished(tmp_path: Path) -> None:
    study, space = factory.create(tmp_path, candidates=9, samples=False), load_space("emoji")
    base = factory.made_up(space.base, random.Random(0))
    factory.add(study, space, 9, space.base_point, None, state="FAIL", error="CUDA out of memory <b>")
    factory.add(study, space, 10, space.base_point, base, reused_from=0)
    factory.add(study, space, 11, space.sample(random.Random(5)), None, state="RUNNING", stage="training seed 0")
    text = study_report.write_report(study, tmp_path / "r.html").read_text()
    tiles = {name: value for value, name in summary.tiles(study_data.load_study_data(study))}
    assert (tiles["failed"], tiles["running"], tiles["reused"]) == ("1", "1", "1")
    assert tiles["scored"] == str(len(study_data.load_study_data(study).scored))
    assert "CUDA out of memory &lt;b&gt;" in text
    assert "same as trial 0" in text
    assert "has not finished" in text


def test_protocols_are_never_mixed(tmp_path: Path) -> None:
    study, space = factory.create(tmp_path, candidates=5, samples=False), load_space("emoji")
    score = factory.made_up(space.base, random.Random(0))
    assert score.quality is not None
    other = score.quality.model_copy(update={"protocol_hash": "0" * 16, "extractor": "inception"})
    point = space.sample(random.Random(9))
    factory.add(study, space, 5, point, Score(cost=score.cost, latency=score.latency, quality=other))
    with pytest.raises(ProtocolMismatch, match=r"trials 0 and 5: .*extractor: efficientnet-lite0 against inception"):
        study_report.write_report(study, tmp_path / "r.html")


@pytest.mark.parametrize(
    "objectives",
    [("validation_loss",), ("latency_ms", "params"), ("kernel_distance", "latency_ms", "params")],
)
def test_other_objectives(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    study = factory.create(tmp_path, candidates=14, objectives=objectives, samples=False)
    data = data_of(study_report.write_report(study, tmp_path / "r.html").read_text())
    first = next(iter(data["fronts"]))
    assert first.split("/")[0] == objectives[0]
    if len(objectives) > 1:
        assert first.split("/")[1] == objectives[1]


def test_one_seed_and_no_samples(tmp_path: Path) -> None:
    def lean(quality: Quality) -> Quality:
        loss = quality.validation_loss.model_copy(update={"by_seed": quality.validation_loss.by_seed[:1]})
        return quality.model_copy(update={"validation_loss": loss, "frechet_distance": None, "kernel_distance": None})

    study = factory.create(tmp_path, candidates=12, samples=False, adapt=lean)
    study.set_user_attr("protocol", {"protocol": {"train_seeds": [0]}})
    text = study_report.write_report(study, tmp_path / "r.html").read_text()
    assert data_of(text)["samples"] == {}
    assert list(data_of(text)["charts"]) == ["hypervolume"]
    assert "a single seed" in text
    assert "distance" not in " ".join(data_of(text)["fronts"])


def test_report_is_the_same_from_a_file_and_from_memory(tmp_path: Path) -> None:
    stored = factory.create(tmp_path, candidates=4, storage=f"sqlite:///{tmp_path / 'study.db'}")
    from_file = study_report.write_report(stored, tmp_path / "stored.html")
    from_memory = study_report.write_report(factory.create(tmp_path, candidates=4), tmp_path / "memory.html")
    assert data_of(from_file.read_text())["fronts"] == data_of(from_memory.read_text())["fronts"]


def test_broken_samples_are_left_out(tmp_path: Path) -> None:
    study = factory.create(tmp_path, candidates=6)
    stored = sorted((tmp_path / "artifacts").iterdir())
    stored[0].write_bytes(stored[0].read_bytes()[:200])
    stored[1].unlink()
    stored[2].write_bytes(b"")
    scored = len(study_data.load_study_data(study).trained)
    data = data_of(study_report.write_report(study, tmp_path / "r.html").read_text())
    assert len(data["samples"]) == scored - 3


def test_samples_of_a_run_that_was_moved(tmp_path: Path) -> None:
    study = factory.create(tmp_path, candidates=3)
    (tmp_path / "artifacts").rename(tmp_path / "moved")
    assert data_of(study_report.write_report(study, tmp_path / "r.html").read_text())["samples"] == {}
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "artifacts")
    assert data_of(study_report.write_report(study, tmp_path / "new" / "r.html").read_text())["samples"]


def test_samples_stay_within_their_budget(tmp_path: Path) -> None:
    from archsearch.reports.rendering import images

    paths = []
    for i in range(6):
        paths.append((i, tmp_path / f"{i}.png"))
        factory.grid(random.Random(i)).resize((2048, 1024)).save(paths[-1][1])
    uri = images.data_uri(paths[0][1])
    assert uri is not None
    assert len(uri) < 200_000
    assert list(images.embed_images(paths, max_bytes=int(2.5 * len(uri)))) == [0, 1]


def test_unwritable_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a writable file"):
        atomic.atomic_write_text(tmp_path / "file" / "report.html", "text")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="name a writable file"):
        atomic.atomic_write_text(tmp_path / "folder.html", "text")


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--", "b": "& \u2028 ×"}
    text = html.json_for_script(value)
    assert "<" not in text
    assert json.loads(text) == value


def test_infeasible_candidates_are_drawn_in_the_strip_at_their_latency(tmp_path: Path) -> None:
    study = study_data.load_study_data(factory.create(tmp_path, candidates=24, samples=False))
    traces = {t["name"]: t for t in charts.front_chart(study, "validation_loss", "latency_ms")["data"]}
    infeasible = [c for c in study.candidates if c.state == "infeasible"]
    assert len(infeasible) > 2
    assert sorted(traces["infeasible"]["customdata"]) == [c.number for c in infeasible]
    assert min(traces["infeasible"]["x"]) > factory.INFEASIBLE_MS


def test_importing_the_report_is_light() -> None:
    heavy = "{'plotly', 'pandas', 'jinja2', 'scipy'}"
    modules = "archsearch.reports.study.page, archsearch.reports.study_report"
    code = f"import sys, {modules}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "plotly" not in done.stdout
    assert "pandas" not in done.stdout


def test_intervals_are_those_by_which_candidates_are_compared(tmp_path: Path) -> None:
    from archsearch.stats.intervals import pool_intervals

    study = factory.create(tmp_path, candidates=10, samples=False)
    space = load_space("emoji")
    score = factory.made_up(space.base, random.Random(0))
    factory.add(study, space, 10, space.base_point, score, reused_from=0)
    data = study_data.load_study_data(study)
    raw = {
        c.number: c.score.quality
        for c in candidates.load_candidates(study)
        if c.score.quality and c.reused_from is None
    }
    expected = dict(zip(raw, pool_intervals([quality.validation_loss for quality in raw.values()]), strict=True))
    assert {c.number: e for c, e in study_data.estimates(data, "validation_loss")} == expected
    assert len({round(e.high - e.value, 9) for e in expected.values()}) == 1
    twin = next(c for c in data.candidates if c.number == 10)
    assert twin.score.quality is not None
    assert twin.score.quality.validation_loss == expected[0]


def test_two_studies_stand_side_by_side(tmp_path: Path) -> None:
    own, other = factory.create(tmp_path, candidates=14), factory.sampled(candidates=9)
    page = study_report.write_report(own, tmp_path / "both.html", compare_with=other)
    text = (tmp_path / "both.md").read_text()
    assert f"## {own.study_name} beside {other.study_name}" in text
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:4]]
        for line in text.splitlines()
        if (cells := line.split("|"))[2:]
    }
    both = [study_data.load_study_data(study) for study in (own, other)]
    assert rows["scored"] == [str(len(data.scored)) for data in both]
    points = [
        [
            (a.value, b.value)
            for c in d.scored
            if (a := d.value_of(c, "validation_loss")) and (b := d.value_of(c, "latency_ms"))
        ]
        for d in both
    ]
    joint = set(front([*points[0], *points[1]]))
    assert rows["on the front of both"] == [str(len(joint & set(each))) for each in points]
    lowest = rows["lowest Validation loss [95 % interval]"]
    assert [float(cell.split()[0]) for cell in lowest] == [
        pytest.approx(min(a for a, _ in each), abs=0.01) for each in points
    ]
    chart = data_of(page.read_text())["charts"]["both-fronts"]
    assert [len(trace["x"]) for trace in chart["data"] if trace.get("mode") == "markers"] == [
        len(each) for each in points
    ]
    assert 'id="both-fronts"' in page.read_text()


def test_two_studies_of_different_protocols_are_not_compared(tmp_path: Path) -> None:
    own, other = factory.create(tmp_path, candidates=5), factory.sampled(candidates=4)
    for trial in other.trials:
        score = Score.model_validate(trial.user_attrs["score"])
        if score.quality is not None:
            quality = score.quality.model_copy(update={"protocol_hash": "0" * 16})
            changed = score.model_copy(update={"quality": quality}).model_dump(mode="json")
            other._storage._get_trial(trial._trial_id).user_attrs["score"] = changed  # type: ignore[attr-defined]
    with pytest.raises(ProtocolMismatch, match="name a study of the same protocol"):
        study_report.write_report(own, tmp_path / "both.html", compare_with=other)


def test_a_latency_whose_interval_overlaps_the_bases_has_no_color(tmp_path: Path) -> None:
    data = study_data.load_study_data(factory.create(tmp_path, candidates=14))
    base = next(c for c in data.distinct if c.name == "base")
    latency = base.score.latency
    assert latency is not None
    wide = latency.model_copy(update={"upper_quartile_ms": 100 * latency.median_ms, "lower_quartile_ms": 1e-6})
    (row,) = [summary._compared_with_base(data, "latency_ms", base)]
    assert row["verdict"] in ("better", "worse")
    row = summary._compared_with_base(data, "latency_ms", base.with_score(latency=wide))
    assert row["change"]
    assert row["verdict"] == ""


def test_ticks_stand_under_their_own_unit(written: Path) -> None:
    """Not "1.2M" for 1,200,000 under "MACs (M)"."""
    data = data_of(written.read_text())
    for figure in (*data["fronts"].values(), *data["charts"].values()):
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["exponentformat"] == "none"
            assert figure["layout"][axis]["separatethousands"]


def test_names_of_designs_do_not_collide(tmp_path: Path) -> None:
    data = study_data.load_study_data(factory.create(tmp_path, candidates=14))
    notes = [
        note
        for note in charts.front_chart(data, "validation_loss", "latency_ms")["layout"]["annotations"]
        if note.get("showarrow")
    ]
    assert len(notes) > 1
    assert notes == sorted(notes, key=lambda note: note["x"])
    places = [(note["xanchor"], note["ay"]) for note in notes]
    assert len(set(places)) == len(places)
