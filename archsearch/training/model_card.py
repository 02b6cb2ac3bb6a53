"""The sections of a model card that a training knows: data, recipe, protocol, scores, latencies."""

from __future__ import annotations

from pathlib import Path

from archsearch.training.compatibility import ResolvedShapes
from archsearch.training.log import read_evaluations
from archsearch.training.recipe import Recipe
from snapgen.architecture.schema import Architecture
from snapgen.config import as_yaml
from snapgen.errors import InputError
from snapgen.training.stages import DecoderStage

LICENCES = {
    "emoji": "Fluent emoji by Microsoft: MIT. Noto emoji by Google: Apache-2.0. Captions of emojibase: MIT.",
    "emoji-styles": "Fluent emoji by Microsoft and captions of emojibase: MIT. Noto and Firefox OS emoji: Apache-2.0. "
    "Twemoji and EmojiOne: CC BY 4.0, which asks for their names.",
}
"""Licences of the data sets within the package."""


def sections(run: Path, recipe: Recipe, arch: Architecture, shapes: ResolvedShapes) -> dict[str, str]:
    """Sections by their heading, from a run's folder.

    Args:
        run: the run's folder.
        recipe: its recipe.
        arch: architecture of the student.
        shapes: shapes of what the recipe names.
    """
    return {
        "Data": f"Trained on `{recipe.data}`. {LICENCES.get(recipe.data, 'FILL IN: its licence and origin.')}",
        "Training": _training(recipe),
        "Scores": _scores(run, recipe),
        "Latency": _latencies(recipe, arch, shapes),
    }


def _training(recipe: Recipe) -> str:
    rows = ["| stage | kind | images | batch | steps |", "|---|---|---|---|---|"]
    for stage in recipe.stages:
        settings = stage.training if isinstance(stage, DecoderStage) else stage
        images = settings.steps * settings.batch_size
        rows.append(f"| {stage.name} | {stage.kind} | {images:,} | {settings.batch_size} | {settings.steps:,} |")
    return "\n".join([f"By the recipe `{recipe.name}` of archsearch, seed {recipe.seed}:", "", *rows])


def _scores(run: Path, recipe: Recipe) -> str:
    nets = {stage.name for stage in recipe.stages if not isinstance(stage, DecoderStage)}
    sampled = (each for each in read_evaluations(run) if each.sampling is not None)  # not those of the teacher
    evaluations = [each for each in sampled if each.stage in nets]
    if not evaluations:
        return "None were measured."
    last = evaluations[-1]
    rows = ["| number | value | 95 % interval |", "|---|---|---|"]
    for name, number in last.numbers.items():
        value, low, high = (f"{side:.4g}" for side in (number.value, number.low, number.high))
        rows.append(f"| {name.replace('_', ' ')} | {value} | {low} to {high} |")
    protocol = as_yaml(recipe.evaluation.model_dump(mode="json", exclude={"prompts"}), max_length=2000)
    return (
        "\n".join([f"Of the stage {last.stage} after {last.images:,} images, on held-out images:", "", *rows])
        + f"\n\nProtocol: `{protocol}`, sampling `{last.sampling}`. Only numbers of one protocol are comparable."
    )


def _latencies(recipe: Recipe, arch: Architecture, shapes: ResolvedShapes) -> str:
    from archsearch.cost.operations import operations
    from archsearch.predictor import profiles

    last = [stage.resolution for stage in recipe.stages if not isinstance(stage, DecoderStage)][-1]
    latent, tokens = last // shapes.factor, max((encoder.tokens for encoder in recipe.text_encoders), default=1)
    rows = ["| device | milliseconds | 90 % interval | source | runtime |", "|---|---|---|---|---|"]
    for name in profiles.NAMES:
        model = profiles.model(name)
        try:
            record = model.record(model.predict(operations(arch, latent, context_tokens=tokens)))
        except InputError:
            continue
        low, high = (f"{side:.3g}" for side in (record.estimate.low, record.estimate.high))
        rows.append(f"| {name} | {record.median_ms:.3g} | {low} to {high} | {record.source} | {record.engine} |")
    intro = f"One pass of the U-Net at batch size 1, a latent of {latent} × {latent} and {tokens} tokens. "
    intro += "Predicted from figures that others have published; no such device has run this net."
    return "\n".join([intro, "", *rows])
