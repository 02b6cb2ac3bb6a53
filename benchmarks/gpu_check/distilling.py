"""Part 5: The recipe ``emoji`` with ten times the images at 64 px: does step distillation help where the base is sharp?

All stages of the recipe, each with ten times the images in batches ten times as large: as many steps, which a GPU takes
in minutes. The nets before and after step distillation are judged by 28, 8 and 4 steps, seed after seed while there is
time. The decoder is trained with the first seed alone: nothing else depends on it.
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

from archsearch.quality.retrieval import Retriever
from archsearch.stats.estimate import Estimate
from archsearch.training.data import RecipeData
from archsearch.training.evaluation import RecipeEvaluator, SamplingConfig
from archsearch.training.recipe import Recipe, architecture, load_recipe
from archsearch.training.run import train
from archsearch.training.run_folder import RunFolder, read_unet
from benchmarks.gpu_check import captions, data
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from snapgen.architecture.schema import Architecture
from snapgen.data.pixels import GAP
from snapgen.io.atomic import atomic_write

TIMES = 10
SEEDS = (0, 1, 2)
STEPS = (28, 8, 4)
MEASURES = ("validation_loss", "frechet_distance", "kernel_distance", "retrieval_r1", "retrieval_r10")
SMALL_STAGE = {"batch": 4, "images": 8}


def run(section: Section, setup: Setup) -> None:
    """Seed after seed, while one more fits into the time that is left."""
    device = torch.device(setup.device)
    longest = 0.0
    tables = _tables(section)
    found: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for number, seed in enumerate(SEEDS[:1] if setup.small else SEEDS):
        if number and setup.left() < 1.1 * longest:
            section.say(f"Seed {seed} was not begun: one takes {longest:.0f} s, and {setup.left():.0f} s are left.")
            break
        began = time.monotonic()
        recipe = recipe_of(setup, seed)
        _train(section, recipe, tables[0])
        judge = CarriedJudge(RecipeData(judged_as(recipe, small=setup.small), device), _side(recipe))
        _judged(section, recipe, judge, tables[1], found, setup)
        longest = max(longest, time.monotonic() - began)
        _decoder(section, recipe, tables[0], first=number == 0)
    _say(section, found)


class CarriedJudge(RecipeEvaluator):
    """A judge whose retrieval asks the check's own text encoder: MiniLM's package may not be there."""

    @functools.cached_property
    def _retriever(self) -> Retriever:
        images = self.material.images("train", self.resolution)
        encoder = self.material.recipe.text[0].encoder
        return Retriever.fitted(images, device=self.material.device, encoder=encoder)


def _tables(section: Section) -> tuple[Table, Table]:
    section.say(
        f"`{captions.RECIPE}` with {TIMES} times the images in batches {TIMES} times as large, in bfloat16, "
        "at the recipe's own learning rates. "
        "Before: the distilled net at guidance 3. After: the net of step distillation to 4 steps, without guidance. "
        "Distances are of EfficientNet-Lite0's features, to the training images; retrieval is among captions that were "
        "never trained on. Intervals are 95 %, of one seed. The grids are `emoji-SEED.png`: the recipe's prompts, from "
        "above before at 28, 8 and 4 steps, then after at 28, 8 and 4."
    )
    trained = section.table("Stages", ["seed", "stage", "steps", "batch", "s", "steps/s"])
    measures = ["validation loss", "Fréchet distance", "kernel distance", "R@1", "R@10"]
    return trained, section.table("Before and after step distillation", ["seed", "net", "steps", *measures])


def recipe_of(setup: Setup, seed: int) -> Recipe:
    """The recipe, ten times as large; of the small check a few steps on a few images."""
    recipe = load_recipe(captions.RECIPE)
    encoder = {**recipe.text[0].model_dump(mode="json"), "encoder": captions.encoder(setup)}
    stages = []
    for stage in recipe.model_dump(mode="json")["stages"]:
        if stage["kind"] != "decoder":
            stage |= {"images": TIMES * stage["images"], "batch": TIMES * stage["batch"], "evaluate_every": None}
            stage |= {"precision": "bfloat16"}
        stages.append(_smaller(stage) if setup.small else stage)
    changes: dict[str, Any] = {"name": f"emoji-{seed}", "seed": seed, "text": [encoder], "stages": stages}
    changes["checkpoint_minutes"] = 60
    if setup.small:
        changes["data"] = str(data.written(setup.shared / "data"))
    return _evaluated(recipe.changed(changes), samples=0, small=setup.small)  # judged below, once


def judged_as(recipe: Recipe, *, small: bool) -> Recipe:
    """The recipe as its nets are judged in the end."""
    return _evaluated(recipe, samples=8 if small else load_recipe(captions.RECIPE).evaluation.samples, small=small)


def _evaluated(recipe: Recipe, *, samples: int, small: bool) -> Recipe:
    values: dict[str, Any] = {**recipe.evaluation.model_dump(mode="json"), "samples": samples}
    values |= {"pairs": 8, "steps": 2, "prompts": ["red apple", "sun"]} if small else {}
    return recipe.changed({"evaluation": values})


def _smaller(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["kind"] == "decoder":
        training = {**stage["training"], "steps": 2, "batch": 4, "resolutions": [32]}
        return {**stage, "held": 16, "training": training}
    return {**stage, **SMALL_STAGE}


def _side(recipe: Recipe) -> int:
    return max(stage.resolution for stage in recipe.stages if stage.kind != "decoder")


def _arch(recipe: Recipe) -> Architecture:
    return architecture(recipe.arch)


def _train(section: Section, recipe: Recipe, table: Table) -> None:
    """All stages but the decoder's, one at a time, so that each is told as it ends."""
    for stage in recipe.stages:
        if stage.kind == "decoder":
            continue
        began = time.monotonic()
        train(recipe, _arch(recipe), tell=lambda line: print(line, flush=True), until=stage.name)
        seconds = time.monotonic() - began
        rate = f"{stage.steps / seconds:.1f}, its evaluation included"
        table.add(recipe.seed, stage.name, stage.steps, stage.batch, f"{seconds:.0f}", rate)
        section.record(what="stage", seed=recipe.seed, stage=stage.name, steps=stage.steps, seconds=seconds)


def _decoder(section: Section, recipe: Recipe, table: Table, *, first: bool) -> None:
    stage = recipe.stages[-1]
    if not first or stage.kind != "decoder":
        return
    began = time.monotonic()
    train(recipe, _arch(recipe), tell=lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    steps = stage.training.steps
    table.add(recipe.seed, stage.name, steps, stage.training.batch, f"{seconds:.0f}", f"{steps / seconds:.1f}")
    section.record(what="stage", seed=recipe.seed, stage=stage.name, steps=steps, seconds=seconds)


def _judged(
    section: Section,
    recipe: Recipe,
    judge: RecipeEvaluator,
    table: Table,
    found: dict[tuple[str, int, str], list[float]],
    setup: Setup,
) -> None:
    """Both nets at every number of steps; a grid of each."""
    arch, folder, sheets = _arch(recipe), RunFolder(recipe, _arch(recipe)), []
    numbers = {stage.name: number for number, stage in enumerate(recipe.stages)}
    (after,) = (stage for stage in recipe.stages if stage.kind == "steps")
    before = recipe.stages[numbers[after.name] - 1]
    for name, stage, guidance in (("before", before, recipe.evaluation.guidance), ("after", after, 1.0)):
        net = read_unet(folder.result(numbers[stage.name]), arch)
        assert net is not None
        net.to(setup.device)
        for steps in [2] if setup.small else STEPS:
            sampler = SamplingConfig(steps=steps, guidance=guidance, shift=1)
            measured = judge.measure(net, sampler)
            table.add(recipe.seed, name, steps, *(_shown(measured.get(key)) for key in MEASURES))
            values = {key: estimate.model_dump(mode="json") for key, estimate in measured.items()}
            section.record(what="judged", seed=recipe.seed, net=name, steps=steps, measures=values)
            for key, estimate in measured.items():
                found[name, steps, key].append(estimate.value)
            sheets.append(judge.sheet(net, sampler))
            _put(sheets, Path(setup.out) / f"emoji-{recipe.seed}.png")


def _shown(estimate: Estimate | None) -> str | None:
    if estimate is None:
        return None
    form = ".4g"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _put(sheets: list[torch.Tensor], path: Path) -> None:
    """The grids one above the other."""
    gap = torch.full((3, 4 * GAP, sheets[0].shape[2]), 255, dtype=torch.uint8)
    pixels = torch.cat([part for sheet in sheets for part in (sheet, gap)][:-1], 1)
    with atomic_write(path) as file:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="png")


def _say(section: Section, found: dict[tuple[str, int, str], list[float]]) -> None:
    """Whether step distillation helps, in the Fréchet distance and in retrieval, at every number of steps."""
    for steps in sorted({key[1] for key in found}, reverse=True):
        lines = []
        for key, words, sign in (("frechet_distance", "Fréchet distance", -1), ("retrieval_r10", "R@10", 1)):
            pairs = zip(found["before", steps, key], found["after", steps, key], strict=False)
            changes = [after - before for before, after in pairs]
            if changes:
                better = sum(sign * change > 0 for change in changes)
                lines.append(f"{words} {statistics.fmean(changes):+.4g}, better with {better} of {len(changes)} seeds")
        if lines:
            section.say(f"After step distillation, at {steps} steps: {'; '.join(lines)}.")
