"""Latents that a pipeline draws for prompts: the data of a decoder's distillation (SnapFusion, arXiv 2306.00980).

No images are needed: a decoder is held against another on the latents that it will be given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from pydantic import Field
from torch import Tensor

from snapgen import config, seeding
from snapgen import progress as progress_
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.io.digests import digest_files
from snapgen.pipeline import loading
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from snapgen.progress import Progress

KINDS = (SnapGenPipeline.__name__, "StableDiffusionPipeline")
PART = 64
"""Latents that are kept at once: what an interruption costs at most."""
BATCH = 8
UNUSED = ("vae", "decoder", "safety_checker", "feature_extractor", "image_encoder")
"""Components that no latent depends on."""


class SamplingConfig(Config):
    """How latents are drawn. Whatever is None is the pipeline's own: of Stable Diffusion's 50 steps, guidance 7.5."""

    images: int = Field(default=1024, ge=2)
    """Latents; the prompts are taken in turn, each time with another noise."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=0, le=100)
    resolution: int | None = Field(default=None, ge=8, le=4096)
    """Of the images, in pixels."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)


def open_pipeline(run: str | Path) -> DiffusionPipeline:
    """A pipeline of an AutoencoderKL and a text encoder, on the CPU, whose sampler shows nothing.

    Args:
        run: a run's folder or name, or a folder of a `SnapGenPipeline` or of diffusers' StableDiffusionPipeline.

    Raises:
        InputError: if there is none, it is of another kind, damaged, or has no AutoencoderKL or no text encoder.
    """
    folder = loading.find_pipeline(run)
    index = config.read_mapping(folder / loading.INDEX)
    kind = index.get("_class_name")
    if kind not in KINDS:
        remedy = f"name a folder of {' or '.join(KINDS)}"
        raise InputError(folder / loading.INDEX, f"describes {kind or 'no pipeline'}", remedy)
    for name in ("text_encoder", "tokenizer"):
        if index.get(name) in (None, [None, None]):
            raise InputError(
                folder, f"has no {name.replace('_', ' ')}", "name a pipeline that takes prompts", place=name
            )
    pipeline = loading.load_pipeline(folder) if kind == SnapGenPipeline.__name__ else _stable_diffusion(folder)
    if not isinstance(pipeline.vae, AutoencoderKL):
        problem = f"has a {type(pipeline.vae).__name__}, no AutoencoderKL"
        raise InputError(folder, problem, "name a pipeline of Stable Diffusion's kind of autoencoder", place="vae")
    if getattr(pipeline, "decoder", None) is not None:
        raise InputError(folder, "decodes by a tiny decoder already", "name a pipeline without", place="decoder")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(
    pipeline: DiffusionPipeline, folder: Path, prompts: Sequence[str], sampling: SamplingConfig
) -> ChunkedTensor:
    """Latents as the pipeline draws them, kept part by part: what was drawn before is not drawn again.

    Args:
        pipeline: as `open_pipeline` gives it, on the device that is to draw.
        folder: its own, for the cache.

    Returns:
        float16 ``(images, C, h, w)`` on the CPU, memory-mapped.

    Raises:
        InputError: if a latent is not finite, or the resolution is none of the pipeline's.
    """
    digest = digest_of(folder)
    progress, reached = Progress(str(folder), "drawn", "latents", sampling.images), 0

    def key(part: range) -> dict[str, JSON]:
        taken = json.dumps([prompts[i % len(prompts)] for i in part])
        drawn = sampling.model_dump(mode="json", exclude={"images"})
        return {
            "pipeline": digest,
            "prompts": hashlib.sha256(taken.encode()).hexdigest(),
            **drawn,
            "first": part.start,
            "rows": len(part),
        }

    def drawn(part: range) -> dict[str, Tensor]:
        nonlocal reached
        found = []
        progress.skip(part.start - reached)
        reached = part.stop
        for start in range(part.start, part.stop, BATCH):
            indices = range(start, min(start + BATCH, part.stop))
            found.append(_draw(pipeline, [prompts[i % len(prompts)] for i in indices], indices, sampling))
            progress.add(len(indices))
        return {"latents": torch.cat(found).half()}

    starts = range(0, sampling.images, PART)
    ranges = [range(start, min(start + PART, sampling.images)) for start in starts]
    found = chunked.cached_chunks("synthetic", ranges, key, drawn)["latents"]
    if not all(bool(found[torch.arange(part.start, part.stop)].isfinite().all()) for part in ranges):
        raise InputError(folder, "draws latents that are not finite", "check its weights, or lower the guidance")
    return found


def digest_of(folder: Path) -> str:
    """Of all that a pipeline's latents depend on."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    used = [file for file in files if file.relative_to(folder).parts[0] not in UNUSED]
    return digest_files(used, [str(file.relative_to(folder)) for file in used])


@torch.no_grad()
def _draw(pipeline: DiffusionPipeline, prompts: list[str], indices: range, sampling: SamplingConfig) -> Tensor:
    """On the CPU; an image's noise depends on its index alone."""
    given = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "height": sampling.resolution,
        "width": sampling.resolution,
    }
    noises = [torch.Generator().manual_seed(seeding.derive_seed(sampling.seed, "synthetic noise", i)) for i in indices]
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        found = pipeline(prompts, generator=noises, output_type="latent", **asked).images
    except InputError:
        raise
    except ValueError as error:  # diffusers' way of telling sizes that do not fit
        raise InputError("pipeline", " ".join(str(error).split())[:200], "ask for other sizes or steps") from None
    return cast(Tensor, found).float().cpu()


def _stable_diffusion(folder: Path) -> DiffusionPipeline:
    with progress_.silence_libraries():  # to import it is to be told of image processors
        from diffusers import StableDiffusionPipeline

        try:
            found = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except Exception as error:  # diffusers, transformers, safetensors and torch each raise kinds of their own
            problem = f"cannot be loaded ({' '.join(str(error).split())[:240] or type(error).__name__})"
            raise InputError(folder, problem, "restore it from where it came") from None
    return cast(DiffusionPipeline, found)
