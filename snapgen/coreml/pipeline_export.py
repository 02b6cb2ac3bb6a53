"""Exports a pipeline as packages with a JSON file that describes how to run them.

The exported modules are tested against torch in float32. The pipeline has not been run on a phone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL

from snapgen.architecture.latent_size import LatentSize, latent_sides
from snapgen.conditioning import captions, text_encoder
from snapgen.coreml import convert as coreml
from snapgen.coreml.convert import COREML
from snapgen.coreml.package import PackageOptions, Target
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder, check_new_folder
from snapgen.pipeline.float16_run import LARGEST, PROMPTS, Peak, activation_peaks
from snapgen.pipeline.loading import load_pipeline, merged_folder
from snapgen.pipeline.snapgen_pipeline import TEXT_ENCODERS, TOKENIZERS, SnapGenPipeline
from snapgen.progress import ProgressCallback, ignore_progress

DESCRIPTION = "pipeline.json"

Overflow = Literal["refuse", "float32", "ignore"]


def export_pipeline(
    folder: Path,
    out: Path,
    *,
    latent_size: LatentSize | None = None,
    options: PackageOptions | None = None,
    target: Target = COREML,
    overflow: Overflow = "refuse",
    prompts: Sequence[str] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Export a pipeline to a new folder, which is written completely or not at all.

    The folder contains ``unet``, ``decoder``, and for each text encoder ``text_encoder`` (numbered from the second one)
    with the target's suffix, its ``tokenizer/``, and ``pipeline.json``.

    Args:
        folder: the pipeline's folder (`snapgen.pipeline.loading.find_pipeline`).
        out: the folder to write.
        latent_size: height and width of the latent; None: that of the pipeline's resolution.
        options: how weights are stored.
        target: format of the packages.
        overflow: what to do with a component whose activations overflow float16 in a run before the export
            (`snapgen.pipeline.float16_run`): refuse to export it, keep it in float32, or do not look.
        prompts: captions of that run; None: a few.
        progress: its message is the package that comes next.

    Returns:
        The contents of ``pipeline.json``.

    Raises:
        InputError: if the pipeline is damaged, a component overflows or cannot be converted, or nothing can be written.
    """
    check_new_folder(out)
    pipeline = load_pipeline(folder)
    latent = _latent(pipeline, latent_size)
    pipeline.unet.arch.validate_latent_size(latent, source="--latent")
    description = describe(pipeline, latent, target)
    if overflow != "ignore":
        progress(0, "running in float16")
        _note_peaks(description, activation_peaks(folder, latent, prompts or PROMPTS), overflow)
    with atomic_folder(out) as temporary:
        return _write_packages(pipeline, folder, temporary, latent, description, (options, target), progress)


def _note_peaks(description: dict[str, Any], peaks: Mapping[str, Peak], overflow: Overflow) -> None:
    """Add each component's largest activation and its precision to the description."""
    for told in (description["unet"], description["decoder"], *description["text_encoders"]):
        peak = peaks[Path(told["package"]).stem]
        fits = peak.value <= LARGEST
        if not fits and overflow == "refuse":
            problem = f"overflows float16 ({LARGEST:,.0f}) in its layer {peak.layer}"
            raise InputError(told["package"], problem, "keep it in float32: --overflow float32", place="")
        largest = peak.value if math.isfinite(peak.value) else None
        told["largest_activation"] = {"layer": peak.layer, "value": largest, "overflows": not fits}
        told["precision"] = "float16" if fits else "float32"


def _write_packages(
    pipeline: SnapGenPipeline,
    folder: Path,
    out: Path,
    latent: LatentSize,
    description: dict[str, Any],
    chosen: tuple[PackageOptions | None, Target],
    progress: ProgressCallback,
) -> dict[str, Any]:
    def form(told: dict[str, Any]) -> dict[str, Any]:
        options, target = chosen
        precision = {"precision": told.get("precision", "float16")}
        return {"options": (options or PackageOptions()).model_copy(update=precision), "target": target}

    encoders = description["text_encoders"]
    tokens = description["context"]["shape"][1] if encoders else 1
    conversions: dict[str, Callable[[], Path]] = {
        description["unet"]["package"]: partial(
            coreml.convert_unet, pipeline.unet, latent, context_tokens=tokens, **form(description["unet"])
        ),
        description["decoder"]["package"]: partial(
            coreml.convert_decoder, _decoder(pipeline), latent, **form(description["decoder"])
        ),
        **{encoder["package"]: partial(_convert_text, folder, encoder, form(encoder)) for encoder in encoders},
    }
    for number, (name, convert) in enumerate(conversions.items()):
        progress(number / len(conversions), f"converting {name}")
        shutil.copytree(convert(), out / name)
    for encoder in encoders:
        shutil.copytree(folder / encoder["tokenizer"], out / encoder["tokenizer"])
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
    return description


def _latent(pipeline: SnapGenPipeline, size: LatentSize | None) -> LatentSize:
    if size is not None:
        return size
    if pipeline.config.resolution is None:
        raise InputError("--latent", "is missing, and the pipeline has no default resolution", "give it")
    return int(pipeline.config.resolution) // pipeline.autoencoder.factor


def _decoder(pipeline: SnapGenPipeline) -> Any:
    """The module that decodes latents: a tiny decoder, or the full AutoencoderKL."""
    if pipeline.decoder is not None:
        return pipeline.decoder
    return pipeline.vae if isinstance(pipeline.vae, AutoencoderKL) else pipeline.vae.decoder


def _convert_text(folder: Path, encoder: dict[str, Any], form: dict[str, Any]) -> Path:
    """Convert a text encoder, whose weights and tokenizer are in two folders of the pipeline."""
    with merged_folder(folder / Path(encoder["package"]).stem, folder / encoder["tokenizer"]) as merged:
        return coreml.convert_text(str(merged), encoder["tokens"], layer=encoder["layer"], **form)


def describe(pipeline: SnapGenPipeline, latent: LatentSize, target: Target = COREML) -> dict[str, Any]:
    """The contents of ``pipeline.json`` for a pipeline and a latent size."""
    arch, config = pipeline.unet.arch, pipeline.config
    sides = latent_sides(latent)
    sample, image = [1, arch.latent_channels, *sides], [side * pipeline.autoencoder.factor for side in sides]
    encoders, context = _conditioning(pipeline, target.suffix)
    half = arch.time.embed_dim // 2
    inputs = {"sample": sample, "time_features": [1, arch.time.embed_dim]}
    if context is not None:
        inputs["context"] = context["shape"]
    return {
        "format": 1,
        "runtime": target.title,
        "architecture": arch.id,
        "unet": {"package": f"unet{target.suffix}", "inputs": inputs, "outputs": {"velocity": sample}},
        "decoder": {
            "package": f"decoder{target.suffix}",
            "inputs": {"latents": sample},
            "outputs": {"image": [1, 3, *image]},
            "range": [-1, 1],
        },
        "text_encoders": encoders,
        "context": context,
        "time_features": {
            "formula": "cos(1000 t f) for each frequency f, then sin(1000 t f)",
            "frequencies": [math.exp(-math.log(10_000) * i / half) for i in range(half)],
        },
        "sampler": {
            "start": "x is unit Gaussian noise of the sample's shape",
            "guidance": config.guidance,
            "prediction": config.prediction,
            **pipeline.process.export_spec(pipeline.scheduler, config.steps),
        },
    }


def _conditioning(pipeline: SnapGenPipeline, suffix: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Descriptions of the text encoders and of the context that they form, if the net takes a context."""
    if not pipeline.unet.needs_context:
        return [], None
    configs = pipeline.encoders
    widths = []
    for config, (model, tokenizer) in zip(configs, pipeline.text_encoders, strict=True):
        encoded = text_encoder.encode_batch(model, tokenizer, [""], **config.encoding)
        widths.append((encoded["tokens"].shape[2], encoded["pooled"].shape[1]))
    pad_ids = [tokenizer.pad_token_id for _, tokenizer in pipeline.text_encoders]
    slices = captions.layout(configs, widths)
    encoders: list[dict[str, Any]] = [
        {
            "package": f"{name}{suffix}",
            "tokenizer": tokenizer,
            "tokens": config.tokens,
            "layer": config.layer,
            "inputs": {"input_ids": [1, config.tokens], "mask": [1, config.tokens]},
            "padding": _padding(config, pad_id),
            "empty prompt": _EMPTY_PROMPT[config.null],
            "outputs": {"embeddings": [1, config.tokens, width]},
            "place": {
                "tokens": [embedding.tokens.start, embedding.tokens.stop],
                "channels": [embedding.channels.start, embedding.channels.stop],
            },
        }
        for name, tokenizer, config, embedding, (width, _), pad_id in zip(
            TEXT_ENCODERS, TOKENIZERS, configs, slices, widths, pad_ids, strict=False
        )
    ]
    tokens, width = (max(encoder["place"][key][1] for encoder in encoders) for key in ("tokens", "channels"))
    all_zeros = all(config.null == "zeros" for config in configs)
    empty = "all zeros" if all_zeros else "joined from the encoders' own"
    return encoders, {"shape": [1, tokens, width], "elsewhere": "zeros", "empty prompt": empty}


_EMPTY_PROMPT = {"zeros": "zeros", "encoded": "encoded as any other"}


def _padding(config: captions.TextEncoderConfig, pad_id: int | None) -> str:
    """How the inputs of a text encoder are filled up to its number of tokens."""
    if config.padding == "encoded":
        return f"input_ids {pad_id} behind the last token, mask 1 everywhere; a longer prompt is cut"
    return "input_ids 0 and mask 0 behind the last token, mask 1 before; a longer prompt is cut"
