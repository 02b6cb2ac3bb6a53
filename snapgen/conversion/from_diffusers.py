"""Diffusers' U-Nets as ours: the architecture from the configuration, the weights under our names.

`from_diffusers` gives a net with the same output for every input, or says which field of the configuration our family
cannot follow. Three things to know of such a net:

- *Timesteps.* Diffusers counts 0 to 1000, we 0 to 1: the converted net at ``t`` is theirs at ``1000 · t``.
- *What it predicts* stays what it was trained for, with its own noise schedule: SD-1.5 predicts noise on
  `snapgen.diffusion.variance_preserving`'s. The net itself does not say; its pipeline's scheduler may
  (`snapgen.conversion.scheduler`).
- *Added conditions* (SDXL's pooled text and image size, DreamLite's image size) are not in our family. They are
  constants to the net, so constants are folded into the timestep's embedding: pooled text zero, a square image of the
  checkpoint's own size without cropping, or other sizes as asked for. The added embedding itself is left out.

With ``partial`` a net that differs, DreamLite's own design for one (see `snapgen.conversion.config`), is converted as
far as tensors have a place of the same shape; the rest begins anew, and the outputs do not agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from snapgen.errors import InputError, first_line
from snapgen.io import pretrained
from snapgen.models.unet import UNet

CLASSES = {"UNet2DConditionModel": UNet2DConditionModel, "DreamLiteUNetModel": DreamLiteUNetModel}
ADDED = "add_embedding."
PIXELS_PER_LATENT = 8
POOLED_WIDTH = 1280
"""Of CLIP-G's pooled text, which SDXL takes; what remains of the added embedding's input are six sizes."""

# Diffusers' RMSNorm of queries and keys has eps 1e-5, ours 1e-6: with both scaled by this the results are equal.
QK_SCALE = 0.1**0.5

RENAMED = [
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^time\.linear", "time_embedding.linear_"),
        (r"^norm_out\.", "conv_norm_out."),
        (r"^down\.(\d+)\.sampler\.", r"down_blocks.\1.downsamplers.0.conv."),
        (r"^up\.(\d+)\.sampler\.", r"up_blocks.\1.upsamplers.0."),
        (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
        (r"^mid\.", "mid_block."),
        (r"\.layers\.(\d+)\.residual\.", r".resnets.\1."),
        (r"\.layers\.(\d+)\.transformers\.0\.", r".attentions.\1."),
        (r"\.time\.", ".time_emb_proj."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.(conv[12])\.0\.", r".\1.depthwise."),
        (r"\.(conv[12])\.1\.", r".\1.pointwise."),
        (r"\.blocks\.", ".transformer_blocks."),
        (r"\.attend_self\.", ".attn1."),
        (r"\.attend_context\.", ".attn2."),
        (r"\.queries\.", ".to_q."),
        (r"\.query_norm\.", ".norm_q."),
        (r"\.key_norm\.", ".norm_k."),
        (r"\.(attn[12])\.out\.", r".\1.to_out.0."),
        (r"\.feed_forward\.expand\.", ".ff.net.0.proj."),
        (r"\.feed_forward\.contract\.", ".ff.net.2."),
    )
]
"""Our names of weights into theirs, one after the other."""


@dataclass(frozen=True)
class Conversion:
    """A converted net and what is not the source's in it."""

    net: UNet
    left_out: tuple[str, ...]
    """What the source has and the net has not, a phrase each."""
    unused: tuple[str, ...] = ()
    """Names of the source's weights that have no place; none unless the conversion was partial."""
    new: tuple[str, ...] = ()
    """Names of the net's weights that begin anew; likewise."""
    meaning: PredictionSource = UNKNOWN
    """What the net predicts, where anything says it; of a partial one, what its source does."""


def from_diffusers(
    source: str | Path | nn.Module,
    *,
    prediction: str | None = None,
    time_ids: Sequence[float] | None = None,
    partial: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Conversion:
    """A diffusers U-Net as ours, in float32 on the CPU, sharing no memory with the source.

    Args:
        source: a folder that ``save_pretrained`` wrote (a U-Net's or a pipeline's), a name on the Hugging Face hub, or
            the module itself.
        prediction: what the net predicts, where a pipeline's scheduler does not say it.
        time_ids: the sizes that are folded in where the source has an added embedding: height, width, crop top, crop
            left, target height, target width, in pixels. By default a square image of the source's sample size.
        partial: take what has a place, begin the rest anew; instead of refusing a net that differs.
        progress: told the share done.

    Raises:
        InputError: if there is no such net, its files are damaged, our family cannot describe it, or it predicts
            something else.
    """
    if isinstance(source, nn.Module):
        name = type(source).__name__
        config = {**getattr(source, "config", {}), "_class_name": name}
        weights: Mapping[str, Tensor] = source.state_dict()
        meaning = scheduler.meaning(None, prediction)
    else:
        name, folder = str(source), pretrained.find_pretrained(source)
        config, weights = pretrained.read_pretrained(folder)
        meaning = scheduler.meaning(folder, prediction)
    found = convert(config, weights, name, time_ids=time_ids, partial=partial, progress=progress)
    return replace(found, meaning=meaning)


@torch.no_grad()
def convert(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: str,
    *,
    time_ids: Sequence[float] | None = None,
    partial: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Conversion:
    """As `from_diffusers`, from a configuration and its weights by name; they are taken one at a time."""
    theirs = _skeleton(config, source)
    description = describe(theirs.config, source)
    if description.differences and not partial:
        first = description.differences[0]
        remedy = "convert another net, or ask for a partial conversion (--partial) to train on from what is the same"
        raise InputError(source, first.problem, remedy, place=first.field)
    left_out = [f"{difference.field}: {difference.problem}" for difference in description.differences]
    reader = _Weights(description.architecture, theirs, weights, source)
    constant = torch.zeros(())
    if theirs.config["addition_embed_type"] in ("text_time", "time"):
        constant, sizes = _added(theirs.config, reader, time_ids)
        left_out.append(f"addition_embed_type: folded in for pooled text 0 and the sizes {sizes}")
    # On meta: no memory and no time for weights that are replaced at once.
    with torch.device("cpu" if partial else "meta"):
        net = UNet(description.architecture)
    new = _fill(net, reader, constant, progress)
    assert partial or not (new or reader.unused())
    return Conversion(net.eval(), (*left_out, *_loose(theirs.config)), tuple(reader.unused()), new)


def _fill(
    net: UNet, reader: _Weights, added: Tensor, progress: Callable[[float], None] | None = None
) -> tuple[str, ...]:
    """Puts their weights into a net, the added embedding's constant with them; names those that it has not."""
    converted: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    for i, (name, shape) in enumerate(shapes.items()):
        tensor = reader.ours(name, shape)
        if tensor is not None:
            converted[name] = tensor
        if progress:
            progress((i + 1) / len(shapes))
    converted["time.linear2.bias"] += added
    net.load_state_dict(converted, assign=True, strict=False)
    new = tuple(name for name in shapes if name not in converted)
    converted.clear()  # or its convolutions stay beside their channels-last copies
    net.to(memory_format=torch.channels_last)
    return new


def _skeleton(config: Mapping[str, Any], source: str) -> Any:
    """Their net without its weights: every field, and every weight's name and shape."""
    kind = config.get("_class_name")
    if kind not in CLASSES:
        remedy = f"name one of: {', '.join(CLASSES)}"
        raise InputError(source, f"describes {kind or 'no model'}", remedy, place="_class_name")
    try:
        with torch.device("meta"):
            return CLASSES[kind].from_config(dict(config))
    except Exception as error:  # diffusers checks little: whatever its blocks stumble over comes through
        problem = f"is no configuration of a {kind} ({first_line(error)})"
        raise InputError(source, problem, "restore its config.json") from None


class _Weights:
    """Their weights under our names."""

    def __init__(self, arch: Architecture, theirs: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
        self.arch, self.weights, self.source = arch, weights, source
        self.shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        self.taken: set[str] = set()
        wrong = sorted(self.shapes.keys() ^ weights.keys())
        if wrong:
            missing = sum(name in self.shapes for name in wrong)
            problem = f"weights do not fit the configuration: {missing} missing, {len(wrong) - missing} too many"
            raise InputError(source, problem, "use both files of one training", place=wrong[0])

    def ours(self, name: str, shape: torch.Size) -> Tensor | None:
        """Our weight of that name and shape; None where theirs has no such."""
        names = diffusers_keys(name, len(self.arch.down))
        if names[0].endswith("pointwise.bias") and names[0] not in self.shapes:
            return torch.zeros(shape)  # their separable convolutions have no bias
        if not all(their in self.shapes for their in names):
            return None
        if not _fits([self.shapes[their] for their in names], shape):
            return None
        self.taken.update(names)
        parts = [self.read(their) for their in names]
        if self.arch.qk_norm and names[0].endswith((".to_q.weight", ".to_k.weight")):
            parts[0] = parts[0] * QK_SCALE
        return torch.cat(parts).reshape(shape) if len(parts) > 1 else torch.empty(shape).copy_(parts[0].reshape(shape))

    def read(self, name: str) -> Tensor:
        """Their weight in float32, whole and finite."""
        tensor = self.weights[name]
        if tensor.shape != self.shapes[name] or not tensor.is_floating_point():
            problem = f"is {tensor.dtype} of shape {list(tensor.shape)}, not floats of {list(self.shapes[name])}"
            raise InputError(self.source, problem, "use both files of one training", place=name)
        if not tensor.isfinite().all():
            raise InputError(self.source, "holds values that are not finite", "fetch or train it again", place=name)
        return tensor.to("cpu", torch.float32)

    def unused(self) -> list[str]:
        """Names of weights that have no place in ours; the added embedding's are folded in."""
        return [name for name in self.shapes if name not in self.taken and not name.startswith(ADDED)]


def _fits(parts: Sequence[torch.Size], whole: torch.Size) -> bool:
    """Whether weights joined at the outputs have a shape; a 1×1 convolution is a linear layer."""
    inputs = [[side for side in shape[1:] if side > 1] for shape in (*parts, whole)]
    return sum(shape[0] for shape in parts) == whole[0] and all(each == inputs[-1] for each in inputs)


def diffusers_keys(name: str, levels: int) -> tuple[str, ...]:
    """Diffusers' names of what one of our weights is made of, in order, for a net of so many levels."""
    name = re.sub(r"^up\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for pattern, theirs in RENAMED:
        name = pattern.sub(theirs, name)
    if ".keys_values." in name:
        return name.replace("keys_values", "to_k"), name.replace("keys_values", "to_v")
    return (name,)


def _added(
    config: Mapping[str, Any], reader: _Weights, time_ids: Sequence[float] | None
) -> tuple[Tensor, tuple[float, ...]]:
    """What the added embedding adds to the timestep's for these sizes and pooled text zero, and the sizes."""
    inside, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    sizes = tuple(time_ids) if time_ids else _default_sizes(config, reader.source)
    text = inside - each * len(sizes)
    if text < 0 or (text > 0 and config["addition_embed_type"] == "time"):
        problem = f"takes {inside} values, not {len(sizes)} sizes of {each}"
        raise InputError(reader.source, problem, "give as many sizes as it takes", place="addition_embed_type")
    ids = get_timestep_embedding(
        torch.tensor(sizes, dtype=torch.float32), each, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    x = torch.cat([torch.zeros(text), ids.flatten()])
    first, second = ([reader.read(f"{ADDED}linear_{i}.{kind}") for kind in ("weight", "bias")] for i in (1, 2))
    return functional.linear(functional.silu(functional.linear(x, *first)), *second), sizes


def _default_sizes(config: Mapping[str, Any], source: str) -> tuple[float, ...]:
    """Height, width, no crop, target height and width: those of the sample size, if the net takes these six."""
    text = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    side = config["sample_size"]
    if text != (POOLED_WIDTH if config["addition_embed_type"] == "text_time" else 0) or not isinstance(side, int):
        problem = "takes sizes that are not SDXL's six, or has no sample_size"
        raise InputError(source, problem, "give the sizes to fold in (--time-ids)", place="addition_embed_type")
    pixels = float(side * PIXELS_PER_LATENT)
    return (pixels, pixels, 0.0, 0.0, pixels, pixels)


def _loose(config: Mapping[str, Any]) -> list[str]:
    """Settings without weights that change nothing of the output in evaluation and in float32."""
    phrases = {"dropout": "our net has none", "upcast_attention": "attention is computed in the net's own precision"}
    return [f"{field}: {phrase}" for field, phrase in phrases.items() if config.get(field)]
