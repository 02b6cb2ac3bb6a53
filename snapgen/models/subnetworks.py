"""Sub-networks of a trained net: blocks removed or copied, all other weights kept (SnapFusion, arXiv 2306.00980, 3.1).

A *block* is a residual block or a transformer, which can be replaced by the identity. Layers that change the width or
the resolution are never removed: down- and upsampling, and the 1×1 convolution of a residual block's shortcut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from snapgen.architecture.block_index import BlockRef, BlockSite, blocks, edit_blocks
from snapgen.architecture.schema import Architecture
from snapgen.models import layers
from snapgen.models.unet import UNet
from snapgen.seeding import derive_seed


@contextlib.contextmanager
def blocks_disabled(unet: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Disable blocks temporarily, without building a new net: each acts as its shortcut or as the identity."""
    disabled = [unet.get_submodule(name) for name in names]
    for block in disabled:
        assert isinstance(block, layers.ResidualBlock | layers.SpatialTransformer), "only blocks can be disabled"
        block.enabled = False
    try:
        yield
    finally:
        for block in disabled:
            block.enabled = True  # type: ignore[assignment]


def sample_block_dropout(unet: UNet, drop_prob: float, *, seed: int, step: int) -> frozenset[str]:
    """Choose the blocks to skip in a step of robust training, each with probability ``drop_prob`` (section 3.1).

    The choice applies in training mode only and until the next draw, since gradient checkpointing may compute
    activations again in the backward pass.

    Returns:
        The names of the skipped blocks.
    """
    names = [block.name for block in blocks(unet.arch)]
    generator = torch.Generator().manual_seed(derive_seed(seed, "blocks", step))
    draws = torch.rand(len(names), generator=generator).tolist()
    skipped = frozenset(name for name, draw in zip(names, draws, strict=True) if draw < drop_prob)
    for name in names:
        unet.get_submodule(name).skipped = name in skipped
    return skipped


def edit_network(unet: UNet, removed: Collection[str] = (), copied: Collection[str] = ()) -> UNet:
    """Build the net of `edit_blocks` with the trained weights; copies start as the identity, their last layer zero.

    Its outputs equal those of the trained net under `blocks_disabled` for the removed blocks. That copies start as the
    identity is our choice. The copy of a block that changes the width does not change it; weights that do not fit the
    copy's shape keep their initial values.

    Raises:
        ValueError: as `edit_blocks`, or if the first of several residual blocks would be removed.
    """
    arch = edit_blocks(unet.arch, removed, copied)
    sources: dict[BlockSite, list[str]] = {}
    for block in blocks(unet.arch):
        count = 0 if block.name in removed else 2 if block.name in copied else 1
        sources.setdefault(block.block_site, []).extend([block.name] * count)
        # The first residual block of a layer may change the width, so that no later one fits in its place.
        if block.kind == "residual" and block.index and sources[block.block_site][:1] == [block.name]:
            raise ValueError(f"{block.label} cannot replace the block before it; remove the last one first")
    return _with_trained_weights(UNet(arch, unet.prediction_type), unet, sources)


def from_supernet(supernet: UNet, arch: Architecture) -> UNet:
    """Build a net with any numbers of blocks in the layers of a trained net, with its weights.

    Each layer takes the first of its trained blocks of a kind. Blocks beyond their number are copies of the last one,
    which start as the identity.

    Raises:
        ValueError: if the two nets differ in levels or widths, or ``arch`` has a block where the trained net has none
            of its kind.
    """
    trained: dict[BlockSite, list[str]] = {}
    for block in blocks(supernet.arch):
        trained.setdefault(block.block_site, []).append(block.name)
    sources: dict[BlockSite, list[str]] = {}
    for block in blocks(arch):
        names = trained.get(block.block_site)
        if not names:
            raise ValueError(f"{block.label} has no weights in the trained net, which has no such block there")
        sources.setdefault(block.block_site, []).append(names[min(block.index, len(names) - 1)])
    return _with_trained_weights(UNet(arch, supernet.prediction_type), supernet, sources)


def _with_trained_weights(net: UNet, trained: UNet, sources: Mapping[BlockSite, Sequence[str]]) -> UNet:
    """Load a trained net's weights into ``net``, and move it to the trained net's device and dtype.

    Args:
        sources: for each block site, the trained block that each of its blocks takes its weights from, in order; where
            one is repeated, the repetitions start as the identity.
    """
    old, expected = trained.state_dict(), net.state_dict()
    new = {**old, **_shortcut_weights(net, old)}
    for block in blocks(net.arch):
        source = sources[block.block_site][block.index]
        is_copy = source in sources[block.block_site][: block.index]
        # A repeated source is a copy, which starts as the identity.
        new |= (_copied_weights if is_copy else _renamed_weights)(block, net, old, source)
    for name, tensor in expected.items():
        if name not in new or new[name].shape != tensor.shape:
            raise ValueError(f"{name} does not fit the trained net; use an architecture with its levels and widths")
    net.load_state_dict({name: new[name] for name in expected})
    parameter = next(trained.parameters())
    net.to(parameter.device)
    return net if parameter.dtype == torch.float32 else net.to(parameter.dtype)


def _renamed_weights(block: BlockRef, net: UNet, old: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of a block, taken from the trained block ``source``."""
    names = net.get_submodule(block.name).state_dict()
    return {f"{block.name}.{name}": old[f"{source}.{name}"] for name in names if f"{source}.{name}" in old}


def _copied_weights(block: BlockRef, net: UNet, old: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of a copy of the trained block ``source``, which starts as the identity.

    If the source changes the width, weights that do not fit keep their initial values.
    """
    module = net.get_submodule(block.name)
    new = {f"{block.name}.{name}": tensor for name, tensor in module.state_dict().items()}
    new |= {
        name: tensor
        for name, tensor in _renamed_weights(block, net, old, source).items()
        if name in new and tensor.shape == new[name].shape
    }
    last_layers = _zero_init_names(module)
    zero = {name for name in new if name.removeprefix(f"{block.name}.").rpartition(".")[0] in last_layers}
    return new | {name: torch.zeros_like(new[name]) for name in zero}


def _shortcut_weights(net: UNet, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the 1×1 convolutions in layers without a residual block.

    They come from the shortcut of the removed block, or from ``widen`` of a level that had transformers only.
    """
    new = {}
    for name in net.state_dict():
        layer, _, suffix = name.rpartition(".shortcut.")
        if not layer or name in old:
            continue
        level, _, number = layer.rpartition(".layers.")
        for source in (
            f"{layer}.residual.conv_shortcut.{suffix}",
            *([f"{level}.widen.{suffix}"] if number == "0" else []),
        ):
            if source in old:
                new[name] = old[source]
    return new


def _zero_init_names(module: nn.Module) -> set[str]:
    """Names of the last layers of the residual branches in a block."""
    zero = {id(layer) for layer in layers.zero_init_layers(module)}
    return {name for name, layer in module.named_modules() if id(layer) in zero}
