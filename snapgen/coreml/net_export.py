"""One network as a package: a U-Net, a tiny decoder or a text encoder, found by its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from snapgen import config
from snapgen.architecture import presets
from snapgen.architecture.latent_size import LatentSize
from snapgen.architecture.presets import TINY_DECODER
from snapgen.architecture.schema import Architecture
from snapgen.conditioning.text_encoder import MINILM
from snapgen.coreml import convert
from snapgen.coreml.convert import COREML
from snapgen.coreml.package import PackageOptions, Target
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder, check_writable

if TYPE_CHECKING:
    from snapgen.autoencoders.tiny_decoder import TinyDecoder
    from snapgen.models.unet import UNet

LATENT_SIZE = 128
UNET_TOKENS = 77
TEXT_TOKENS = 16


def export_net(
    net: str | Architecture | UNet,
    out: Path,
    *,
    latent_size: LatentSize = LATENT_SIZE,
    context_tokens: int | None = None,
    options: PackageOptions | None = None,
    target: Target = COREML,
) -> None:
    """Write the package of a net, whole or not at all.

    Args:
        net: a U-Net; an architecture, its preset, its JSON or YAML file, or ``tiny-decoder``, all of which get random
            weights; ``minilm``; or the folder of a trained U-Net, a tiny decoder or a text encoder.
        out: the package, named with the target's suffix; one that is there already is replaced.
        latent_size: height and width of the latent.
        context_tokens: length of the context; None: 77, of a text encoder 16.
        options: how weights are stored.
        target: format of the package.

    Raises:
        InputError: if there is no such net, it does not convert, or nothing can be written.
    """
    if out.suffix != target.suffix:
        raise InputError("--out", f"{out} is not a package's name", f"end it in {target.suffix}")
    if out.exists() and not (out / target.manifest).is_file():
        raise InputError("--out", f"{out} exists and is not a package", "name another")
    check_writable(out)
    package = _converted(net, latent_size, context_tokens, _Form(options=options, target=target))
    with atomic_folder(out, replace=True) as folder:  # a copy: the package stays in the cache
        shutil.copytree(package, folder, dirs_exist_ok=True)


class _Form(TypedDict):
    """Arguments that every conversion takes."""

    options: PackageOptions | None
    target: Target


def _converted(net: str | Architecture | UNet, latent_size: LatentSize, tokens: int | None, form: _Form) -> Path:
    """The package of a net, in the cache."""
    if not isinstance(net, str):
        return convert.convert_unet(net, latent_size, context_tokens=tokens or UNET_TOKENS, **form)
    name, folder = net, Path(net)
    kind = _class_name(folder)
    if name == TINY_DECODER or kind == "TinyDecoder":
        return convert.convert_decoder(_decoder(name), latent_size, **form)
    if kind == "UNet":
        from snapgen.models.unet import load_unet

        return convert.convert_unet(load_unet(folder), latent_size, context_tokens=tokens or UNET_TOKENS, **form)
    if name == MINILM or folder.is_dir():
        return convert.convert_text(name, tokens or TEXT_TOKENS, **form)
    return _converted(presets.resolve(name, other_names=(TINY_DECODER, MINILM)), latent_size, tokens, form)


def _class_name(folder: Path) -> str:
    """The diffusers class of a saved net; empty for anything else."""
    path = folder / "config.json"
    return str(config.read_mapping(path).get("_class_name")) if path.is_file() else ""


def _decoder(name: str) -> TinyDecoder:
    import torch

    from snapgen.autoencoders.autoencoder import read_decoder
    from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder

    if name != TINY_DECODER:
        return read_decoder(Path(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast("TinyDecoder", TinyDecoder(**PAPER))
