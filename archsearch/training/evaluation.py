"""Evaluation of a recipe's nets: its data, and how the net of each stage is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from archsearch.quality.evaluator import SamplingConfig
from archsearch.training.recipe import Recipe
from snapgen.diffusion.process import NoiseProcess, make_process
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import Teacher
from snapgen.optim.ema import EMA
from snapgen.training.data import TrainingData
from snapgen.training.stages import AdversarialDistillationStage, NetStage, ProgressiveDistillationStage


def training_data(recipe: Recipe, device: torch.device) -> TrainingData:
    """Data of a recipe on a device."""
    return TrainingData(
        recipe.data,
        recipe.autoencoder,
        recipe.text_encoders,
        teacher_text_encoders=recipe.teacher_text_encoders,
        device=device,
    )


def sampling_config(recipe: Recipe, stage: NetStage) -> SamplingConfig:
    """Sampling settings of the net that a stage produces.

    A stage that distills steps uses its own number of steps. Adversarial distillation learns from a guided teacher, so
    its net is sampled without guidance.
    """
    return SamplingConfig(
        num_inference_steps=stage.student_steps
        if isinstance(stage, AdversarialDistillationStage | ProgressiveDistillationStage)
        else recipe.evaluation.num_inference_steps,
        guidance_scale=1 if isinstance(stage, AdversarialDistillationStage) else recipe.evaluation.guidance_scale,
        timestep_shift=stage.timestep_shift_value,
    )


def process_of(recipe: Recipe, net: UNet | Teacher, sampling: SamplingConfig) -> NoiseProcess:
    """Noise process of a recipe's student or teacher."""
    prediction_type = net.prediction if isinstance(net, Teacher) else recipe.prediction_type
    return make_process(prediction_type, shift=sampling.timestep_shift)


@contextlib.contextmanager
def ema_weights(net: nn.Module, average: EMA) -> Iterator[None]:
    """Use the averaged weights of a net inside the block, and restore its own afterwards."""
    original = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(average.state())
    try:
        yield
    finally:
        net.load_state_dict(original)
