"""Latents that a pipeline samples for prompts: training data for decoder distillation (SnapFusion, arXiv 2306.00980).

No images are needed, since a decoder is compared with another on the kind of latents that it will decode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from torch import Tensor

from snapgen import config, seeding
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io import chunked, pretrained
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.io.digests import digest_files
from snapgen.pipeline import loading
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from snapgen.progress import ProgressLog, silence_libraries

PIPELINE_CLASSES = (SnapGenPipeline.__name__, "StableDiffusionPipeline")
CHUNK_SIZE = 64
"""Latents that are cached together; an interruption loses at most this many."""
SAMPLE_BATCH_SIZE = 8
UNUSED_COMPONENTS = ("vae", "decoder", "safety_checker", "feature_extractor", "image_encoder")
"""Components on which latents do not depend."""


class SamplingConfig(Config):
    """How latents are sampled. None selects the pipeline's default; Stable Diffusion's is 50 steps, guidance 7.5."""

    num_latents: int = Field(default=1024, ge=2, le=10_000_000)
    """Latents to sample. The prompts are used cyclically, each time with other noise."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; None: the pipeline's."""
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    """Classifier-free guidance scale; None: the pipeline's."""
    resolution: int | None = Field(default=None, ge=8, le=4096)
    """Height and width of the images in pixels; None: the pipeline's."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the noise."""


def open_pipeline(run: str | Path) -> DiffusionPipeline:
    """Load a pipeline with an AutoencoderKL and a text encoder, on the CPU, without progress bars.

    Args:
        run: a run's folder or name, or the folder of a `SnapGenPipeline` or of diffusers' StableDiffusionPipeline.

    Raises:
        InputError: if there is none, it is of another class, damaged, or has no AutoencoderKL or no text encoder.
    """
    folder = loading.find_pipeline(run)
    index = config.read_mapping(folder / loading.INDEX)
    class_name = index.get("_class_name")
    if class_name not in PIPELINE_CLASSES:
        remedy = f"name the folder of a {' or '.join(PIPELINE_CLASSES)}"
        raise InputError(folder / loading.INDEX, f"describes {class_name or 'no pipeline'}", remedy)
    for name in ("text_encoder", "tokenizer"):
        if index.get(name) in (None, [None, None]):
            raise InputError(
                folder, f"has no {name.replace('_', ' ')}", "name a pipeline that takes prompts", place=name
            )
    pipeline = loading.load_pipeline(folder) if class_name == SnapGenPipeline.__name__ else _stable_diffusion(folder)
    if not isinstance(pipeline.vae, AutoencoderKL):
        problem = f"has a {type(pipeline.vae).__name__}, not an AutoencoderKL"
        raise InputError(folder, problem, "name a pipeline with an AutoencoderKL", place="vae")
    if getattr(pipeline, "decoder", None) is not None:
        raise InputError(folder, "already has a tiny decoder", "name a pipeline without one", place="decoder")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(
    pipeline: DiffusionPipeline, folder: Path, prompts: Sequence[str], sampling: SamplingConfig
) -> ChunkedTensor:
    """Latents that the pipeline samples, cached in chunks, so that an interrupted run resumes.

    Args:
        pipeline: from `open_pipeline`, on the device that samples.
        folder: the pipeline's folder, whose digest is part of the cache key.
        prompts: used cyclically.
        sampling: number of latents and how they are sampled.

    Returns:
        float16 ``(num_latents, C, h, w)`` on the CPU, memory-mapped.

    Raises:
        InputError: if a latent is not finite, or the pipeline does not support the resolution.
    """
    digest = digest_of(folder)
    progress = ProgressLog(str(folder), "drawn", "latents", sampling.num_latents)

    def key(chunk: range) -> dict[str, JSON]:
        chunk_prompts = json.dumps([prompts[i % len(prompts)] for i in chunk])
        return {
            "pipeline": digest,
            "prompts": hashlib.sha256(chunk_prompts.encode()).hexdigest(),
            **sampling.model_dump(mode="json", exclude={"num_latents"}),
            "first": chunk.start,
            "rows": len(chunk),
        }

    def sample(chunk: range) -> dict[str, Tensor]:
        batches = []
        progress.skip_to(chunk.start)
        for start in range(chunk.start, chunk.stop, SAMPLE_BATCH_SIZE):
            indices = range(start, min(start + SAMPLE_BATCH_SIZE, chunk.stop))
            batches.append(_sample(pipeline, [prompts[i % len(prompts)] for i in indices], indices, sampling))
            progress.add(len(indices))
        return {"latents": torch.cat(batches).half()}

    starts = range(0, sampling.num_latents, CHUNK_SIZE)
    chunks = [range(start, min(start + CHUNK_SIZE, sampling.num_latents)) for start in starts]
    result = chunked.cached_chunks("synthetic", chunks, key, sample)["latents"]
    if not all(bool(result[torch.arange(chunk.start, chunk.stop)].isfinite().all()) for chunk in chunks):
        raise InputError(folder, "samples latents that are not finite", "check its weights, or lower the guidance")
    return result


def digest_of(folder: Path) -> str:
    """Digest of all files of a pipeline on which its latents depend."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    used = [file for file in files if file.relative_to(folder).parts[0] not in UNUSED_COMPONENTS]
    return digest_files(used, [str(file.relative_to(folder)) for file in used])


@torch.no_grad()
def _sample(pipeline: DiffusionPipeline, prompts: list[str], indices: range, sampling: SamplingConfig) -> Tensor:
    """Latents (len(indices), C, h, w) on the CPU; each one's noise depends only on its index."""
    options = {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "height": sampling.resolution,
        "width": sampling.resolution,
    }
    seeds = [seeding.derive_seed(sampling.seed, "synthetic noise", i) for i in indices]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {name: value for name, value in options.items() if value is not None}
    try:
        sampled = pipeline(prompts, generator=generators, output_type="latent", **options).images
    except InputError:
        raise
    except ValueError as error:  # diffusers' error for sizes that do not fit
        problem = " ".join(str(error).split())[:200]
        raise InputError("pipeline", problem, "use another resolution or number of steps") from None
    return cast(Tensor, sampled).float().cpu()


def _stable_diffusion(folder: Path) -> DiffusionPipeline:
    with silence_libraries():  # the import logs a notice about image processors
        from diffusers import StableDiffusionPipeline

    unet = pretrained.load_net(folder / "unet", UNet2DConditionModel)
    return loading.assemble(StableDiffusionPipeline, folder, {"unet": unet})
