"""The functions that a notebook uses, on studies and recipes that train for seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import archsearch.cost.counter
from archsearch import (
    Recipe,
    Study,
    StudyConfig,
    TrainedRun,
    ablate,
    audit,
    cli,
    count_cost,
    evolve,
    latency_backend,
    load_recipe,
    load_study,
    measure_latency,
    search,
    train,
)
from archsearch.studies.config.study import load_config
from snapgen import InputError, UNet, preset
from snapgen.coreml import convert
from tests.archsearch import tiny_studies

ROOT = Path(__file__).parents[2]
DEVICE = "predicted:iphone-16-pro-max"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder, in which the shipped studies' names are those of tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("api")
        tiny_studies.ship(place, patch)
        yield place


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:  # noqa: ARG001 - runs go under it
    return search("emoji", trials=4, quiet=True)


def test_a_search_gives_its_candidates_as_the_report_does(study: Study, folder: Path) -> None:
    assert study.name == "emoji"
    assert study.config.trials == 4
    frame = study.candidates()
    assert len(frame) == 4
    assert list(frame["trial"]) == [trial.number for trial in study.optuna_study.trials]
    knobs = [column for column in frame if column.startswith("knob ")]
    assert set(knobs) == {f"knob {name}" for name in tiny_studies.KNOBS}
    page = study.report("pages/front.html")
    assert page == Path("pages/front.html")
    assert "</html>" in page.read_text()
    assert list(pandas.read_csv(page.with_suffix(".csv"))) == list(frame)
    assert study.report() == study.config.folder / "report.html"
    assert (folder / "runs" / "emoji" / "report.html").is_file()


def test_the_front_is_part_of_the_candidates_by_the_first_objective(study: Study) -> None:
    frame, front = study.candidates(), study.front()
    assert list(front) == list(frame)
    assert set(front["trial"]) == set(frame[frame["front"]]["trial"])
    assert front["validation_loss"].is_monotonic_increasing
    assert front["latency_ms"].is_monotonic_decreasing


def test_the_best_candidate_is_an_object(study: Study) -> None:
    frame = study.candidates().set_index("trial")
    best = study.best()
    assert frame["recommended"][best.number]
    assert study.recommend().candidate == best
    assert study.recommend().reason
    assert best.architecture.id == frame["architecture_id"][best.number]
    assert study.best("params").score.cost.params == frame["params"].min()
    with pytest.raises(InputError, match="unknown objective 'beauty'"):
        study.best("beauty")


def test_candidates_are_named_by_number_or_name(study: Study) -> None:
    assert study.candidate("base").number == 0
    assert study.candidate(2).number == 2
    assert study.candidate("best") == study.best()
    for unknown in (17, "nobody", "0"):
        with pytest.raises(InputError, match=r"has no candidate .*use best, a trial's number .*or one of: base"):
            study.candidate(unknown)


def test_a_wrong_name_is_found_out_in_one_reading(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, get_trials = [], study.optuna_study.get_trials
    monkeypatch.setattr(study.optuna_study, "get_trials", lambda **how: readings.append(how) or get_trials(**how))
    with pytest.raises(InputError):
        study.candidate("nobody")
    assert len(readings) == 1


@pytest.mark.parametrize("which", ["best", "base", 2])
def test_a_candidate_leaves_a_trained_net(study: Study, which: int | str) -> None:
    unet, candidate = study.load_unet(which), study.candidate(which)
    assert isinstance(unet, UNet)
    assert not unet.training
    assert unet.arch.id == candidate.architecture.id
    kept = load_file(study.config.artifact_folder / candidate.artifacts["unet.safetensors"])
    assert all(torch.equal(kept[name], tensor) for name, tensor in unet.state_dict().items())
    with torch.inference_mode():
        drawn = unet(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.randn(1, 16, 384))
    assert drawn.shape == (1, 4, 8, 8)


def test_a_repeated_architecture_has_the_first_ones_net(folder: Path) -> None:
    """The expansion of a standard convolution changes nothing."""
    space = {**tiny_studies.SPACE, "knobs": {"all.expansion": [1, 2], "all.ffn_ratio": [2, 4]}}
    (folder / "twins.yml").write_text(str(space))
    config = load_config("emoji").with_changes({"name": "twins", "space": "twins.yml"})
    points = [{"all.expansion": i, "all.ffn_ratio": 0} for i in (0, 1)]
    twins = search(config, trials=2, initial_points=points, quiet=True)
    second = twins.candidate(1)
    assert second.reused_from == 0
    assert twins.load_unet(1).arch.id == second.architecture.id


def test_a_candidates_net_draws_what_the_command_draws_by_its_name(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str) -> int:
        command = ["archsearch", "generate", name, "a red apple", "--out", str(folder / "apple.png"), "--quiet"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert run("emoji:best") == 0, capsys.readouterr().err
    pipeline = study.load_pipeline("best")
    assert (pipeline.config.steps, pipeline.config.guidance) == (10, 2)  # of the protocol
    assert np.array_equal(np.asarray(Image.open(folder / "apple.png")), np.asarray(pipeline("a red apple").images[0]))
    assert run("emoji") == 2
    assert "emoji: is a study, which has many nets; name a candidate: emoji:best" in capsys.readouterr().err


def test_a_candidate_is_exported_as_it_was_trained(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[UNet] = []

    def stand_in(net: UNet, *_: object, **__: object) -> Path:
        asked.append(net)
        raise InputError("here", "ends", "no package is needed")

    monkeypatch.setattr(convert, "convert_unet", stand_in)
    monkeypatch.setattr(
        sys, "argv", ["archsearch", "export", "emoji:best", "--to", "coreml", "--out", str(folder / "a.mlpackage")]
    )
    with pytest.raises(SystemExit):
        cli.main()
    for ours, theirs in zip(asked[0].parameters(), study.load_unet("best").parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_artifacts_have_names_that_say_what_they_are(study: Study) -> None:
    stored = {path.name for path in study.config.artifact_folder.iterdir()}
    for trial in range(4):
        assert any(re.fullmatch(rf"emoji-{trial}-unet-[0-9a-f]{{8}}\.safetensors", name) for name in stored)
    metas = optuna.artifacts.get_all_artifact_meta(study.optuna_study.trials[0], storage=study.optuna_study._storage)
    assert {meta.artifact_id for meta in metas} <= stored
    assert {"unet.safetensors", "architecture.json", "curve.csv"} == {meta.filename for meta in metas}


def test_parameters_are_the_names_of_choices(study: Study) -> None:
    """As optuna-dashboard shows them."""
    knobs = {knob: [str(choice).lower() for choice in choices] for knob, choices in tiny_studies.KNOBS.items()}
    for trial, candidate in zip(study.optuna_study.trials, study.candidates().itertuples(), strict=True):
        assert {knob: choices.index(trial.params[knob]) for knob, choices in knobs.items()} == (
            study.candidate(candidate.trial).point
        )


def test_a_candidate_with_a_proxy_leaves_its_twins_net(folder: Path) -> None:
    knobs = {**tiny_studies.KNOBS, "levels[1].channels": [16, 32, 64]}
    real = {**tiny_studies.SPACE, "context_tokens": 77, "knobs": dict(sorted(knobs.items()))}
    real["base"] = {**real["base"], "latent_channels": 16, "context_dim": 768}
    (folder / "real.yml").write_text(str(real))
    config = load_config("emoji").with_changes({"name": "proxied", "space": "real.yml", "proxy": "emoji"})
    proxied = search(config, trials=1, quiet=True)
    base = proxied.candidate("base")
    assert base.architecture.latent_channels == 16
    unet = proxied.load_unet("base")
    assert unet.arch == base.trained
    assert unet.arch.latent_channels == 4
    assert list(proxied.candidates()["proxy"]) == ["emoji"]


def test_a_net_that_is_gone_or_never_was_is_named(study: Study) -> None:
    costs = search("emoji", name="costs", objectives=["params", "latency_ms"], trials=1, quiet=True)
    with pytest.raises(InputError, match="trial 0 of costs: has no weights: it was not trained"):
        costs.load_unet("base")
    path = study.config.artifact_folder / study.candidate(3).artifacts["unet.safetensors"]
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        with pytest.raises(InputError, match=r"trial 3 of emoji: .*: its weights cannot be read"):
            study.load_unet(3)
        path.unlink()
        with pytest.raises(InputError, match=r"trial 3 of emoji: .*: its weights cannot be read"):
            study.load_unet(3)
    finally:
        path.write_bytes(whole)


def test_a_study_shows_itself(study: Study) -> None:
    front = len(study.front())
    assert repr(study) == f"<Study emoji: 4 candidates, 4 scored, {front} on the front>"
    shown = study._repr_html_()
    assert shown.startswith(f"<p>Study emoji: 4 candidates, 4 scored, {front} on the front</p><table")
    assert shown.count("<tr") == front + 1
    assert "latency_ms" in shown


def test_settings_are_changed_by_their_names_and_groups_in_part(study: Study) -> None:
    other = search("emoji", name="other", trials=1, seed=5, protocol={"steps": 2}, quiet=True)
    assert (other.config.seed, other.config.protocol.steps) == (5, 2)
    assert other.config.protocol.batch_size == study.config.protocol.batch_size
    assert other.config.constraints == {}
    with pytest.raises(InputError, match="colour: unknown key"):
        search("emoji", colour="red")
    with pytest.raises(InputError, match="seed: was 0 when emoji began"):
        search("emoji", seed=5)
    with pytest.raises(InputError, match=r"emojis: is neither a shipped study nor a file"):
        search("emojis")


def test_the_same_call_resumes(study: Study) -> None:
    more = search("emoji", trials=5, quiet=True)
    assert len(more.candidates()) == 5
    assert len(study.candidates()) == 5, "whoever holds the study sees what was added"


@pytest.mark.parametrize("how", ["name", "run", "file", "settings"])
def test_a_study_is_loaded_by_what_names_it(study: Study, folder: Path, how: str) -> None:
    where: dict[str, str | Path | StudyConfig] = {
        "name": "emoji",
        "run": search("emoji", name="of-this-name", trials=1, quiet=True).name,
        "file": folder / "shipped" / "studies" / "search" / "emoji.yaml",
        "settings": study.config,
    }
    loaded = load_study(where[how])
    assert loaded.name == ("of-this-name" if how == "run" else "emoji")
    assert loaded.candidates()["state"].eq("scored").any()
    assert loaded.config.protocol == study.config.protocol


def test_a_study_that_has_not_begun_is_no_study(folder: Path) -> None:
    with pytest.raises(InputError, match="has not begun"):
        load_study("emoji", storage=f"sqlite:///{folder / 'nothing.db'}")


def test_an_audit_is_a_frame_of_agreements(study: Study) -> None:
    rows = audit(study, factor=2, quiet=True)
    assert list(rows) == ["score", "target", "kind", "rho", "low", "high", "n"]
    assert "validation_loss of a run 2× as long" in set(rows["target"])
    assert (rows["n"] >= 4).all()
    assert study.optuna_study.user_attrs["audit"] == rows.astype(object).where(rows.notna(), None).to_dict("records")


def test_an_ablation_has_a_table_in_four_forms(study: Study) -> None:
    table = ablate("emoji", quiet=True)
    rows = table.ablation().set_index("row")
    assert list(rows.index[:3]) == ["0", "1", "2"]
    assert rows["params"]["1"] < rows["params"]["0"]
    page = table.report("table.md")
    assert all(page.with_suffix(suffix).is_file() for suffix in (".md", ".tex", ".csv", ".html"))
    with pytest.raises(InputError, match="is not a format of the table"):
        table.report("table.txt")
    with pytest.raises(InputError, match="is not an ablation"):
        study.ablation()
    with pytest.raises(InputError, match="'macs' is not a quality number"):
        ablate("emoji", quality="macs")


def test_an_evolution_ends_with_a_trained_net(study: Study) -> None:
    evolved = evolve("emoji", name="evolved", quiet=True)
    assert evolved.load_unet("best").arch.id == evolved.best().architecture.id
    page = evolved.report(compare_with=study)
    assert page == Path("runs/evolved/report.html")
    assert page.with_suffix(".md").is_file()


SCRIPT = """
from archsearch import search

study = search("study.yaml", trials=2, workers=2, quiet=True)
print(len(study.candidates()), "candidates")
"""


@pytest.mark.slow
def test_workers_do_not_run_the_calling_script_again(folder: Path) -> None:
    """A script without ``if __name__ == "__main__"``, as a notebook is."""
    home = folder / "shipped" / "studies" / "search"
    (home / "study.yaml").write_text((home / "emoji.yaml").read_text())
    (home / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=home,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
    )
    (home / "study.yaml").unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 candidates\n"


def test_costs_are_counted_of_names_and_descriptions(study: Study) -> None:
    arch = preset("snapgen-emoji")
    expected = archsearch.cost.counter.cost(arch, 8, context_tokens=16)
    assert count_cost("snapgen-emoji", latent_size=8, context_tokens=16) == expected
    assert count_cost(arch, latent_size=8, context_tokens=16) == expected
    best = study.best()
    assert count_cost("emoji:best", latent_size=8, context_tokens=16) == best.score.cost
    with pytest.raises(InputError, match="latent_size: size 9 cannot be halved"):
        count_cost("snapgen-emoji", latent_size=9)
    with pytest.raises(InputError, match="snapgen-emojis: is neither a preset nor a file"):
        count_cost("snapgen-emojis")


def test_latencies_are_predicted_or_measured_by_the_device(study: Study) -> None:
    best = study.best()
    record = measure_latency(best.architecture, device=DEVICE, latent_size=8, context_tokens=16)
    assert record == best.score.latency
    assert record == latency_backend(DEVICE).measure(best.architecture, 8, 16)
    brief = {"block_seconds": 0.001, "agreement": 1, "precision": 1, "seconds": 0.01}
    measured = measure_latency(best.architecture, latent_size=8, context_tokens=16, rule=brief)
    assert (measured.source, measured.device) == ("measured", "host")
    with pytest.raises(InputError, match="unknown device 'toaster'"):
        measure_latency("snapgen-emoji", device="toaster", latent_size=8)
    with pytest.raises(InputError, match="colour: unknown key"):
        latency_backend("host", colour="red")


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainedRun:  # noqa: ARG001 - runs go under it
    return train("emoji", seed=3, name="mine", stop_after="base", log=None)


def test_a_training_leaves_a_run(trained: TrainedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained.folder == Path("runs/mine")
    assert trained.recipe.seed == 3
    assert repr(trained).startswith("<TrainedRun mine: stages teacher, base, ")
    frame = trained.evaluations()
    assert list(frame["stage"]) == ["teacher", "base", "base"]
    assert list(frame["images"]) == [16, 8, 16]
    assert (frame["validation_loss_low"] <= frame["validation_loss"]).all()
    image = trained.pipeline()("a dot", num_inference_steps=1, height=32, width=32).images[0]
    assert image.size == (32, 32)
    lines: list[str] = []
    again = train("emoji", seed=3, name="mine", stop_after="base", log=lines.append)
    assert not lines, "all that was asked for is done"
    assert again == trained
    assert not capsys.readouterr().out


def test_a_training_takes_an_architecture(trained: TrainedRun) -> None:
    wider = trained.architecture.model_copy(
        update={"time": trained.architecture.time.model_copy(update={"hidden_dim": 24})}
    )
    recipe = load_recipe("emoji")
    assert isinstance(recipe, Recipe)
    run = train(recipe, wider, name="wider", stop_after="base", log=None)
    assert run.architecture == wider
    assert run.pipeline().unet.arch.id == wider.id
    with pytest.raises(InputError, match="was begun with"):
        train(recipe, name="wider", log=None)
    with pytest.raises(InputError, match=r"stop_after: 'end' is not a stage; use one of: teacher, base"):
        train(recipe, stop_after="end")
