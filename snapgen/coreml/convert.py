"""Convert U-Nets, decoders and text encoders to packages, cached by everything on which they depend."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from snapgen.architecture.latent_size import LatentSize, latent_sides
from snapgen.architecture.schema import Architecture
from snapgen.conditioning import text_encoder
from snapgen.coreml.package import PackageOptions, PackageSummary, Target, coreml_versions, package, save_mlpackage
from snapgen.errors import InputError
from snapgen.io import cache
from snapgen.io.digests import digest_tensors

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import nn

    from snapgen.autoencoders.tiny_decoder import TinyDecoder
    from snapgen.models.unet import UNet

M = TypeVar("M", bound="nn.Module")

__all__ = ["COREML", "PackageOptions", "convert_decoder", "convert_text", "convert_unet"]


def _coreml_unet(net: UNet, latent_size: tuple[int, int]) -> nn.Module:
    from snapgen.coreml.layers import CoreMLUNet

    return CoreMLUNet(net, latent_size)


def _summarize(path: Path) -> PackageSummary:
    from snapgen.coreml.compatibility import summarize_package

    return summarize_package(path)


COREML = Target(
    name="coreml",
    title="Core ML",
    suffix=".mlpackage",
    manifest="Manifest.json",
    versions=coreml_versions,
    unet=_coreml_unet,
    save=save_mlpackage,
    limits="Known to fall off the Neural Engine",
    summarize=_summarize,
)


def convert_unet(
    net: Architecture | UNet,
    latent_size: LatentSize,
    *,
    context_tokens: int = 77,
    options: PackageOptions | None = None,
    target: Target = COREML,
) -> Path:
    """Convert a U-Net to a package for batch size 1.

    The inputs are ``sample`` (1, C, H, W), ``time_features`` (1, embed_dim), which
    `snapgen.coreml.layers.time_features` computes, and with cross-attention ``context`` (1, N, context_dim). The output
    is ``velocity``, shaped as the sample.

    Args:
        net: the net, or an architecture, which gets random weights since they do not affect latency.
        latent_size: height and width of the latent, a multiple of the architecture's stride.
        context_tokens: length of the context.
        options: how weights are stored.
        target: format of the package.

    Returns:
        Path of the package in the cache.

    Raises:
        InputError: if the sizes do not fit, or nothing can be written.
    """
    import torch

    options = options or PackageOptions()
    dtype = getattr(torch, options.precision)
    arch: Architecture = net if isinstance(net, Architecture) else net.arch
    arch.validate_latent_size(latent_size)
    if context_tokens < 1:
        raise InputError("tokens", f"{context_tokens} is not a valid context length", "use 1 or more")
    height, width = latent_sides(latent_size)
    inputs = {
        "sample": torch.empty(1, arch.latent_channels, height, width, dtype=dtype),
        "time_features": torch.empty(1, arch.time.embed_dim, dtype=dtype),
    }
    if arch.has_cross_attention:
        inputs["context"] = torch.empty(1, context_tokens, arch.context_dim, dtype=dtype)

    def build() -> nn.Module:
        copied = _random_unet(net).to(dtype) if isinstance(net, Architecture) else _copy(net, dtype)
        return target.unet(copied, (height, width))

    key: dict[str, cache.JSON] = {
        "architecture": arch.id,
        "weights": "random" if isinstance(net, Architecture) else _digest(net),
        "latent": [height, width],
        "tokens": context_tokens if arch.has_cross_attention else 0,
    }
    return package("unet", key, build, inputs, "velocity", options, target)


def convert_decoder(
    decoder: TinyDecoder | AutoencoderKL,
    latent_size: LatentSize,
    *,
    options: PackageOptions | None = None,
    target: Target = COREML,
) -> Path:
    """Convert a decoder to a package: ``latents`` (1, C, h, w) → ``image`` (1, 3, h·factor, w·factor).

    Args:
        decoder: a tiny decoder, or a diffusers AutoencoderKL, whose decoder is converted for the latents of
            `snapgen.autoencoders.autoencoder`. The latter has attention over all positions, which at 128×128 is too
            expensive for a phone.
        latent_size: height and width of the latent.
        options: how weights are stored.
        target: format of the package.

    Raises:
        InputError: if the size is invalid, or nothing can be written.
    """
    import torch
    from diffusers import AutoencoderKL

    from snapgen.coreml.kl_decoder import KLDecoder
    from snapgen.coreml.layers import substitute

    height, width = latent_sides(latent_size)
    if min(height, width) < 1:
        raise InputError("latent", f"{min(height, width)} is not a valid size", "use 1 or more")
    options = options or PackageOptions()
    dtype = getattr(torch, options.precision)
    inputs = {"latents": torch.empty(1, decoder.config.latent_channels, height, width, dtype=dtype)}

    def build() -> nn.Module:
        copied = _copy(decoder, dtype)
        if isinstance(copied, AutoencoderKL):
            return KLDecoder(copied)
        substitute(copied)
        return copied

    key: dict[str, cache.JSON] = {
        "configuration": {name: value for name, value in decoder.config.items() if name[0] != "_"},
        "weights": _digest(decoder),
        "latent": [height, width],
    }
    return package("decoder", key, build, inputs, "image", options, target)


def convert_text(
    name: str = text_encoder.MINILM,
    tokens: int = 16,
    *,
    layer: text_encoder.Layer = "last",
    options: PackageOptions | None = None,
    target: Target = COREML,
) -> Path:
    """Convert a text encoder to a package; see `snapgen.coreml.text_encoder`.

    Its token lookup, the first operation, runs on the CPU (`snapgen.coreml.compatibility.UNSUPPORTED`).

    Args:
        name: ``minilm``, or the folder of a Hugging Face text encoder.
        tokens: length of the input.
        layer: which hidden states to return (`snapgen.conditioning.embeddings.embed_captions`).
        options: how weights are stored.
        target: format of the package.

    Raises:
        InputError: if there is no such encoder, it takes fewer tokens or no mask, or nothing can be written.
    """
    import torch

    from snapgen.coreml.text_encoder import TextEncoder

    options = options or PackageOptions()
    dtype = getattr(torch, options.precision)
    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int32),
        "mask": torch.ones(1, tokens, dtype=dtype),
    }
    key: dict[str, cache.JSON] = {"encoder": text_encoder.digest(name), "tokens": tokens, "layer": layer}

    def build() -> nn.Module:
        return TextEncoder(name, tokens, layer).to(dtype)

    return package("text", key, build, inputs, "embeddings", options, target)


def _copy(net: M, dtype: torch.dtype) -> M:
    """A copy on the CPU."""
    from torch import nn

    return nn.Module.to(copy.deepcopy(net), "cpu", dtype).eval()  # diffusers' `to` logs a warning


def _random_unet(arch: Architecture) -> UNet:
    """A float16 net with random weights of ordinary scale, built without temporary memory of the net's size."""
    import torch
    from torch import nn

    from snapgen.models.unet import UNet

    with torch.device("meta"):
        net = UNet(arch)
        net.half().eval()
    net.to_empty(device="cpu").to(memory_format=torch.contiguous_format)
    # The pool is read cyclically and its length is prime, so that no two layers of the same shape get the same weights,
    # which Core ML would merge into one.
    pool, position = torch.randn(1_048_583, generator=torch.Generator().manual_seed(0)).half(), 0
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                norm = isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
                parameter.data.fill_(float(norm and name == "weight"))
                continue
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(pool)):
                chunk = flat[start : start + len(pool)]
                chunk.copy_(pool.roll(-position)[: len(chunk)]).mul_(parameter[0].numel() ** -0.5)  # std 1/√fan_in
                position = (position + len(chunk)) % len(pool)
    return net


def _digest(net: nn.Module) -> str:
    """Hex digest (16 digits) of a net's weights in float16."""
    return digest_tensors((name, tensor.cpu().half()) for name, tensor in sorted(net.state_dict().items()))
