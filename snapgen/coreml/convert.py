"""U-Net, tiny decoder and text encoder as Core ML packages, cached by all that they depend on.

python -m snapgen.coreml.convert snapgen-t2i --latent 128 --out unet.mlpackage
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from snapgen.architecture.schema import Architecture
from snapgen.conditioning import text_encoder
from snapgen.coreml.package import PackageOptions, package
from snapgen.errors import InputError
from snapgen.io import cache

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import nn

    from snapgen.autoencoders.tiny_decoder import TinyDecoder
    from snapgen.models.unet import UNet

M = TypeVar("M", bound="nn.Module")

__all__ = ["PackageOptions", "convert_decoder", "convert_text", "convert_unet"]


def convert_unet(
    net: Architecture | UNet, latent_size: int, *, context_tokens: int = 77, options: PackageOptions | None = None
) -> Path:
    """A U-Net as a package for batch 1.

    Its inputs are ``sample`` (1, C, H, W), ``time_features`` (1, frequencies; `snapgen.coreml.layers.time_features`
    computes them) and, if any stage has cross-attention, ``context`` (1, N, context width); its output is
    ``velocity``, as the sample. All float16.

    Args:
        net: the net, or an architecture, which is given random weights: they decide nothing about latency.
        latent_size: height and width of the latent; a multiple of the architecture's stride.
        context_tokens: length of the context.
        options: how weights are stored.

    Returns:
        The ``.mlpackage``, in the cache.

    Raises:
        InputError: if the sizes do not fit, or nothing can be written.
    """
    import torch

    from snapgen.coreml.layers import CoreMLUNet

    arch = net if isinstance(net, Architecture) else net.arch
    arch.check_latent(latent_size)
    if context_tokens < 1:
        raise InputError("tokens", f"{context_tokens} is no length of a context", "use 1 or more")
    inputs = {
        "sample": torch.empty(1, arch.latent_channels, latent_size, latent_size, dtype=torch.float16),
        "time_features": torch.empty(1, arch.time.frequencies, dtype=torch.float16),
    }
    if arch.has_cross_attention:
        inputs["context"] = torch.empty(1, context_tokens, arch.context_width, dtype=torch.float16)

    def build() -> nn.Module:
        own = _random_unet(net) if isinstance(net, Architecture) else _half(net)
        return CoreMLUNet(own, latent_size)

    key: dict[str, cache.JSON] = {
        "architecture": arch.id,
        "weights": "random" if isinstance(net, Architecture) else _digest(net),
        "latent": latent_size,
        "tokens": context_tokens if arch.has_cross_attention else 0,
    }
    return package("unet", key, build, inputs, "velocity", options or PackageOptions())


def convert_decoder(
    decoder: TinyDecoder | AutoencoderKL, latent_size: int, *, options: PackageOptions | None = None
) -> Path:
    """A decoder as a package: ``latents`` (1, C, H, W) → ``image`` (1, 3, H · factor, W · factor), float16.

    Args:
        decoder: a tiny decoder, or a diffusers AutoencoderKL, of which it is the decoder, taking latents as
            `snapgen.autoencoders.autoencoder` gives them. Its attention sees every position of the latent at once: at
            128 × 128 this is no net for a phone.
        latent_size: height and width of the latent.
        options: how weights are stored.

    Raises:
        InputError: as `convert_unet`.
    """
    import torch
    from diffusers import AutoencoderKL

    from snapgen.coreml.kl_decoder import KLDecoder
    from snapgen.coreml.layers import substitute

    if latent_size < 1:
        raise InputError("latent", f"size {latent_size} is none", "use 1 or more")
    inputs = {"latents": torch.empty(1, decoder.config.latent_channels, latent_size, latent_size, dtype=torch.float16)}

    def build() -> nn.Module:
        own = _half(decoder)
        if isinstance(own, AutoencoderKL):
            return KLDecoder(own)
        substitute(own)
        return own

    key: dict[str, cache.JSON] = {
        "configuration": {name: value for name, value in decoder.config.items() if name[0] != "_"},
        "weights": _digest(decoder),
        "latent": latent_size,
    }
    return package("decoder", key, build, inputs, "image", options or PackageOptions())


def convert_text(
    name: str = text_encoder.MINILM,
    tokens: int = 16,
    *,
    layer: text_encoder.Layer = "last",
    options: PackageOptions | None = None,
) -> Path:
    """A text encoder as a package; see `snapgen.coreml.text_encoder`.

    Its lookup of tokens runs on the CPU (`snapgen.coreml.compatibility.REFUSED`): one operation, at the very start.

    Args:
        name: ``minilm``, or the folder of a Hugging Face text encoder, as `snapgen.conditioning.embeddings.encode`
        takes it. tokens: length of its input. layer: which hidden states it gives, as
        `snapgen.conditioning.embeddings.embed_captions` takes it. options: how weights are stored.

    Raises:
        InputError: if there is no such encoder, it takes fewer tokens or no mask, or nothing can be written.
    """
    import torch

    from snapgen.coreml.text_encoder import TextEncoder

    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int32),
        "mask": torch.ones(1, tokens, dtype=torch.float16),
    }
    key: dict[str, cache.JSON] = {"encoder": text_encoder.digest(name), "tokens": tokens, "layer": layer}
    build = lambda: TextEncoder(name, tokens, layer).half()  # noqa: E731 - as short as its use
    return package("text", key, build, inputs, "embeddings", options or PackageOptions())


def _half(net: M) -> M:
    """A copy in float16 on the CPU."""
    import torch
    from torch import nn

    return nn.Module.to(copy.deepcopy(net), "cpu", torch.float16).eval()  # diffusers' own `to` has remarks to make


def _random_unet(arch: Architecture) -> UNet:
    """A net in float16 whose weights are of ordinary size, made in no more memory than it needs."""
    import torch
    from torch import nn

    from snapgen.models.unet import UNet

    with torch.device("meta"):
        net = UNet(arch)
        net.half().eval()
    net.to_empty(device="cpu").to(memory_format=torch.contiguous_format)
    # A prime number of them, read round and round: no two layers of one shape get the same weights, which Core ML would
    # take for one layer.
    pool, place = torch.randn(1_048_583, generator=torch.Generator().manual_seed(0)).half(), 0
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                norm = isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
                parameter.data.fill_(float(norm and name == "weight"))
                continue
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(pool)):
                chunk = flat[start : start + len(pool)]
                chunk.copy_(pool.roll(-place)[: len(chunk)]).mul_(parameter[0].numel() ** -0.5)
                place = (place + len(chunk)) % len(pool)
    return net


def _digest(net: nn.Module) -> str:
    """16 hex digits of a hash of a net's weights, as float16."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
