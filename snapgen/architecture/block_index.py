"""The blocks of an architecture by name, and architectures with some blocks removed or copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture, BlockKind

FIELDS: Mapping[BlockKind, str] = {"residual": "num_res_blocks", "transformer": "num_transformers"}
"""Name of the field that counts the blocks of each kind."""


SHORT: Mapping[BlockKind, str] = {"residual": "ResNet", "transformer": "CA"}
"""Names of the kinds in SnapFusion (arXiv 2306.00980)."""


Layers = tuple[tuple[int, int], ...]
"""Numbers of residual blocks and of transformers, for each layer of a site."""


BlockSite = tuple[str, int, BlockKind]
"""Position of a block and its copies: site (``down[0]``, ``mid`` or ``up[0]``), layer and kind."""


@dataclass(frozen=True)
class BlockRef:
    """Reference to one block of a net.

    Attributes:
        name: name of its module in the U-Net, e.g. ``down.0.layers.1.residual``.
        kind: residual block or transformer.
        site: the level and way, e.g. ``down[0]``, or ``mid``.
        layer: index of its layer within the site.
        index: index among the layer's blocks of its kind; copies have indices above 0.
    """

    name: str
    kind: BlockKind
    site: str
    layer: int
    index: int

    @property
    def block_site(self) -> BlockSite:
        """Site, layer and kind, which a block shares with its copies."""
        return self.site, self.layer, self.kind

    @property
    def label(self) -> str:
        """Readable name: ``ResNet down[0].1``, with the index appended for copies."""
        return f"{SHORT[self.kind]} {self.site}.{self.layer}" + (f".{self.index}" if self.index else "")


def blocks(arch: Architecture) -> tuple[BlockRef, ...]:
    """All blocks of a net, in the order of the forward pass."""
    return tuple(
        BlockRef(_module_name(site, layer, kind, index), kind, site, layer, index)
        for site, layers in _layers_by_site(arch).items()
        for layer, counts in enumerate(layers)
        for kind, count in zip(FIELDS, counts, strict=True)
        for index in range(count)
    )


def block_counts(arch: Architecture) -> dict[BlockSite, int]:
    """Number of blocks at each block site that has any, in the order of the forward pass."""
    return dict(Counter(block.block_site for block in blocks(arch)))


def with_explicit_layers(arch: Architecture) -> Architecture:
    """The same net with the layers of every site written out."""
    return _with_layers(arch, _layers_by_site(arch))


def edit_blocks(arch: Architecture, removed: Collection[str] = (), copied: Collection[str] = ()) -> Architecture:
    """The architecture with some blocks removed and others followed by a copy.

    Args:
        arch: the architecture to start from.
        removed: names of the blocks to remove.
        copied: names of the blocks to copy once more.

    Raises:
        ValueError: if the net has no block of such a name.
    """
    layers = {site: [list(counts) for counts in site_layers] for site, site_layers in _layers_by_site(arch).items()}
    by_name = {block.name: block for block in blocks(arch)}
    for name, change in [*((name, -1) for name in removed), *((name, 1) for name in copied)]:
        if name not in by_name:
            raise ValueError(f"{name!r} is not a block of the net; it has {', '.join(list(by_name)[:4])}, …")
        block = by_name[name]
        layers[block.site][block.layer][list(FIELDS).index(block.kind)] += change
    return _with_layers(arch, {site: tuple((a, b) for a, b in site_layers) for site, site_layers in layers.items()})


def removable(arch: Architecture) -> tuple[BlockRef, ...]:
    """The blocks that `snapgen.models.subnetworks.edit_network` can remove.

    These are all transformers and, of each layer, the last residual block: the first of several may change the width.
    """
    last = {(b.site, b.layer): b.name for b in blocks(arch) if b.kind == "residual"}
    return tuple(b for b in blocks(arch) if b.kind == "transformer" or last[b.site, b.layer] == b.name)


def _layers_by_site(arch: Architecture) -> dict[str, Layers]:
    return {site: config.layer_counts(is_mid=site == "mid") for site, config, _ in arch.named_levels()}


def _with_layers(arch: Architecture, layers: Mapping[str, Layers]) -> Architecture:
    changes = {f"{site}.layers": site_layers or None for site, site_layers in layers.items()}
    return overrides.apply_overrides(arch, changes)


def _module_name(site: str, layer: int, kind: BlockKind, index: int) -> str:
    prefix = f"{site.replace('[', '.').replace(']', '')}.layers.{layer}"
    if kind == "transformer":
        return f"{prefix}.transformers.{index}"
    return f"{prefix}.copies.{index - 1}" if index else f"{prefix}.residual"
