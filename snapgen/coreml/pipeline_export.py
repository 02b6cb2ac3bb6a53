"""A pipeline as Core ML packages, with a JSON file that says how to run them.

The packages are held against torch where they are made, in float32. What a phone does with the whole has not been run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from snapgen.conditioning import captions, text_encoder
from snapgen.coreml import convert as coreml
from snapgen.coreml.package import PackageOptions
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder
from snapgen.pipeline.loading import load_pipeline, merged_folder
from snapgen.pipeline.snapgen_pipeline import TEXT_ENCODERS, TOKENIZERS, SnapGenPipeline

DESCRIPTION = "pipeline.json"


def export_pipeline(
    folder: Path,
    out: Path,
    *,
    latent_size: int | None = None,
    options: PackageOptions | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Converts a pipeline, whole or not at all.

    The folder gets ``unet.mlpackage``, ``decoder.mlpackage``, ``text_encoder.mlpackage`` and ``tokenizer/`` for each
    text encoder (numbered from the second on), and ``pipeline.json``.

    Args:
        folder: of the pipeline, as `snapgen.pipeline.loading.find_pipeline` gives it.
        out: the folder to write.
        latent_size: height and width of the latent; None: of the pipeline's resolution.
        options: how weights are stored.
        progress: told the share done, and what comes next.

    Returns:
        What ``pipeline.json`` says.

    Raises:
        InputError: if the pipeline is damaged, something of it does not convert or nothing can be written.
    """
    pipeline = load_pipeline(folder)
    latent = _latent(pipeline, latent_size)
    with atomic_folder(out) as part:
        try:
            return _fill(pipeline, folder, part, latent, options, progress)
        except OSError as error:
            raise InputError(out, (error.strerror or "cannot be written").lower(), "name another folder") from None


def _fill(
    pipeline: SnapGenPipeline,
    folder: Path,
    part: Path,
    latent: int,
    options: PackageOptions | None,
    progress: Callable[[float, str], None] | None,
) -> dict[str, Any]:
    described = describe(pipeline, latent)
    encoders = described["text_encoders"]
    tokens = described["context"]["shape"][1] if encoders else 1
    conversions: dict[str, Callable[[], Path]] = {
        described["unet"]["package"]: partial(
            coreml.convert_unet, pipeline.unet, latent, context_tokens=tokens, options=options
        ),
        described["decoder"]["package"]: partial(coreml.convert_decoder, _decoder(pipeline), latent, options=options),
        **{each["package"]: partial(_text, folder, each, options) for each in encoders},
    }
    for number, (name, convert) in enumerate(conversions.items()):
        if progress is not None:
            progress(number / len(conversions), f"converting {name}")
        shutil.copytree(convert(), part / name)
    for each in encoders:
        shutil.copytree(folder / each["tokenizer"], part / each["tokenizer"])
    (part / DESCRIPTION).write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")
    return described


def _latent(pipeline: SnapGenPipeline, size: int | None) -> int:
    if size is not None:
        return size
    if pipeline.config.resolution is None:
        raise InputError("--latent", "is not given, and the pipeline names no resolution", "give it")
    return int(pipeline.config.resolution) // pipeline.autoencoder.factor


def _decoder(pipeline: SnapGenPipeline) -> Any:
    """What turns latents into images: a tiny decoder, or the whole AutoencoderKL."""
    if pipeline.decoder is not None:
        return pipeline.decoder
    return pipeline.vae if isinstance(pipeline.vae, AutoencoderKL) else pipeline.vae.decoder


def _text(folder: Path, described: dict[str, Any], options: PackageOptions | None) -> Path:
    """The package of a text encoder, whose weights and tokenizer lie in two folders of the pipeline's."""
    with merged_folder(folder / Path(described["package"]).stem, folder / described["tokenizer"]) as whole:
        return coreml.convert_text(str(whole), described["tokens"], layer=described["layer"], options=options)


def describe(pipeline: SnapGenPipeline, latent: int) -> dict[str, Any]:
    """What ``pipeline.json`` says of a pipeline and a size of its latent."""
    arch, config = pipeline.unet.arch, pipeline.config
    sample, side = [1, arch.latent_channels, latent, latent], latent * pipeline.autoencoder.factor
    encoders, context = _conditioning(pipeline)
    half = arch.time.frequencies // 2
    inputs = {"sample": sample, "time_features": [1, arch.time.frequencies]}
    if context is not None:
        inputs["context"] = context["shape"]
    return {
        "format": 1,
        "architecture": arch.id,
        "unet": {"package": "unet.mlpackage", "inputs": inputs, "outputs": {"velocity": sample}},
        "decoder": {
            "package": "decoder.mlpackage",
            "inputs": {"latents": sample},
            "outputs": {"image": [1, 3, side, side]},
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
            **pipeline.process.described(pipeline.scheduler, config.steps),
        },
    }


def _conditioning(pipeline: SnapGenPipeline) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What is to be known of each text encoder, and of the context that they make for a net that takes one."""
    if not pipeline.unet.needs_context:
        return [], None
    settings = pipeline.encoders
    shapes = []
    for each, (model, tokenizer) in zip(settings, pipeline.text_encoders, strict=True):
        found = text_encoder.encode_batch(model, tokenizer, [""], tokens=each.tokens)
        shapes.append((found["tokens"].shape[2], found["pooled"].shape[1]))
    places = captions.layout(settings, shapes)
    encoders: list[dict[str, Any]] = [
        {
            "package": f"{name}.mlpackage",
            "tokenizer": tokenizer,
            "tokens": each.tokens,
            "layer": each.layer,
            "inputs": {"input_ids": [1, each.tokens], "mask": [1, each.tokens]},
            "padding": "input_ids 0 and mask 0 behind the last token, mask 1 before; a longer prompt is cut",
            "outputs": {"embeddings": [1, each.tokens, width]},
            "place": {
                "tokens": [place.tokens.start, place.tokens.stop],
                "channels": [place.channels.start, place.channels.stop],
            },
        }
        for name, tokenizer, each, place, (width, _) in zip(
            TEXT_ENCODERS, TOKENIZERS, settings, places, shapes, strict=False
        )
    ]
    tokens, width = (max(each["place"][key][1] for each in encoders) for key in ("tokens", "channels"))
    return encoders, {"shape": [1, tokens, width], "elsewhere": "zeros", "empty prompt": "all zeros"}
