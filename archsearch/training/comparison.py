"""Comparison of variants of a recipe over the same seeds, to measure the effect of a choice in training."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from archsearch.library import RUNS, NamedConfig, read_named
from archsearch.stats.estimate import Estimate
from archsearch.studies.lookup import find_architecture
from archsearch.studies.signals import terminable
from archsearch.training.compatibility import contents_of, net_digest, resolve_shapes
from archsearch.training.evaluation import StageEvaluator, finite_outputs, process_of, sampling_config, training_data
from archsearch.training.log import read_evaluations
from archsearch.training.recipe import Recipe, trains_student
from archsearch.training.run import check_run, train
from archsearch.training.run_folder import RunFolder, check_unet, read_unet
from snapgen import devices, files
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, rule
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write, write_errors
from snapgen.io.prediction_type import check_prediction_type
from snapgen.training.stages import NetStage

SEED = "{seed}"
"""Placeholder of the seed in a recipe's texts, e.g. in the path of weights."""
REMOVE = "remove it to evaluate the variant again"
"""What to do about a damaged result."""
_PATH_STEP = re.compile(r"([a-z_0-9]+)((?:\[\d+\])*)")


class SamplingOverride(Config):
    """Sampling settings of a variant that differ from those of its last stage."""

    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; None: those of the variant's last stage."""
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    """Guidance scale; None: that of the variant's last stage."""


class VariantConfig(Config):
    """One row of a comparison."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Paths in the recipe and their values, e.g. `stages[0].distillation.output: false`."""
    checkpoint: str | None = None
    """Folder of a net to evaluate instead of training one; it may contain {seed}."""
    sampling: SamplingOverride = SamplingOverride()
    """Sampling settings of this variant, where they differ from those of its last stage."""
    baselines: tuple[str, ...] | None = None
    """Variants that this one is compared with; None: the comparison's baseline."""


class ComparisonConfig(NamedConfig):
    """A recipe and its variants."""

    name: str
    """Name of the comparison; its runs are runs/NAME-VARIANT-SEED, their results runs/NAME/. By default the name of the
    file."""
    recipe: Annotated[dict[str, Any], BeforeValidator(lambda value: value, json_schema_input_type=Recipe)]
    """The recipe that all variants share; {seed} in a text stands for the seed."""
    # It is validated only once its seed and a variant's overrides are filled in.
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=2)
    """Seeds of each variant; at least two, since intervals come from their spread."""
    variants: dict[str, VariantConfig] = Field(min_length=2)
    """Variants by name; each is one row of the table."""
    baseline: str
    """Name of the variant that the others are compared with, unless they name their own."""
    metrics: dict[str, Literal["lower", "higher"]] = Field(min_length=1)
    """Metrics of the table, each with the direction that is better, lower or higher: `validation_loss`,
    `frechet_distance`, `kernel_distance`, `copied`, `retrieval_r1`, `retrieval_r10`, `retrieval_mrr`."""

    _source: str = PrivateAttr(default="comparison")

    @rule
    def _has_its_baseline(self) -> None:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r:.60} is not a variant; use one of: {', '.join(self.variants)}")

    @rule
    def _has_the_baselines_of_its_variants(self) -> None:
        for name, variant in self.variants.items():
            for number, baseline in enumerate(variant.baselines or ()):
                if baseline == name or baseline not in self.variants:
                    others = ", ".join(other for other in self.variants if other != name)
                    problem = f"variants.{name}.baselines[{number}] is {baseline!r:.60}, which is no other variant"
                    raise ValueError(f"{problem}; use some of: {others}")
                if baseline in (variant.baselines or ())[:number]:
                    raise ValueError(f"variants.{name}.baselines lists {baseline!r:.60} twice; list each once")

    @rule
    def _sets_seed_and_name_itself(self) -> None:
        settings = {"recipe": self.recipe, **{f"variants.{n}.overrides": v.overrides for n, v in self.variants.items()}}
        for place, values in settings.items():
            for field in ("seed", "name"):
                if isinstance(values, dict) and field in values:
                    raise ValueError(f"{place}.{field} is set by the comparison itself; remove it")

    @rule
    def _has_no_seed_twice(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is listed twice; list each once")

    def baselines_of(self, variant: str) -> tuple[str, ...]:
        """Names of the variants that a variant is compared with."""
        own = self.variants[variant].baselines
        return own if own is not None else (self.baseline,) if variant != self.baseline else ()

    def recipe_of(self, variant: str, seed: int) -> Recipe:
        """Recipe of one run: the shared recipe with the overrides of a variant, and a seed.

        Raises:
            InputError: if the path of an override does not exist, or the result is not a valid recipe.
        """
        values = copy.deepcopy(self.recipe)
        for path, value in self.variants[variant].overrides.items():
            _set(values, path, value, source=self.source, place=f"variants.{variant}.overrides")
        values = _with_seed(values, seed) | {"name": f"{self.name}-{variant}-{seed}", "seed": seed}
        return Recipe.parse(values, self.source, place=f"variants.{variant}")

    @property
    def nets(self) -> dict[str, str]:
        """The net that each variant evaluates, as its folder for the first seed; several variants may share one."""
        if not any(variant.checkpoint for variant in self.variants.values()):
            return {name: name for name in self.variants}
        seed = self.seeds[0]
        return {name: str(_net_folder(v, self.recipe_of(name, seed), seed)) for name, v in self.variants.items()}


class VariantResult(Config):
    """A file with what was measured of a variant with one seed, and of what."""

    recipe: dict[str, Any]
    """The variant's recipe."""
    variant: dict[str, Any]
    """Its settings, but for its baselines."""
    contents: dict[str, str] | None = None
    """Digests of what the numbers depend on beside the settings."""
    numbers: dict[str, Estimate]
    """What was measured, by name."""


Results = dict[str, list[dict[str, Estimate]]]
"""Metrics of each variant, one mapping per seed."""


def load_comparison(name_or_path: str | Path) -> ComparisonConfig:
    """Load a shipped comparison by its name, or a comparison's YAML file by its path.

    Raises:
        InputError: if the file does not exist or is invalid.
    """
    path, values = read_named(name_or_path, ("comparison",))
    return ComparisonConfig.parse(values, path)


def compare(comparison: ComparisonConfig, *, log: Callable[[str], None]) -> Results:
    """Train and evaluate every variant with every seed, or resume; finished results are reused.

    Args:
        comparison: the comparison.
        log: called with each line for the user.

    Raises:
        InputError: for the reasons of `archsearch.training.run.train`, if a metric is not measured, if a stored
            result is damaged, or if a net's outputs are not finite.
    """
    _check(comparison)
    results: Results = {variant: [] for variant in comparison.variants}
    with terminable():
        for seed in comparison.seeds:
            for variant in comparison.variants:
                results[variant].append(_load_or_evaluate(comparison, variant, seed, log))
    return results


def _check(comparison: ComparisonConfig) -> None:
    """Report the mistakes that can be seen before anything is trained."""
    own_runs = [str(RUNS / f"{comparison.name}-{variant}-") for variant in comparison.variants]
    for variant, config in comparison.variants.items():
        for seed in comparison.seeds:
            recipe = comparison.recipe_of(variant, seed)
            arch, _ = _architecture(recipe), _student_stage(recipe)
            measured = recipe.evaluation.metrics
            for metric in comparison.metrics:
                if metric not in measured:
                    remedy = f"use {', '.join(measured)}"
                    raise InputError(comparison.source, f"{metric} is not measured", remedy, place="metrics")
            if _result_path(comparison, variant, seed).exists():
                continue
            folder, text = _net_folder(config, recipe, seed), recipe.model_dump_json()
            if config.checkpoint is not None and not str(folder).startswith(tuple(own_runs)):
                with recipe.error_context("checkpoint"):
                    check_unet(folder, arch)
            # A variant that begins with a net of this comparison is checked when that net is trained.
            elif config.checkpoint is None and not any(run in text for run in own_runs):
                check_run(recipe, arch)


def _result_path(comparison: ComparisonConfig, variant: str, seed: int) -> Path:
    return RUNS / comparison.name / f"{variant}-{seed}.json"


def _load_or_evaluate(
    comparison: ComparisonConfig, variant: str, seed: int, log: Callable[[str], None]
) -> dict[str, Estimate]:
    path = _result_path(comparison, variant, seed)
    recipe = comparison.recipe_of(variant, seed)
    config = comparison.variants[variant]
    settings = config.model_dump(mode="json", exclude={"baselines"})  # which change no number
    inputs = {"recipe": recipe.model_dump(mode="json"), "variant": settings}
    if path.exists():
        stored = _read_result(path)
        if (stored.recipe, stored.variant) == (inputs["recipe"], inputs["variant"]):
            if not stored.numbers.keys() >= {*recipe.evaluation.metrics}:
                raise InputError(path, "is damaged", REMOVE)
            if _contents(config, recipe, seed) in (None, stored.contents):
                return stored.numbers
    log(f"{variant}, seed {seed}")
    numbers = _evaluate(config, recipe, seed, log)
    result = VariantResult(**inputs, contents=_contents(config, recipe, seed), numbers=numbers)
    with write_errors(path, "move what is in the way, or free disk space; the same command resumes"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(result.model_dump_json(indent=2) + "\n")
    return numbers


def _read_result(path: Path) -> VariantResult:
    text = files.read_text(path, REMOVE)
    try:
        return VariantResult.model_validate_json(text)
    except ValidationError:
        raise InputError(path, "is damaged", REMOVE) from None


def _contents(variant: VariantConfig, recipe: Recipe, seed: int) -> dict[str, str] | None:
    """Digests of what a variant's numbers depend on beside its settings; None if some of it is not there any more."""
    try:
        if variant.checkpoint is None:
            return contents_of(recipe, resolve_shapes(recipe))
        return {"checkpoint": net_digest(_net_folder(variant, recipe, seed))}
    except (InputError, OSError):
        return None


def _evaluate(variant: VariantConfig, recipe: Recipe, seed: int, log: Callable[[str], None]) -> dict[str, Estimate]:
    arch, (_, stage) = _architecture(recipe), _student_stage(recipe)
    default_sampling = sampling_config(recipe, stage)
    overrides = variant.sampling.model_dump(exclude_none=True)
    folder = _net_folder(variant, recipe, seed)
    if variant.checkpoint is not None:
        check_prediction_type(folder, recipe.prediction_type)
    else:
        train(recipe, arch, log=log)
        evaluations = [e for e in read_evaluations(recipe.folder) if e.stage == stage.name]
        if evaluations and not overrides:
            return evaluations[-1].numbers
    unet = read_unet(folder, arch)
    assert unet is not None
    device = devices.default_device()
    evaluator = StageEvaluator(recipe, training_data(recipe, device)).at(stage.resolution)
    sampling = dataclasses.replace(default_sampling, **overrides)
    process = process_of(recipe, unet, sampling)
    with finite_outputs(folder):
        return evaluator.measure(unet.to(device), process, sampling, retrieval=recipe.evaluation.retrieval)


def _architecture(recipe: Recipe) -> Architecture:
    with recipe.error_context("architecture"):
        return find_architecture(recipe.architecture)


def _student_stage(recipe: Recipe) -> tuple[int, NetStage]:
    """Number and settings of the last stage that trains the student, whose net is evaluated."""
    students = [(i, stage) for i, stage in enumerate(recipe.stages) if trains_student(stage)]
    if not students:
        with recipe.error_context("stages"):
            raise InputError("stages", "no stage trains the student, so there is no net to evaluate", "add one")
    number, stage = students[-1]
    assert isinstance(stage, NetStage)
    return number, stage


def _net_folder(variant: VariantConfig, recipe: Recipe, seed: int) -> Path:
    """Folder of the net that a variant evaluates with a seed."""
    if variant.checkpoint is not None:
        return Path(os.path.normpath(variant.checkpoint.replace(SEED, str(seed))))
    number, _ = _student_stage(recipe)
    return RunFolder(recipe, _architecture(recipe)).result(number)


def _with_seed(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The values with the seed in place of every `SEED` placeholder."""
    replaced: dict[str, Any] = json.loads(json.dumps(values).replace(SEED, str(seed)))
    return replaced


def _set(values: dict[str, Any], path: str, value: Any, *, source: str, place: str) -> None:
    """Set the value at a path such as ``stages[0].distillation.output``."""
    steps: list[str | int] = []
    for segment in path.split("."):
        match = _PATH_STEP.fullmatch(segment)
        if not match:
            raise InputError(
                source, f"{segment!r} is not a valid step of a path", "write e.g. stages[0].batch_size", place=place
            )
        steps += [match[1], *map(int, re.findall(r"\d+", match[2]))]
    parent: Any = values
    try:
        for step in steps[:-1]:
            parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
        parent[steps[-1]] = value
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError(source, f"{path} does not exist in the recipe", "correct the path", place=place) from None
