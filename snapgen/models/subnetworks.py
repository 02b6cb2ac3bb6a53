"""A net's sub-networks: each of its blocks left out or copied, the weights of all others kept (arXiv 2306.00980, 3.1).

A *block* is a residual block or a transformer: what can be the identity. What changes widths or resolution stays: the
samplers, and the 1×1 convolution of a residual block's shortcut.
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
    """Run the sub-network without these blocks, each of them the identity or its shortcut; nothing is built anew."""
    found = [unet.get_submodule(name) for name in names]
    for block in found:
        assert isinstance(block, layers.ResidualBlock | layers.SpatialTransformer), "only blocks can be left out"
        block.runs = False
    try:
        yield
    finally:
        for block in found:
            block.runs = True  # type: ignore[assignment]


def sample_block_dropout(unet: UNet, rate: float, *, seed: int, step: int) -> frozenset[str]:
    """Robust training's draw for a step: each block is left out with probability ``rate`` (section 3.1).

    It holds, in training mode alone, until the next draw: activations may be computed again on the way back.

    Returns:
        The names of the blocks that are left out.
    """
    names = [block.name for block in blocks(unet.arch)]
    generator = torch.Generator().manual_seed(derive_seed(seed, "blocks", step))
    chances = torch.rand(len(names), generator=generator).tolist()
    out = frozenset(name for name, chance in zip(names, chances, strict=True) if chance < rate)
    for name in names:
        unet.get_submodule(name).dropped = name in out
    return out


def edit_network(unet: UNet, removed: Collection[str] = (), copied: Collection[str] = ()) -> UNet:
    """The net of `edit_blocks` with the weights that it had; a copy begins as the identity, its last layer zero.

    Its outputs are those of the net run `blocks_disabled` the removed blocks. That a copy begins so is our choice;
    where the block copied changes the width, its copy does not, and weights of another shape than the copy's stay
    behind.

    Raises:
        ValueError: as `edit_blocks`, or if the first of several residual blocks is to go.
    """
    arch = edit_blocks(unet.arch, removed, copied)
    stay: dict[BlockSite, list[str]] = {}
    for block in blocks(unet.arch):
        times = 0 if block.name in removed else 2 if block.name in copied else 1
        stay.setdefault(block.place, []).extend([block.name] * times)
        if block.kind == "residual" and block.index and stay[block.place][:1] == [block.name]:
            raise ValueError(f"{block.label} can not take the place of the block before it; remove the last one first")
    return _filled(UNet(arch), unet, stay)


def from_supernet(supernet: UNet, arch: Architecture) -> UNet:
    """The net of any deal of blocks over a trained net's layers, with its weights.

    Each layer takes its first blocks of a kind; what it has more is copies of the last, which begin as the identity.

    Raises:
        ValueError: if the two differ in sites or widths, or a block is wanted where the trained net has none.
    """
    have: dict[BlockSite, list[str]] = {}
    for block in blocks(supernet.arch):
        have.setdefault(block.place, []).append(block.name)
    taken: dict[BlockSite, list[str]] = {}
    for block in blocks(arch):
        if block.place not in have:
            raise ValueError(f"{block.label} has no weights in the trained net, which has no such block there")
        taken.setdefault(block.place, []).append(have[block.place][min(block.index, len(have[block.place]) - 1)])
    return _filled(UNet(arch), supernet, taken)


def _filled(net: UNet, trained: UNet, sources: Mapping[BlockSite, Sequence[str]]) -> UNet:
    """``net`` with a trained net's weights.

    Args:
        sources: the trained blocks that stand in each place, in order; one that stands there again begins as identity.
    """
    old, wanted = trained.state_dict(), net.state_dict()
    found = {**old, **_shortcuts(net, old)}
    for block in blocks(net.arch):
        source = sources[block.place][block.index]
        again = source in sources[block.place][: block.index]
        found |= _copy(block, net, old, source) if again else _moved(block, net, old, source)
    for name, like in wanted.items():
        if name not in found or found[name].shape != like.shape:
            raise ValueError(f"{name} does not fit the trained net; take one of the same sites and widths")
    net.load_state_dict({name: found[name] for name in wanted})
    like = next(trained.parameters())
    net.to(like.device)
    return net if like.dtype == torch.float32 else net.to(like.dtype)


def _moved(block: BlockRef, net: UNet, old: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    names = net.get_submodule(block.name).state_dict()
    return {f"{block.name}.{name}": old[f"{source}.{name}"] for name in names if f"{source}.{name}" in old}


def _copy(block: BlockRef, net: UNet, old: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights that fit; where the first block takes another width in than it gives, those of the copy are new."""
    module = net.get_submodule(block.name)
    found = {f"{block.name}.{name}": tensor for name, tensor in module.state_dict().items()}
    found |= {
        name: tensor
        for name, tensor in _moved(block, net, old, source).items()
        if name in found and tensor.shape == found[name].shape
    }
    ends = _ends(module)
    zero = {name for name in found if name.removeprefix(f"{block.name}.").rpartition(".")[0] in ends}
    return found | {name: torch.zeros_like(found[name]) for name in zero}


def _shortcuts(net: UNet, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What layers without a residual block have of the block that was there, or of a stage without places for them."""
    found = {}
    for name in net.state_dict():
        layer, _, rest = name.rpartition(".shortcut.")
        if not layer or name in old or layer.endswith(("residual", "copies")):
            continue
        stage, _, number = layer.rpartition(".layers.")
        for source in (f"{layer}.residual.shortcut.{rest}", *([f"{stage}.widen.{rest}"] if number == "0" else [])):
            if source in old:
                found[name] = old[source]
    return found


def _ends(module: nn.Module) -> set[str]:
    """Names of the layers that end the residual branches in a block."""
    zero = {id(part) for part in layers.zero_init_layers(module)}
    return {name for name, part in module.named_modules() if id(part) in zero}
