"""Converts diffusers' U-Nets to `UNet`: the architecture from the configuration, the weights under our keys.

`from_diffusers` returns a net with the same output for every input, or raises an error that names the field of the
configuration that `UNet` does not support. Conventions of a converted net:

- *Timesteps.* Diffusers counts from 0 to 1000, `UNet` from 0 to 1: the converted net at ``t`` equals the source at
  ``1000 · t``.
- *Prediction type* and noise schedule stay those of the source's training: SD-1.5 predicts noise on the schedule of
  `snapgen.diffusion.variance_preserving`. The net's configuration states the type if its pipeline's scheduler does
  (`snapgen.conversion.scheduler`), or it is given.
- *Added conditions* (SDXL's pooled text and image size, DreamLite's image size) are not supported by `UNet`. They are
  fixed and folded into the timestep embedding: zero for pooled text, and a square, uncropped image of the checkpoint's
  own size unless other sizes are given. The added embedding itself is dropped.

With ``partial``, a net that differs from our architectures, such as DreamLite's (see `snapgen.conversion.config`), is
converted as far as tensors of the same shape exist. The other weights are initialized, and the outputs differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DreamLiteUNetModel, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from snapgen.architecture.schema import Architecture
from snapgen.conversion import scheduler
from snapgen.conversion.config import describe
from snapgen.conversion.scheduler import UNKNOWN, PredictionSource
from snapgen.errors import InputError
from snapgen.io import pretrained
from snapgen.io.pretrained import SavedNet, Weights
from snapgen.models.unet import UNet
from snapgen.progress import ProgressCallback, ignore_progress

ADDED_EMBEDDING = "add_embedding."
PIXELS_PER_LATENT = 8
CLIP_G_POOLED_DIM = 1280
"""Channels of CLIP-G's pooled embedding, an input of SDXL's added embedding; the other inputs are six sizes."""

# Diffusers' RMSNorm of queries and keys has eps 1e-5 and ours 1e-6: with inputs scaled by √0.1 the results are equal.
QK_SCALE = 0.1**0.5

KEY_PATTERNS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.conv."),
        (r"^up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
        (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
        (r"^mid\.", "mid_block."),
        (r"\.layers\.(\d+)\.residual\.", r".resnets.\1."),
        (r"\.layers\.(\d+)\.transformers\.0\.", r".attentions.\1."),
        (r"\.to_out\.", ".to_out.0."),
        (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
        (r"\.ff\.proj_out\.", ".ff.net.2."),
    )
]
"""Substitutions, applied in order, from the keys of `UNet` to diffusers' keys."""


@dataclass(frozen=True)
class Conversion:
    """A converted net and its differences from the source."""

    net: UNet
    dropped: tuple[str, ...]
    """Features of the source that the net does not have, a phrase each."""
    unexpected_keys: tuple[str, ...] = ()
    """The source's weights that were not used; none unless the conversion was partial."""
    missing_keys: tuple[str, ...] = ()
    """The net's weights that the source does not have and that were initialized; none unless partial."""
    prediction_source: PredictionSource = UNKNOWN
    """The source's prediction type, as far as it is known, and where it is stated."""


def from_diffusers(
    source: str | Path | nn.Module,
    *,
    prediction: str | None = None,
    time_ids: Sequence[float] | None = None,
    partial: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Conversion:
    """Convert a diffusers U-Net, in float32 on the CPU, sharing no memory with the source.

    Args:
        source: a folder written by ``save_pretrained`` (a U-Net's or a pipeline's), a name on the Hugging Face hub, or
            the module itself.
        prediction: the net's prediction type, if its pipeline's scheduler does not state it.
        time_ids: sizes to fold in if the source has an added embedding: height, width, crop top, crop left, target
            height, target width, in pixels. Default: a square image of the source's sample size.
        partial: convert the matching weights and initialize the others, instead of rejecting a net that differs.
        progress: called after each weight.

    Raises:
        InputError: if there is no such net, its files are damaged, `UNet` does not support it, or it has another
            prediction type.
    """
    if isinstance(source, nn.Module):
        name = type(source).__name__
        config = {**getattr(source, "config", {}), "_class_name": name}
        saved = SavedNet(Path(name), config, Weights.in_memory(source.state_dict(), name))
        prediction_source = scheduler.prediction_source(None, prediction)
    else:
        folder = pretrained.find_pretrained(source)
        saved = pretrained.open_net(folder, "unet")
        prediction_source = scheduler.prediction_source(folder, prediction)
    conversion = convert(saved, time_ids=time_ids, partial=partial, progress=progress)
    conversion.net.prediction_type = prediction_source.prediction
    return replace(conversion, prediction_source=prediction_source)


@torch.no_grad()
def convert(
    saved: SavedNet,
    *,
    time_ids: Sequence[float] | None = None,
    partial: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> Conversion:
    """Convert an opened net as `from_diffusers` does; weights are read one at a time."""
    source = str(saved.folder)
    source_net = pretrained.meta_net(saved, UNet2DConditionModel, DreamLiteUNetModel)
    match = describe(source_net.config, source)
    if match.differences and not partial:
        first = match.differences[0]
        remedy = "convert another net, or use a partial conversion (--partial) to continue training from what matches"
        raise InputError(source, first.problem, remedy, place=first.field)
    dropped = [f"{difference.field}: {difference.problem}" for difference in match.differences]
    reader = _SourceWeights(match.architecture, source_net, saved.weights)
    constant = torch.zeros(())
    if source_net.config["addition_embed_type"] in ("text_time", "time"):
        constant, sizes = _added_embedding_constant(source_net.config, reader, time_ids, source)
        dropped.append(f"addition_embed_type: folded in for pooled text 0 and the sizes {sizes}")
    # On the meta device weights that are replaced at once need no memory and no initialization.
    with torch.device("cpu" if partial else "meta"):
        net = UNet(match.architecture)
    missing = _load_weights(net, reader, constant, progress)
    assert partial or not (missing or reader.unexpected_keys())
    # Fields without weights that do not change the output in evaluation mode and in float32.
    phrases = {"dropout": "not supported", "upcast_attention": "attention is computed in the net's own precision"}
    dropped += [f"{field}: {phrase}" for field, phrase in phrases.items() if source_net.config.get(field)]
    return Conversion(net.eval(), tuple(dropped), tuple(reader.unexpected_keys()), missing)


def _load_weights(
    net: UNet, reader: _SourceWeights, added: Tensor, progress: ProgressCallback = ignore_progress
) -> tuple[str, ...]:
    """Load the source's weights and the added embedding's constant into a net; returns the keys it does not have."""
    converted: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for i, (name, shape) in enumerate(shapes.items()):
        tensor = reader.converted(name, shape)
        if tensor is not None:
            converted[name] = tensor
        progress((i + 1) / len(shapes))
    converted["time_embedding.linear_2.bias"] += added
    net.load_state_dict(converted, assign=True, strict=False)
    missing = tuple(name for name in shapes if name not in converted)
    converted.clear()  # frees the convolutions before their channels-last copies are made
    net.to(memory_format=torch.channels_last)
    return missing


class _SourceWeights:
    """The source's weights under the keys of `UNet`."""

    def __init__(self, arch: Architecture, source_net: nn.Module, weights: Weights) -> None:
        weights.check_fit(pretrained.shapes_of(source_net))
        self.arch, self.read, self.shapes = arch, weights.load, weights.shapes
        self.used: set[str] = set()

    def converted(self, name: str, shape: torch.Size) -> Tensor | None:
        """The weight of `UNet` with this key and shape; None if the source does not have it."""
        keys = diffusers_keys(name, len(self.arch.down))
        if keys[0].endswith("pointwise.bias") and keys[0] not in self.shapes:
            return torch.zeros(shape)  # diffusers' separable convolutions have no bias
        if not all(key in self.shapes for key in keys):
            return None
        if not _fits([self.shapes[key] for key in keys], shape):
            return None
        self.used.update(keys)
        tensors = [self.read(key) for key in keys]
        if self.arch.qk_norm and keys[0].endswith((".to_q.weight", ".to_k.weight")):
            tensors[0] = tensors[0] * QK_SCALE
        if len(tensors) > 1:
            return torch.cat(tensors).reshape(shape)  # to_k and to_v: 2 × (out, in) → (2·out, in)
        return torch.empty(shape).copy_(tensors[0].reshape(shape))

    def unexpected_keys(self) -> list[str]:
        """Keys of the source's weights that were not used, without those of the added embedding, which is folded in."""
        return [name for name in self.shapes if name not in self.used and not name.startswith(ADDED_EMBEDDING)]


def _fits(shapes: Sequence[torch.Size], target: torch.Size) -> bool:
    """Whether weights concatenated along their outputs have a target shape, taking 1×1 convolutions as linear."""
    inputs = [[side for side in shape[1:] if side > 1] for shape in (*shapes, target)]
    return sum(shape[0] for shape in shapes) == target[0] and all(sides == inputs[-1] for sides in inputs)


def diffusers_keys(name: str, levels: int) -> tuple[str, ...]:
    """Diffusers' keys, in order, of which a weight of `UNet` is concatenated.

    Args:
        name: key of `UNet`.
        levels: levels of the net; diffusers counts the up path from the lowest resolution.
    """
    name = re.sub(r"^up\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for pattern, replacement in KEY_PATTERNS:
        name = pattern.sub(replacement, name)
    if ".to_kv." in name:
        return name.replace("to_kv", "to_k"), name.replace("to_kv", "to_v")
    return (name,)


def _added_embedding_constant(
    config: Mapping[str, Any], reader: _SourceWeights, time_ids: Sequence[float] | None, source: str
) -> tuple[Tensor, tuple[float, ...]]:
    """The constant that the added embedding adds to the timestep embedding, (time dim,), and the sizes it is for.

    Pooled text is zero.
    """
    input_dim, embed_dim = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    sizes = tuple(time_ids) if time_ids else _default_sizes(config, source)
    text_dim = input_dim - embed_dim * len(sizes)
    if text_dim < 0 or (text_dim > 0 and config["addition_embed_type"] == "time"):
        problem = f"takes {input_dim} values, not {len(sizes)} sizes of {embed_dim}"
        raise InputError(source, problem, "give as many sizes as it takes", place="addition_embed_type")
    ids = get_timestep_embedding(
        torch.tensor(sizes, dtype=torch.float32), embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    x = torch.cat([torch.zeros(text_dim), ids.flatten()])  # (text_dim + sizes · embed_dim,)
    first, second = (
        [reader.read(f"{ADDED_EMBEDDING}linear_{i}.{kind}") for kind in ("weight", "bias")] for i in (1, 2)
    )
    return functional.linear(functional.silu(functional.linear(x, *first)), *second), sizes


def _default_sizes(config: Mapping[str, Any], source: str) -> tuple[float, ...]:
    """Sizes of an uncropped square image of the net's sample size, if it takes SDXL's six sizes.

    They are height, width, crop top, crop left, target height and target width.
    """
    text_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    side = config["sample_size"]
    if text_dim != (CLIP_G_POOLED_DIM if config["addition_embed_type"] == "text_time" else 0) or not isinstance(
        side, int
    ):
        problem = "does not take SDXL's six sizes, or has no sample_size"
        raise InputError(source, problem, "give the sizes to fold in (--time-ids)", place="addition_embed_type")
    pixels = float(side * PIXELS_PER_LATENT)
    return (pixels, pixels, 0.0, 0.0, pixels, pixels)
