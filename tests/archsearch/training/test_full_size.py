"""The paper's nets at their full size, each a real optimizer step of its recipe: at a small latent, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from archsearch.studies.lookup import find_architecture
from archsearch.training import recipe as recipes
from archsearch.training.recipe import Recipe
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import EncodedCaptions, TextEncoderConfig
from snapgen.conditioning.embeddings import Embeddings
from snapgen.diffusion.process import RectifiedFlow
from snapgen.io.chunked import ChunkedTensor
from snapgen.models.unet import UNet
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher, new_teacher
from snapgen.training.batches import BatchStream, few_step_timesteps, training_timesteps
from snapgen.training.loop import StepStats, Trainer
from snapgen.training.stages import AdversarialDistillationStage, FlowMatchingStage

LATENT = 16
DEPTH = 2
"""Number of layers of the teacher, whose width is the recipe's."""


def captions(recipe: Recipe, encoders: Sequence[TextEncoderConfig]) -> EncodedCaptions:
    """Random conditioning of two images, with the dimensions of the recipe's encoders."""
    assert recipe.expected_shapes is not None
    shapes = [recipe.expected_shapes.text_encoders[e.encoder] for e in encoders]
    tables = [
        Embeddings(ChunkedTensor([torch.randn(2, encoder.tokens, width)]), ChunkedTensor([torch.randn(2, pooled)]))
        for encoder, (width, pooled) in zip(encoders, shapes, strict=True)
    ]
    return EncodedCaptions(tables, torch.arange(2), conditioning.layout(encoders, shapes))


def shallow_teacher(recipe: Recipe, told: EncodedCaptions) -> Teacher:
    """A teacher with the recipe's width and precision."""
    assert recipe.expected_shapes is not None
    assert recipe.expected_shapes.teacher is not None
    assert recipe.teacher is not None
    found = new_teacher(
        {**recipe.expected_shapes.teacher.model_dump(), "num_layers": DEPTH},
        latent_channels=recipe.expected_shapes.latent_channels,
        context_dim=told.context_dim,
        pooled_width=told.pooled_width,
        sample_size=LATENT,
        seed=0,
    )
    return found.to(torch.bfloat16 if recipe.teacher.bfloat16 else torch.float32).eval().requires_grad_(False)


def new_loop(name: str, stage_name: str) -> Trainer:
    """Trainer of one step of a recipe's stage with two images; no weight is zero, so that all have a gradient."""
    recipe = recipes.load_recipe(name)
    assert recipe.expected_shapes is not None
    stage = next(stage for stage in recipe.stages if stage.name == stage_name)
    assert isinstance(stage, FlowMatchingStage | AdversarialDistillationStage)
    stage = stage.model_copy(update={"batch_size": 2, "num_images": 2, "gradient_accumulation_steps": 1})
    net = UNet(find_architecture(recipe.architecture))
    net.init_weights(0)
    for weight in net.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.01)
    if stage.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    told = captions(recipe, recipe.teacher_text_encoders) if recipes.learns_from_teacher(stage) else None
    teacher = None if told is None else shallow_teacher(recipe, told)
    shift = stage.timestep_shift_value
    feed = BatchStream(
        ChunkedTensor([torch.randn(2, recipe.expected_shapes.latent_channels, LATENT, LATENT)]),
        captions(recipe, recipe.text_encoders),
        teacher=told,
        dropout=[encoder.dropout for encoder in recipe.text_encoders],
        batch_size=2,
        timesteps=few_step_timesteps(stage.student_steps, shift)
        if isinstance(stage, AdversarialDistillationStage)
        else training_timesteps(RectifiedFlow(shift=shift)),
        seed=0,
        device=torch.device("cpu"),
    )
    found, settings = build_objectives(stage, net, teacher, prediction=recipe.prediction_type, seed=0)
    return Trainer(stage, net, found, feed, accelerator=Accelerator(cpu=True), optimizer_configs=settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage", "millions", "told"),
    [
        ("snapgen_imagenet", "base", 372, {"student task"}),
        ("snapgen_t2i", "base-256", 379, {"student task", "student output", "student features"}),
        ("snapgen_t2i", "few-steps", 379, {"student adversarial", "student output", "critic real", "critic r1"}),
    ],
)
def test_a_stage_takes_a_step(recipe: str, stage: str, millions: int, told: set[str]) -> None:
    """One training step at full size, which takes less than 10 GB of memory."""
    torch.manual_seed(0)
    loop = new_loop(recipe, stage)
    weights = dict(loop.net.named_parameters())
    assert round(sum(weight.numel() for weight in weights.values()) / 1e6) == millions
    before = {name: weight.detach().double().sum().item() for name, weight in weights.items()}
    reports: list[StepStats] = []
    loop.run(report=reports.append, should_pause=lambda _: False, pause=lambda: None)
    (report,) = reports
    assert report.skipped == []
    assert told <= report.losses.keys()
    assert all(math.isfinite(value) for value in report.losses.values())
    assert all(report.losses[f"{objective} gradient"] > 0 for objective in loop.objectives)
    after = {name: weight.detach().double().sum().item() for name, weight in weights.items()}
    assert all(math.isfinite(value) for value in after.values())
    assert [name for name in after if after[name] == before[name]] == []
