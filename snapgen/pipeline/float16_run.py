"""A run of a pipeline in float16, which finds the layers whose activations half precision cannot represent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snapgen.architecture.latent_size import LatentSize, latent_sides
from snapgen.diffusion.rectified_flow import per_image_noise
from snapgen.pipeline.loading import load_pipeline
from snapgen.pipeline.snapgen_pipeline import TEXT_ENCODERS, SnapGenPipeline

LARGEST = torch.finfo(torch.float16).max
"""65,504: the largest number of half precision."""

PROMPTS = ("a red heart", "a photo of a small brown dog that runs along a beach at sunset")
"""Captions of the run, if none are given."""

STEPS = 4
"""Most sampling steps of the run: a CPU computes float16 slowly, and few steps pass all levels of noise, too."""


class Peak(NamedTuple):
    """Largest absolute value of a component's activations; infinite if one overflowed."""

    layer: str
    """Where it was; of overflows where the first one was."""
    value: float


def activation_peaks(folder: Path, latent_size: LatentSize, prompts: Sequence[str] = PROMPTS) -> dict[str, Peak]:
    """Draw prompts with a pipeline in float16 and return the peak of each component that an export has.

    Args:
        folder: the pipeline's folder.
        latent_size: height and width of the latents.
        prompts: captions to draw.

    Raises:
        InputError: if the pipeline is damaged, or cannot sample latents of that size.
    """
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    watched = components(pipeline)
    peaks: dict[str, Peak] = {}
    for name, module in watched.items():
        nn.Module.to(module, torch.float16)  # diffusers' `to` logs a warning
        for layer, inner in module.named_modules():
            inner.register_forward_hook(_watch(peaks, name, layer))
    shape = (pipeline.unet.arch.latent_channels, *latent_sides(latent_size))
    noise = per_image_noise(range(len(prompts)), shape, seed=0)
    pipeline(
        list(prompts),
        latents=noise,
        num_inference_steps=min(STEPS, pipeline.config.steps),
        output_type="pt",
        batch_size=1,
    )
    return peaks


def components(pipeline: SnapGenPipeline) -> dict[str, nn.Module]:
    """Components of a pipeline that an export has, by the names of their packages."""
    decoder = pipeline.vae if pipeline.decoder is None else pipeline.decoder
    encoders = {name: encoder for name, (encoder, _) in zip(TEXT_ENCODERS, pipeline.text_encoders, strict=False)}
    return {"unet": pipeline.unet, "decoder": decoder, **(encoders if pipeline.unet.needs_context else {})}


def _watch(peaks: dict[str, Peak], component: str, layer: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        value = max((_largest(tensor) for tensor in _tensors(output)), default=0.0)
        known = peaks.get(component)
        if known is None or (value > known.value and math.isfinite(known.value)):
            peaks[component] = Peak(layer or type(_).__name__, value)

    return hook


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t for each in output for t in _tensors(each)] if isinstance(output, tuple | list) else []


def _largest(tensor: Tensor) -> float:
    value = float(tensor.detach().abs().max())
    return math.inf if math.isnan(value) else value
