from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import filelock
import pytest
import torch
from PIL import Image

from archsearch.stats.estimate import Estimate
from archsearch.studies.lookup import find_architecture
from archsearch.training import run as training
from archsearch.training.evaluation import BestWeights, StageEvaluator
from archsearch.training.log import read_evaluations
from archsearch.training.recipe import load_recipe
from snapgen.data.pixels import GRID_GAP
from snapgen.errors import InputError
from snapgen.models.unet import load_unet
from snapgen.training.stages import NetStage
from tests.archsearch.studies import tiny_recipe
from tests.archsearch.studies.tiny_recipe import EVALUATION, FEW, STAGES, recipe, weights

Start = Callable[..., BaseProcess]
NAMES = [f"{number + 1:02d}-{stage['name']}" for number, stage in enumerate(STAGES)]


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe was trained to its end, never broken; with samples judged."""
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        judged = {**EVALUATION, "num_samples": 8, "feature_resolution": 32, "retrieval": False}
        training.train(*recipe(folder, evaluation=judged), log=silent)
    finally:
        os.chdir(before)
    return folder / "runs" / "tiny"


def test_every_stage_leaves_its_result(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "stages").iterdir()) == NAMES
    assert not (whole / "checkpoint.safetensors").exists()
    assert (whole / "pipeline" / "stages.txt").read_text() == "04-steps, 05-decoder\n"
    results = [whole / "stages" / name / "diffusion_pytorch_model.safetensors" for name in NAMES]
    assert len({file.read_bytes() for file in results}) == len(NAMES), "each stage trains"


def test_the_pipelines_card_tells_data_recipe_scores_and_latencies(whole: Path) -> None:
    card = (whole / "pipeline" / "README.md").read_text()
    headings = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["How to load it", "Data", "Training", "Scores", "Latency", "Limits", "Licence"]
    assert "By the recipe `tiny` of archsearch" in card
    assert "| validation loss | " in card
    assert "| iphone-15-pro | " in card
    assert "| predicted | Core ML |" in card


def test_every_stage_is_evaluated(whole: Path) -> None:
    found = read_evaluations(whole)
    assert [(e.stage, e.step) for e in found if "validation_loss" in e.numbers or e.stage == "decoder"] == [
        ("teacher", 4),
        ("base", 2),
        ("base", 4),
        ("distil", 4),
        ("steps", 4),
        ("decoder", 4),
    ]
    for evaluation in found:
        expected = {"validation_loss", "frechet_distance", "kernel_distance", "copied"}
        sampled = evaluation.stage in ("base", "distil", "steps")
        assert (expected <= set(evaluation.numbers)) == sampled, "during the stage base, too"
    last = next(e for e in found if e.stage == "steps")
    assert last.sampling is not None
    assert (last.images, last.sampling["num_inference_steps"], last.sampling["guidance_scale"]) == (16, 4, 1)
    for grid in (whole / "samples").glob("*.png"):
        with Image.open(grid) as image:
            assert image.height >= 32


def test_the_grids_show_samples_and_the_training_images_nearest_to_them(whole: Path) -> None:
    for step in (2, 4):
        with Image.open(whole / "samples" / f"02-base-{step:07d}-nearest.png") as image:
            # One sample, its nearest training image, and the same of held-out images; eight in a row.
            assert image.size == (8 * (32 + GRID_GAP) - GRID_GAP, 4 * (32 + GRID_GAP) - GRID_GAP)


@pytest.mark.parametrize(("losses", "kept"), [([1.0, 2.0], 2), ([2.0, 1.0], 4), ([1.0, 1.0], 2)])
def test_the_best_weights_are_kept_also_over_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], kept: int
) -> None:
    monkeypatch.chdir(tmp_path)
    weights_at: dict[int, dict[str, torch.Tensor]] = {}
    original = StageEvaluator.evaluate

    def evaluate(self: StageEvaluator, stage: Any, net: Any, log: Any, step: int) -> dict[str, Estimate]:
        original(self, stage, net, log, step)
        weights_at.setdefault(step, {name: tensor.clone() for name, tensor in net.state_dict().items()})
        return {"validation_loss": Estimate.exact(losses[step // 2 - 1])}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StageEvaluator, "evaluate", evaluate)
    stage = {**STAGES[1], "keep_best_by": "validation_loss"}
    tiny = recipe(tmp_path, stages=[stage], teacher=None)
    with monkeypatch.context() as patch:
        patch.setattr(training.RecipeRunner, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(*tiny, log=silent)
    told: list[str] = []
    training.train(*tiny, log=told.append)
    assert any("step 2 is the best by validation_loss and is kept" in line for line in told) == (kept == 2)
    result = load_unet(Path("runs/tiny/stages/01-base")).state_dict()
    assert all(torch.equal(tensor, weights_at[kept][name]) for name, tensor in result.items())
    assert any(not torch.equal(tensor, weights_at[6 - kept][name]) for name, tensor in result.items())
    assert read_evaluations(Path("runs/tiny"))[-1].step == kept, "the last evaluation is the result's"
    assert not Path("runs/tiny/best.safetensors").exists()


def test_a_row_for_each_step(whole: Path) -> None:
    rows = (whole / "logs" / "02-base.csv").read_text().splitlines()
    assert rows[0].startswith("step,student loss,student task,student gradient")
    assert [int(row.split(",")[0]) for row in rows[1:]] == [1, 2, 3, 4]


def test_the_same_again_does_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole.parents[1]
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    told: list[str] = []
    training.train(*recipe(folder), log=told.append)
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before


def test_the_pipeline_draws_in_a_fresh_process(whole: Path) -> None:
    program = (
        "import sys; from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline\n"
        "pipeline = SnapGenPipeline.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "image = pipeline('a red dot').images[0]\n"
        "print(image.size, [name for name in sys.modules if name.split('.')[0] in ('archsearch', 'studies')])\n"
    )
    command = [sys.executable, "-c", program, str(whole / "pipeline")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "(32, 32) []"


@pytest.mark.slow
def test_the_run_exports_to_core_ml(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "archsearch", "export", str(whole), "--to", "coreml", "--out", str(tmp_path / "x")]
    subprocess.run(command, check=True, timeout=600)
    assert list((tmp_path / "x").rglob("*.mlpackage"))


def test_a_missing_pipeline_is_made_again(whole: Path, tmp_path: Path) -> None:
    """The state of a run that was killed between its last stage's result and its pipeline."""
    folder = whole.parents[1]
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    copy = tmp_path / "copy" / "runs" / "tiny"
    before = weights(copy)
    (copy / "pipeline").rename(copy / ".pipeline-killed.old")
    os.chdir(tmp_path / "copy")
    training.train(*recipe(folder), log=silent)
    assert weights(copy) == before
    assert not (copy / ".pipeline.old").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_and_resumed_it_ends_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """A stop in the middle of a stage: the step is ended, and a checkpoint of it saved."""
    monkeypatch.chdir(tmp_path)
    original = training.Trainer._step
    steps = 0

    def take(self: Any, step: int, *others: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            os.kill(os.getpid(), number)
        return original(self, step, *others)

    monkeypatch.setattr(training.Trainer, "_step", take)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        training.train(*recipe(tmp_path, checkpoint_minutes=60), log=told.append)
    assert told[-1] == "saved runs/tiny/checkpoint.safetensors at step 3"
    assert "interrupted: saving a checkpoint after this step" in capfd.readouterr().err
    told.clear()
    training.train(*recipe(tmp_path, checkpoint_minutes=60), log=told.append)
    assert told[0] == "02-base: resumes at step 3"
    assert weights(tmp_path / "runs" / "tiny") == weights(whole)
    rows = (tmp_path / "runs" / "tiny" / "logs" / "02-base.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4"], "none is doubled"


def killed_until_done(start: Start, folder: Path, kills: int, seed: int) -> int:
    """Train, killed at random writes so often and then left alone; how often it was killed."""
    chosen, died = random.Random(seed), 0
    folder.mkdir(exist_ok=True)
    while True:
        last = chosen.randint(1, 25) if died < kills else 1 << 30
        process = start(tiny_recipe.train, folder, last)
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            return died
        died += 1


@pytest.mark.slow
def test_killed_at_random_writes_it_ends_the_same(start: Start, whole: Path, tmp_path: Path) -> None:
    died = killed_until_done(start, tmp_path / "run", 3, seed=1)
    assert died == 3
    assert weights(tmp_path / "run" / "runs" / "tiny") == weights(whole)


@pytest.mark.slow
def test_killed_at_20_random_writes_it_ends_the_same(start: Start, whole: Path, tmp_path: Path) -> None:
    died, seed = 0, 0
    while died < 20:  # a run has fewer than 20 writes of 25 in it
        seed += 1
        folder = tmp_path / f"run{seed}"
        died += killed_until_done(start, folder, 20 - died, seed=seed)
        assert weights(folder / "runs" / "tiny") == weights(whole)


def test_only_one_process_trains_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    with (
        filelock.FileLock(tmp_path / "runs" / "tiny" / ".lock"),
        pytest.raises(InputError, match="another process"),
    ):
        training.train(*recipe(tmp_path), log=silent)


def test_until_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"kind": "flow_matching", "name": "base", **FEW}
    stages = [base, {**base, "name": "more"}]
    training.train(*recipe(tmp_path, stages=stages, teacher=None), log=silent, stop_after="base")
    run = tmp_path / "runs" / "tiny"
    assert [path.name for path in (run / "stages").iterdir()] == ["01-base"]
    assert (run / "pipeline" / "stages.txt").read_text() == "01-base\n"


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one stage done and a checkpoint of the other."""
    monkeypatch.chdir(tmp_path)
    base = {"kind": "flow_matching", "name": "base", **FEW}
    found, arch = recipe(tmp_path, stages=[base, {**base, "name": "more"}], teacher=None)
    original = training.Trainer._step
    with monkeypatch.context() as patch:

        def take(self: Any, step: int, *others: Any) -> Any:
            if self.stage.name == "more" and step == 3:
                raise KeyboardInterrupt
            return original(self, step, *others)

        patch.setattr(training.Trainer, "_step", take)
        with pytest.raises(KeyboardInterrupt):
            training.train(found, arch, log=silent)
    return tmp_path / "runs" / "tiny"


def again(folder: Path, **changes: Any) -> None:
    base = {"kind": "flow_matching", "name": "base", **FEW}
    training.train(
        *recipe(folder, **{"stages": [base, {**base, "name": "more"}], "teacher": None, **changes}), log=silent
    )


def test_a_changed_recipe_is_refused(begun: Path, tmp_path: Path) -> None:
    base = {"kind": "flow_matching", "name": "base", **FEW}
    before = (begun / "recipe.json").read_bytes()
    for changes, place in (
        ({"seed": 3}, "seed"),
        ({"stages": [{**base, "grad_clip": 2}, {**base, "name": "more"}]}, r"stages\[0\].grad_clip"),
        ({"stages": [base, {**base, "name": "more", "learning_rate": 0.1}]}, r"stages\[1\].learning_rate"),
        ({"stages": [base]}, r"stages\[1\]|stages"),
    ):
        with pytest.raises(InputError, match=place):
            again(tmp_path, **changes)
    assert (begun / "recipe.json").read_bytes() == before


def other_pictures(folder: Path) -> str:
    """Other training images, and what then is named."""
    for file in (folder / "pictures").rglob("*.png"):
        Image.new("RGB", (32, 32), "red").save(file)
    return r"data \(train, 32 px\)"


def other_captions(folder: Path) -> str:
    (folder / "pictures" / "cat").rename(folder / "pictures" / "dog")
    return r"data \(train, 32 px\)"


@pytest.mark.parametrize("change", [other_pictures, other_captions])
def test_a_run_is_not_resumed_on_other_data(begun: Path, tmp_path: Path, change: Callable[[Path], str]) -> None:
    place = change(tmp_path)
    same = load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match=rf"{place}: has other contents than when this run was begun; restore them"):
        training.train(same, find_architecture(same.architecture), log=silent)
    assert not (begun / "stages" / "02-more").exists()


def test_a_stage_after_a_result_that_was_taken_away_may_not_change(begun: Path, tmp_path: Path) -> None:
    base = {"kind": "flow_matching", "name": "base", **FEW}
    shutil.rmtree(begun / "stages" / "01-base")
    with pytest.raises(InputError, match=r"stages\[1\].learning_rate: this run was begun with"):
        again(tmp_path, stages=[base, {**base, "name": "more", "learning_rate": 0.1}])


def test_weights_that_were_kept_by_another_protocol_are_not_compared(tmp_path: Path) -> None:
    stage = recipe(tmp_path, stages=[{**STAGES[1], "keep_best_by": "validation_loss"}], teacher=None)[0].stages[0]
    net = torch.nn.Linear(1, 1)
    for protocol, loss, expected in (("old", 1, 1), ("new", 2, 2), ("new", 3, 2)):
        best = BestWeights(tmp_path / "best.safetensors", cast(NetStage, stage), protocol)
        best.offer(loss, {"validation_loss": Estimate.exact(loss)}, net)
        assert best.restore(net) == expected


def test_a_stage_that_was_not_begun_may_change(begun: Path, tmp_path: Path) -> None:
    base = {"kind": "flow_matching", "name": "base", **FEW}
    again(tmp_path, stages=[base, {**base, "name": "more"}, {**base, "name": "third"}])
    assert (begun / "stages" / "03-third").is_dir()


@pytest.mark.parametrize("content", [b"", b"\x08" * 2000, None])
def test_a_damaged_checkpoint(begun: Path, tmp_path: Path, content: bytes | None) -> None:
    path = begun / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    kept = path.read_bytes()
    with pytest.raises(InputError, match=r"checkpoint\.safetensors.*delete it"):
        again(tmp_path)
    assert path.read_bytes() == kept


def test_a_checkpoint_of_another_training(begun: Path, tmp_path: Path) -> None:
    from snapgen.io import checkpoint

    path = begun / "checkpoint.safetensors"
    parts, facts = checkpoint.load_checkpoint(path)
    parts["turn.student"] = {"x": torch.zeros(2)}
    checkpoint.save_checkpoint(path, parts, facts)
    with pytest.raises(InputError, match="does not fit its stage"):
        again(tmp_path)


def test_a_damaged_result(begun: Path, tmp_path: Path) -> None:
    file = begun / "stages" / "01-base" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"01-base/diff\S+: is damaged or was changed.*remove \S+01-base to train"):
        again(tmp_path)
    (file.parent / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"01-base/diff\S+: cannot be read .*remove \S+01-base to train"):
        again(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "stages/02-base/diffusion_pytorch_model.safetensors",
            "remove runs/tiny/stages/02-base to train the stage again",
        ),
        ("stages/05-decoder/config.json", "remove runs/tiny/stages/05-decoder to train the stage again"),
        ("pipeline/unet/diffusion_pytorch_model.safetensors", "remove runs/tiny/pipeline: the same command writes it"),
    ],
)
@pytest.mark.parametrize("how", ["changed", "truncated", "gone"])
def test_damage_to_a_finished_run_is_found(
    name: str, remedy: str, how: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole.parents[1]
    shutil.copytree(whole, tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "tiny" / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-9] + b"\0" * 9 if how == "changed" else content[:-9])
    with pytest.raises(InputError) as ended:
        training.train(*recipe(folder), log=silent)
    assert ended.value.source == f"runs/tiny/{name}"
    assert remedy in ended.value.remedy
    before = weights(whole)
    shutil.rmtree(tmp_path / "runs" / "tiny" / Path(name).parts[0])
    if name.startswith("pipeline"):
        training.train(*recipe(folder), log=silent)
        assert weights(tmp_path / "runs" / "tiny") == before


def test_a_full_disk_loses_nothing(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapgen.io import checkpoint

    kept = (begun / "checkpoint.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(InputError, match=r"cannot be written .No space left on device.*make room"):
            again(tmp_path)
    assert (begun / "checkpoint.safetensors").read_bytes() == kept
    with monkeypatch.context() as patch:
        patch.setattr(training.UNet, "save_pretrained", full)
        with pytest.raises(InputError, match="02-more: cannot be written"):
            again(tmp_path)
    assert [path.name for path in (begun / "stages").iterdir()] == ["01-base"]
    again(tmp_path)
    assert (begun / "stages" / "02-more").is_dir()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({}, "not finite"), ({"on_nonfinite_grad": "skip"}, "gives validation losses that are not finite")],
)
def test_what_is_not_finite_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {
        "kind": "flow_matching",
        "name": "base",
        **FEW,
        "optimizer": "adamw",
        "learning_rate": 1e30,
        "grad_clip": 1e30,
        **changes,
    }
    with pytest.raises(InputError, match=rf"stage base: .*{problem}"):
        training.train(*recipe(tmp_path, stages=[base], teacher=None), log=silent)
    assert not (tmp_path / "runs" / "tiny" / "stages").exists()


def test_a_result_that_is_taken_away_is_trained_again_and_its_pipeline_made_again(begun: Path, tmp_path: Path) -> None:
    again(tmp_path)
    before = weights(begun)
    for file in (begun / "stages" / "02-more").iterdir():
        file.unlink()
    (begun / "stages" / "02-more").rmdir()
    (begun / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"old")
    again(tmp_path)
    assert weights(begun) == before


def test_recipe_json_tells_what_was_trained(whole: Path) -> None:
    noted = json.loads((whole / "recipe.json").read_text())
    assert [stage["name"] for stage in noted["stages"]] == [stage["name"] for stage in STAGES]


def test_a_damaged_evaluation_is_named(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "evaluations.jsonl").read_text()
    (tmp_path / "evaluations.jsonl").write_text(lines + lines[:40])
    with pytest.raises(InputError, match=r"evaluations.jsonl: line 7: is not JSON"):
        read_evaluations(tmp_path)
    (tmp_path / "evaluations.jsonl").write_text(lines + "{}")
    with pytest.raises(InputError, match=r"evaluations.jsonl: line 7.stage: is required, but missing"):
        read_evaluations(tmp_path)


@pytest.mark.parametrize("name", ["logs", "samples", "tensorboard", "stages/02-more", "pipeline"])
def test_a_file_in_the_way_is_named(name: str, begun: Path, tmp_path: Path) -> None:
    shutil.rmtree(begun / name, ignore_errors=True)
    (begun / name).write_text("")
    with pytest.raises(InputError, match=rf"{name}\S*: .*move it away"):
        again(tmp_path)


def test_a_disk_that_is_full_is_one_line_wherever_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archsearch.training.log.TrainLog.write_row", full)
    with pytest.raises(InputError, match=r"no space left on device.*the same command resumes"):
        training.train(*recipe(tmp_path, stages=STAGES[:1]), log=silent)
