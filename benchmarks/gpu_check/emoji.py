"""Part 5: train the recipe ``emoji`` at 64 px with ten times the images, before and after step distillation.

It answers whether step distillation helps when the base network is well trained. All stages to four steps use ten times
the images in batches ten times as large, which is the same number of steps and takes minutes on a GPU. The networks
before and after step distillation are evaluated with 28, 8 and 4 steps, for one seed after another while time is left.
The decoder is trained only for the first seed, because nothing else depends on it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from archsearch.quality.evaluator import Evaluator, SamplingConfig, sheet
from archsearch.quality.retrieval import Retriever
from archsearch.stats.estimate import Estimate
from archsearch.studies.lookup import find_architecture
from archsearch.training.evaluation import process_of, training_data
from archsearch.training.recipe import Recipe, load_recipe
from archsearch.training.run import train
from archsearch.training.run_folder import RunFolder, read_unet
from benchmarks.gpu_check import captions, data
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from snapgen.architecture.schema import Architecture
from snapgen.data.pixels import GRID_GAP
from snapgen.io.atomic import atomic_write

SCALE = 10
SEEDS = (0, 1, 2)
STEPS = (28, 8, 4)
METRICS = ("validation_loss", "frechet_distance", "kernel_distance", "retrieval_r1", "retrieval_r10")
SMALL_STAGE = {"batch_size": 4, "num_images": 8}


def run(section: Section, setup: Setup) -> None:
    """Train and evaluate one seed after another while another one fits into the remaining time."""
    device = torch.device(setup.device)
    longest_seconds = 0.0
    tables = _tables(section)
    values: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for number, seed in enumerate(SEEDS[:1] if setup.small else SEEDS):
        if number and setup.left() < 1.1 * longest_seconds:
            section.say(
                f"Seed {seed} was skipped: a seed takes {longest_seconds:.0f} s, and {setup.left():.0f} s are left."
            )
            break
        began = time.monotonic()
        recipe = recipe_of(setup, seed)
        _train(section, recipe, tables[0])
        evaluated = evaluated_as(recipe, small=setup.small)
        data = training_data(evaluated, device, evaluated.evaluation.data)
        evaluator = OfflineEvaluator(data, _resolution(recipe), evaluated.evaluation)
        _evaluate(section, recipe, evaluator, tables[1], values, setup)
        longest_seconds = max(longest_seconds, time.monotonic() - began)
        _decoder(section, recipe, tables[0], first=number == 0)
    _summarize(section, values)


class OfflineEvaluator(Evaluator):
    """Evaluator whose retrieval uses the check's own text encoder, because MiniLM's package may not be installed."""

    @functools.cached_property
    def retriever(self) -> Retriever:
        images = self.data.images("train", self.resolution)
        encoder = self.data.text_encoders[0].encoder
        return Retriever.fitted(images, device=self.data.device, encoder=encoder)


def _tables(section: Section) -> tuple[Table, Table]:
    section.say(
        f"`{captions.RECIPE}` with {SCALE} times the images in batches {SCALE} times as large, in bfloat16, "
        "at the recipe's own learning rates. "
        "Before: the distilled network at the recipe's guidance. After: the network step-distilled to 4 steps, without "
        "guidance. "
        "Distances compare EfficientNet-Lite0 features with those of the training images; retrieval is among held-out "
        "captions. Intervals are 95 % intervals of one seed. The grids `emoji-SEED.png` show the recipe's prompts, "
        "from top to bottom: before at 28, 8 and 4 steps, after at 28, 8 and 4 steps."
    )
    stages = section.table("Stages", ["seed", "stage", "steps", "batch", "s", "steps/s"])
    metrics = ["validation loss", "Fréchet distance", "kernel distance", "R@1", "R@10"]
    return stages, section.table("Before and after step distillation", ["seed", "network", "steps", *metrics])


def recipe_of(setup: Setup, seed: int) -> Recipe:
    """The recipe to four steps with `SCALE` times the images; for the small check, a few steps on a few images."""
    recipe = load_recipe(captions.RECIPE)
    encoder = {**recipe.text_encoders[0].model_dump(mode="json"), "encoder": captions.encoder(setup)}
    stages: list[dict[str, Any]] = []
    for stage in recipe.model_dump(mode="json")["stages"]:
        if stage["kind"] == "adversarial" and any(earlier["kind"] == "adversarial" for earlier in stages):
            continue  # to two steps and one
        if stage["kind"] != "decoder":
            stage |= {
                "num_images": SCALE * stage["num_images"],
                "batch_size": SCALE * stage["batch_size"],
                "evaluate_every": None,
                "keep_best_by": None,
                "precision": "bfloat16",
            }
        stages.append(_small_stage(stage) if setup.small else stage)
    changes: dict[str, Any] = {"name": f"emoji-{seed}", "seed": seed, "text_encoders": [encoder], "stages": stages}
    changes |= {"checkpoint_minutes": 60, "figure": None}
    if setup.small:
        changes["data"] = str(data.write_images(setup.shared / "data"))
    return _with_evaluation(
        recipe.with_changes(changes), samples=0, small=setup.small
    )  # evaluated once, by `_evaluate`


def evaluated_as(recipe: Recipe, *, small: bool) -> Recipe:
    """The recipe with its full final evaluation."""
    return _with_evaluation(
        recipe, samples=8 if small else load_recipe(captions.RECIPE).evaluation.num_samples, small=small
    )


def _with_evaluation(recipe: Recipe, *, samples: int, small: bool) -> Recipe:
    evaluation: dict[str, Any] = {**recipe.evaluation.model_dump(mode="json"), "num_samples": samples}
    evaluation |= {"validation_pairs": 8, "num_inference_steps": 2, "prompts": ["red apple", "sun"]} if small else {}
    return recipe.with_changes({"evaluation": evaluation})


def _small_stage(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["kind"] == "decoder":
        training = {**stage["training"], "steps": 2, "batch_size": 4, "resolutions": [32]}
        return {**stage, "max_images": 16, "training": training}
    return {**stage, **SMALL_STAGE}


def _resolution(recipe: Recipe) -> int:
    return max(stage.resolution for stage in recipe.stages if stage.kind != "decoder")


def _arch(recipe: Recipe) -> Architecture:
    return find_architecture(recipe.architecture)


def _train(section: Section, recipe: Recipe, table: Table) -> None:
    """Train all stages but the decoder's, one at a time, so that each is reported when it ends."""
    for stage in recipe.stages:
        if stage.kind == "decoder":
            continue
        began = time.monotonic()
        train(recipe, _arch(recipe), log=lambda line: print(line, flush=True), stop_after=stage.name)
        seconds = time.monotonic() - began
        rate = f"{stage.steps / seconds:.1f} (with evaluation)"
        table.add(recipe.seed, stage.name, stage.steps, stage.batch_size, f"{seconds:.0f}", rate)
        section.record(what="stage", seed=recipe.seed, stage=stage.name, steps=stage.steps, seconds=seconds)


def _decoder(section: Section, recipe: Recipe, table: Table, *, first: bool) -> None:
    stage = recipe.stages[-1]
    if not first or stage.kind != "decoder":
        return
    began = time.monotonic()
    train(recipe, _arch(recipe), log=lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    steps = stage.training.steps
    table.add(recipe.seed, stage.name, steps, stage.training.batch_size, f"{seconds:.0f}", f"{steps / seconds:.1f}")
    section.record(what="stage", seed=recipe.seed, stage=stage.name, steps=steps, seconds=seconds)


def _evaluate(
    section: Section,
    recipe: Recipe,
    evaluator: Evaluator,
    table: Table,
    values: dict[tuple[str, int, str], list[float]],
    setup: Setup,
) -> None:
    """Evaluate both networks with every number of sampling steps, and draw a grid of each."""
    arch, folder, grids = _arch(recipe), RunFolder(recipe, _arch(recipe)), []
    numbers = {stage.name: number for number, stage in enumerate(recipe.stages)}
    (after,) = (stage for stage in recipe.stages if stage.kind == "adversarial")
    before = recipe.stages[numbers[after.name] - 1]
    for name, stage, guidance in (("before", before, recipe.evaluation.guidance_scale), ("after", after, 1.0)):
        net = read_unet(folder.result(numbers[stage.name]), arch)
        assert net is not None
        net.to(setup.device)
        for steps in [2] if setup.small else STEPS:
            sampler = SamplingConfig(num_inference_steps=steps, guidance_scale=guidance, timestep_shift=1)
            process = process_of(recipe, net, sampler)
            estimates = evaluator.measure(net, process, sampler, retrieval=recipe.evaluation.retrieval)
            table.add(recipe.seed, name, steps, *(_format(estimates.get(key)) for key in METRICS))
            measures = {key: estimate.model_dump(mode="json") for key, estimate in estimates.items()}
            section.record(what="judged", seed=recipe.seed, net=name, steps=steps, measures=measures)
            for key, estimate in estimates.items():
                values[name, steps, key].append(estimate.value)
            images = evaluator.grid_samples(net, process, sampler, recipe.evaluation.prompts)
            grids.append(sheet(images))
            _save_grids(grids, Path(setup.out) / f"emoji-{recipe.seed}.png")


def _format(estimate: Estimate | None) -> str | None:
    if estimate is None:
        return None
    return f"{estimate:.4g}"


def _save_grids(grids: list[torch.Tensor], path: Path) -> None:
    """Save the grids (3, H, W) below one another as a PNG file."""
    gap = torch.full((3, 4 * GRID_GAP, grids[0].shape[2]), 255, dtype=torch.uint8)
    pixels = torch.cat([block for grid in grids for block in (grid, gap)][:-1], 1)
    with atomic_write(path) as file:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="png")


def _summarize(section: Section, values: dict[tuple[str, int, str], list[float]]) -> None:
    """Report the effect of step distillation on Fréchet distance and retrieval for every number of steps."""
    for steps in sorted({key[1] for key in values}, reverse=True):
        lines = []
        for key, label, sign in (("frechet_distance", "Fréchet distance", -1), ("retrieval_r10", "R@10", 1)):
            pairs = zip(values["before", steps, key], values["after", steps, key], strict=False)
            changes = [after - before for before, after in pairs]
            if changes:
                better = sum(sign * change > 0 for change in changes)
                lines.append(f"{label} {statistics.fmean(changes):+.4g}, better with {better} of {len(changes)} seeds")
        if lines:
            section.say(f"After step distillation, at {steps} steps: {'; '.join(lines)}.")
