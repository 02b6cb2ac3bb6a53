"""The blocks of an architecture: which there are, where, and architectures with some left out or copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture, BlockKind

FIELDS: Mapping[BlockKind, str] = {"residual": "residual_blocks", "transformer": "transformers"}
"""What a site counts blocks of a kind in."""


SHORT: Mapping[BlockKind, str] = {"residual": "ResNet", "transformer": "CA"}
"""The paper's names."""


Layers = tuple[tuple[int, int], ...]


BlockSite = tuple[str, int, BlockKind]
"""Site, layer, kind."""


@dataclass(frozen=True)
class BlockRef:
    """One block of a net.

    Attributes:
        name: of its module in the U-Net, e.g. ``down.0.layers.1.residual``.
        kind: what it is.
        site: the stage, ``down[0]``, or ``mid``.
        layer: of the site.
        index: among the layer's blocks of its kind.
    """

    name: str
    kind: BlockKind
    site: str
    layer: int
    index: int

    @property
    def place(self) -> BlockSite:
        """What it shares with its copies."""
        return self.site, self.layer, self.kind

    @property
    def label(self) -> str:
        """For people: ``ResNet down[0].1``; copies have their index behind."""
        return f"{SHORT[self.kind]} {self.site}.{self.layer}" + (f".{self.index}" if self.index else "")


def blocks(arch: Architecture) -> tuple[BlockRef, ...]:
    """Every block of a net, in the order of the forward pass."""
    return tuple(
        BlockRef(_module(site, layer, kind, index), kind, site, layer, index)
        for site, layers in _dealt(arch).items()
        for layer, counts in enumerate(layers)
        for kind, count in zip(FIELDS, counts, strict=True)
        for index in range(count)
    )


def block_counts(arch: Architecture) -> dict[BlockSite, int]:
    """How many blocks stand in each place that has any, in the order of the forward pass."""
    return dict(Counter(block.place for block in blocks(arch)))


def with_explicit_layers(arch: Architecture) -> Architecture:
    """The same net, with every site's layers written out."""
    return _with(arch, _dealt(arch))


def edit_blocks(arch: Architecture, removed: Collection[str] = (), copied: Collection[str] = ()) -> Architecture:
    """The description of a net without some blocks, and with each of some others once more, after it.

    Raises:
        ValueError: if the net has no block of such a name.
    """
    layers = {site: [list(counts) for counts in found] for site, found in _dealt(arch).items()}
    known = {block.name: block for block in blocks(arch)}
    for name, more in [*((name, -1) for name in removed), *((name, 1) for name in copied)]:
        if name not in known:
            raise ValueError(f"{name!r} is no block of the net; it has {', '.join(list(known)[:4])}, …")
        block = known[name]
        layers[block.site][block.layer][list(FIELDS).index(block.kind)] += more
    return _with(arch, {site: tuple((a, b) for a, b in found) for site, found in layers.items()})


def removable(arch: Architecture) -> tuple[BlockRef, ...]:
    """The blocks that `carried` can leave out: all but the first of several residual blocks, which changes widths."""
    last = {(b.site, b.layer): b.name for b in blocks(arch) if b.kind == "residual"}
    return tuple(b for b in blocks(arch) if b.kind == "transformer" or last[b.site, b.layer] == b.name)


def _dealt(arch: Architecture) -> dict[str, Layers]:
    return {site: given.dealt(ends_plain=site == "mid") for site, given, _ in arch.sites()}


def _with(arch: Architecture, layers: Mapping[str, Layers]) -> Architecture:
    return overrides.apply_overrides(arch, {f"{site}.layers": dealt or None for site, dealt in layers.items()})


def _module(site: str, layer: int, kind: BlockKind, index: int) -> str:
    where = f"{site.replace('[', '.').replace(']', '')}.layers.{layer}"
    if kind == "transformer":
        return f"{where}.transformers.{index}"
    return f"{where}.copies.{index - 1}" if index else f"{where}.residual"
