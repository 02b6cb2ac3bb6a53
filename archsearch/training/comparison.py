"""Variants of a recipe side by side, over the same seeds: what a choice in training is worth."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from archsearch.library import RUNS, read_named
from archsearch.stats.estimate import Estimate
from archsearch.studies.signals import terminable
from archsearch.training.data import RecipeData
from archsearch.training.evaluation import RecipeEvaluator, sampler_of
from archsearch.training.log import read_evaluations
from archsearch.training.recipe import Recipe, architecture, trains_student
from archsearch.training.run import train
from archsearch.training.run_folder import RunFolder, read_unet
from snapgen import config, devices
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.training.stages import NetStage

SEED = "{seed}"
"""Stands for the seed in a recipe's texts, e.g. in the path of weights."""
_STEP = re.compile(r"([a-z_0-9]+)((?:\[\d+\])*)")


class SamplingOverride(Config):
    """How a variant's net is sampled from, where that is not its last stage's own way."""

    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, le=100)


class VariantConfig(Config):
    """One row of a comparison."""

    changes: dict[str, Any] = Field(default_factory=dict)
    """Path in the recipe to its value, e.g. ``stages[0].distillation.output: false``."""
    unet: str | None = None
    """Folder of a net to judge; nothing is trained."""
    sampler: SamplingOverride = SamplingOverride()


class ComparisonConfig(Config):
    """A recipe, and what is varied in it."""

    name: str
    recipe: dict[str, Any]
    """As `archsearch.training.recipe.Recipe`, with `{seed}` where a text depends on it."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=2)
    variants: dict[str, VariantConfig] = Field(min_length=2)
    against: str
    """The variant that the others are compared with."""
    metrics: dict[str, Literal["lower", "higher"]] = Field(min_length=1)
    """What is compared, and which way is better."""

    _source: str = PrivateAttr(default="comparison")

    @model_validator(mode="after")
    def _has_what_is_compared_with(self) -> Self:
        if self.against not in self.variants:
            raise ValueError(f"against {self.against!r:.60} is no variant; use one of: {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice; name each once")
        return self

    @property
    def source(self) -> str:
        """The file it was read from, for errors."""
        return self._source

    def recipe_of(self, variant: str, seed: int) -> Recipe:
        """The recipe of one run.

        Raises:
            InputError: if a change's path leads nowhere, or the result is no recipe.
        """
        values = copy.deepcopy(self.recipe)
        for path, value in self.variants[variant].changes.items():
            _set(values, path, value, source=self.source, place=f"variants.{variant}.changes")
        values = _filled(values, seed) | {"name": f"{self.name}-{variant}-{seed}", "seed": seed}
        found = config.parse_config(values, Recipe, source=self.source, place=f"variants.{variant}")
        found._source = self.source
        return found


Results = dict[str, list[dict[str, Estimate]]]
"""Of each variant, one seed after another: its numbers."""


def load_comparison(name_or_path: str | Path) -> ComparisonConfig:
    """A shipped comparison by its name, or one's own by its path.

    Raises:
        InputError: naming the file, the place and the remedy.
    """
    path, values = read_named(name_or_path, ("comparison",))
    found = config.parse_config(values, ComparisonConfig, source=path)
    found._source = str(path)
    return found


def compare(comparison: ComparisonConfig, *, tell: Callable[[str], None]) -> Results:
    """Train what is not trained yet, and judge every variant with every seed; resumes as a training does.

    Raises:
        InputError: as `archsearch.training.run.train`, or if a variant's numbers lack a metric.
    """
    for variant in comparison.variants:  # every mistake before anything is trained
        comparison.recipe_of(variant, comparison.seeds[0])
    results: Results = {variant: [] for variant in comparison.variants}
    with terminable():
        for seed in comparison.seeds:
            for variant in comparison.variants:
                numbers = _numbers(comparison, variant, seed, tell)
                lacking = [metric for metric in comparison.metrics if metric not in numbers]
                if lacking:
                    known = ", ".join(numbers)
                    raise InputError(
                        comparison.source, f"{lacking[0]} is not measured", f"use {known}", place="metrics"
                    )
                results[variant].append(numbers)
    return results


def _numbers(comparison: ComparisonConfig, variant: str, seed: int, tell: Callable[[str], None]) -> dict[str, Estimate]:
    path = RUNS / comparison.name / f"{variant}-{seed}.json"
    recipe = comparison.recipe_of(variant, seed)
    said = {"recipe": recipe.model_dump(mode="json"), "variant": comparison.variants[variant].model_dump(mode="json")}
    if path.exists():
        known = json.loads(path.read_text())
        if {name: known.get(name) for name in said} == said:
            return {name: Estimate.model_validate(number) for name, number in known["numbers"].items()}
    tell(f"{variant}, seed {seed}")
    numbers = _judged(comparison.variants[variant], recipe, seed, tell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        listed = {name: number.model_dump(mode="json") for name, number in numbers.items()}
        part.write_text(json.dumps({**said, "numbers": listed}, indent=2) + "\n")
    return numbers


def _judged(variant: VariantConfig, recipe: Recipe, seed: int, tell: Callable[[str], None]) -> dict[str, Estimate]:
    arch = architecture(recipe.arch)
    number, stage = [(i, stage) for i, stage in enumerate(recipe.stages) if trains_student(stage)][-1]
    assert isinstance(stage, NetStage)
    own = sampler_of(recipe, stage)
    change = variant.sampler.model_dump(exclude_none=True)
    folder = RunFolder(recipe, arch).result(number)
    if variant.unet is not None:
        folder = Path(_filled({"unet": variant.unet}, seed)["unet"])
    else:
        train(recipe, arch, tell=tell)
        if not change:
            last = [e for e in read_evaluations(recipe.folder) if e["stage"] == stage.name][-1]
            return {name: Estimate.model_validate(value) for name, value in last["numbers"].items()}
    unet = read_unet(folder, arch)
    assert unet is not None
    device = devices.default_device()
    judge = RecipeEvaluator(RecipeData(recipe, device), stage.resolution)
    return judge.measure(unet.to(device), dataclasses.replace(own, **change))


def _filled(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """With the seed in every text that names it."""
    filled: dict[str, Any] = json.loads(json.dumps(values).replace(SEED, str(seed)))
    return filled


def _set(values: dict[str, Any], path: str, value: Any, *, source: str, place: str) -> None:
    steps: list[str | int] = []
    for part in path.split("."):
        match = _STEP.fullmatch(part)
        if not match:
            raise InputError(source, f"{part!r} is no step of a path", "write e.g. stages[0].batch", place=place)
        steps += [match[1], *map(int, re.findall(r"\d+", match[2]))]
    home: Any = values
    try:
        for step in steps[:-1]:
            home = home.setdefault(step, {}) if isinstance(home, dict) else home[step]
        home[steps[-1]] = value
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError(source, f"{path} leads nowhere in the recipe", "correct the path", place=place) from None
