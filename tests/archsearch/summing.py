"""A device whose times are sums over a net's blocks, or whatever a test says: what tables of blocks are taken from."""

from __future__ import annotations

from collections.abc import Callable

from archsearch.block_latency.config import BlockTableConfig
from archsearch.score import LatencyRecord
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef
from snapgen.architecture.schema import Architecture
from snapgen.seeding import derive_seed
from tests.records import latency_record
from tests.snapgen.nets import tiny

FIXED = 0.3
ONCE = BlockTableConfig(validation_nets=6, min_repeats=1, max_repeats=1)
UNCHECKED = BlockTableConfig(validation_nets=0, min_repeats=1)
NET = tiny()


def cost(block: BlockRef) -> float:
    """Of a block: random by its place, and another for all copies."""
    return 0.3 + derive_seed(0, *block.block_site, int(block.index > 0)) / 2**63


def added(arch: Architecture) -> float:
    return FIXED + sum(cost(block) for block in block_index.blocks(arch))


def crowded(arch: Architecture) -> float:
    """Blocks that cost less the more of them there are."""
    return float(added(arch) ** 0.6)


def biased(arch: Architecture) -> float:
    """A net that was timed badly, and every sub-network well."""
    alone = block_index.edit_blocks(NET, removed=[block_index.blocks(NET)[3].name])
    return added(arch) * (0.7 if arch.id == alone.id else 1)


class Fake:
    """A device whose times are a function of the net."""

    def __init__(self, ms: Callable[[Architecture], float] = added, **conditions: object) -> None:
        self.ms, self.conditions, self.asked = ms, conditions, list[str]()

    def measure(self, arch: Architecture, *_: int) -> LatencyRecord:
        self.asked.append(arch.id)
        return latency_record(self.ms(arch), **self.conditions)
