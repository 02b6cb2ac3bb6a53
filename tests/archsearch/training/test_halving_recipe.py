"""A recipe of step distillation from data to pipeline, and what is wrong with its teachers told in time."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from archsearch.training import run as training
from archsearch.training.compatibility import resolve_shapes
from archsearch.training.dry_run import plan
from archsearch.training.log import read_evaluations
from archsearch.training.recipe import load_recipe
from snapgen.architecture import presets
from snapgen.errors import InputError
from snapgen.io.prediction_type import NOTES, read_prediction_type
from snapgen.models.unet import UNet
from snapgen.pipeline.loading import load_pipeline
from tests.archsearch.studies import tiny_recipe
from tests.archsearch.studies.tiny_recipe import ARCH, EVALUATION, FEW, recipe, weights

BASE = {"kind": "flow_matching", "name": "base", **FEW}
TO_2 = {"kind": "progressive", "name": "to-2", "teacher_steps": 4, "cfg_probability": 0.5, **FEW}
TO_1 = {**TO_2, "name": "to-1", "teacher_steps": 2, "cfg_probability": 0}
CHANGES: dict[str, Any] = {"prediction_type": "v", "teacher": None, "stages": [BASE, TO_2, TO_1]}


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, never broken."""
    folder, before = tmp_path_factory.mktemp("whole"), Path.cwd()
    tiny_recipe.train(folder, evaluation={**EVALUATION, "guidance_scale": 2}, **CHANGES)
    os.chdir(before)
    return folder / "runs" / "tiny"


def test_each_stage_halves_the_steps_and_keeps_the_guidance(whole: Path) -> None:
    assert [path.name for path in sorted((whole / "stages").iterdir())] == ["01-base", "02-to-2", "03-to-1"]
    samplings = [evaluation.sampling or {} for evaluation in read_evaluations(whole)]
    assert [(each["num_inference_steps"], each["guidance_scale"]) for each in samplings] == [(2, 2), (2, 2), (1, 2)]
    rows = (whole / "logs" / "02-to-2.csv").read_text().splitlines()
    assert rows[0].startswith("step,student loss,student distillation,student original,student gradient")
    assert len({file.read_bytes() for file in (whole / "stages").rglob("*.safetensors")}) == 3


def test_its_pipeline_draws(whole: Path) -> None:
    pipeline = load_pipeline(whole)
    assert (pipeline.config.prediction, pipeline.config.steps, pipeline.config.guidance) == ("v", 1, 2)
    drawn = pipeline("a dot", output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32)
    assert drawn.isfinite().all()
    # One step from noise alone: the data that the net guesses at the first timestep.
    noise = torch.randn(1, 4, 8, 8)
    net, context = pipeline.unet.eval(), pipeline.encode(["a dot"])
    found = pipeline("a dot", latents=noise, guidance_scale=1, output_type="latent").images
    alpha = pipeline.scheduler.alphas_cumprod[999].sqrt()
    with torch.no_grad():
        said = net(noise, torch.tensor([0.999]), context)
    torch.testing.assert_close(found, alpha * noise - (1 - alpha**2).sqrt() * said, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_killed_in_a_halving_stage_it_ends_the_same(
    start: Callable[..., BaseProcess], whole: Path, tmp_path: Path
) -> None:
    run = functools.partial(tiny_recipe.train, evaluation={**EVALUATION, "guidance_scale": 2}, **CHANGES)
    for last_write, ends in ((22, -signal.SIGKILL), (None, 0)):
        process = start(run, tmp_path, last_write)
        process.join()
        assert process.exitcode == ends
        if last_write:
            assert (tmp_path / "runs" / "tiny" / "stages" / "01-base").is_dir()
            assert not (tmp_path / "runs" / "tiny" / "stages" / "03-to-1").exists()
    assert weights(tmp_path / "runs" / "tiny") == weights(whole)


def written(folder: Path, note: str | None = '{"prediction": "v"}', **arch: Any) -> Path:
    """A U-Net of an earlier version in a folder, with the note of what it predicts."""
    unet = UNet(presets.Architecture.model_validate({**ARCH, **arch}))
    unet.init_weights(0)
    unet.save_pretrained(folder)
    if note is not None:
        (folder / NOTES[0]).write_text(note)
    return folder


def trained(folder: Path, teaches: Path | str, **changes: Any) -> None:
    stages = [{**TO_2, "teacher": str(teaches)}]
    training.train(*recipe(folder, **{**CHANGES, "stages": stages, **changes}), log=silent)


def test_a_teacher_by_path_may_be_another_net(tmp_path: Path) -> None:
    trained(tmp_path, written(tmp_path / "net", mid={"num_res_blocks": 3, "head_dim": 8}))
    result = tmp_path / "runs" / "tiny" / "stages" / "01-to-2"
    assert json.loads((result / "config.json").read_text())["prediction_type"] == "v"
    assert not [note for note in NOTES if (result / note).exists()]
    assert read_prediction_type(tmp_path / "runs" / "tiny" / "pipeline" / "unet") == "v"


def test_a_teacher_that_does_not_do_is_told_before_training(tmp_path: Path) -> None:
    def refused(teaches: Path | str, **changes: Any) -> str:
        with pytest.raises(InputError) as error:
            trained(tmp_path, teaches, **changes)
        assert not (tmp_path / "runs").exists()
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    assert "nowhere: is not a folder" in refused("nowhere")
    other = refused(written(tmp_path / "flow", '{"prediction": "velocity"}'))
    assert "predicts 'velocity', not 'v'" in other
    assert "prediction_type: does not state what the net predicts" in refused(written(tmp_path / "silent", None))
    itself = {"stages": [TO_2], "init_weights": str(tmp_path / "flow")}
    assert "predicts 'velocity'" in refused("before", **itself)
    assert "takes a context 12 wide" in refused(written(tmp_path / "narrow", context_dim=12))
    (tmp_path / "flow" / "config.json").write_text("{}")
    assert "does not describe a U-Net of this package" in refused(tmp_path / "flow")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "velocity"}, "stage to-2 distills DDIM steps; set prediction_type to v or noise"),
        ({"stages": [TO_2]}, "stage to-2 has no net before it; give init_weights"),
        ({"stages": [{**BASE, "timestep_shift": 3}]}, "timestep_shift applies to rectified flow only"),
        ({"stages": [BASE, {**TO_2, "teacher_steps": 5}]}, "teacher_steps 5 is odd"),
        ({"stages": [BASE, {**TO_2, "cfg_range": [9, 1]}]}, "cfg_range [9, 1] is not 0 ≤ low ≤ high"),
        (
            {"stages": [{**BASE, "distillation": {}}], "teacher": {"path": "x"}},
            "stage base needs a teacher of rectified flow, not of v",
        ),
    ],
)
def test_recipes_that_can_not_be_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        recipe(tmp_path, **{**CHANGES, **changes})
    assert says in str(error.value)


def test_the_papers_recipes_can_be_planned_without_their_files() -> None:
    """A stage of halving takes 1.1 guided and unguided passes of the student and 2.2 of the teacher, forward only."""
    macs = {}
    for name in ("snapfusion_teacher", "snapfusion"):
        found = load_recipe(name)
        arch = presets.preset(found.architecture)
        planned = plan(
            found, arch, resolve_shapes(found, without_files=True), examples=None, captions=None, timed=False
        )
        first, last = planned.stages[0], planned.stages[-1]
        assert last.teacher_params == 859_520_964
        assert (first.batch, last.batch) == (2048, 2048)
        macs[name] = first.macs // first.images // 4  # forward, twice that back, and forward again for checkpointing
        teaches = macs["snapfusion_teacher"]
        assert last.macs / last.images == pytest.approx(1.1 * 4 * macs[name] + 2.2 * teaches, rel=1e-6)
        assert "from 32 to 16 steps" in planned.stages[1].description
