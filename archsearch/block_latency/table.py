"""What each block of a net costs in milliseconds on a device (arXiv 2306.00980, 3.2), and what sums of them are worth.

A net's time is a fixed part, a first block's part in every place that has blocks, and a copy's part for every further
one there: the first residual block of a place may change the width, so its copies are blocks of another shape.
`archsearch.block_latency.fitting` takes the times that a table is made of, and solves for its parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from archsearch.block_latency.config import BlockTableConfig
from archsearch.score import LatencyRecord
from archsearch.stats.regression import Array
from snapgen import config
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef, BlockSite
from snapgen.architecture.schema import Architecture, BlockKind
from snapgen.config import Config
from snapgen.errors import InputError

TOLERATED = 0.10
"""Relative error of a sub-network's predicted time, over which the table is corrected."""

SUREST, VAGUEST = 0.005, 0.16
"""Relative error of one net's measured time, at least and at most, whatever its records say."""
EXACT = 0.001
"""And of a predicted one."""


class NetTiming(Config):
    """A net that was timed.

    The lowest of its medians counts: what disturbs a measurement only ever adds to it.
    """

    what: str
    use: Literal["fill", "check"]
    architecture_id: str
    counts: tuple[int, ...]
    """Blocks in each of the table's places."""
    records: tuple[LatencyRecord, ...] = Field(min_length=1)
    """All of them."""

    @property
    def ms(self) -> float:
        """The time that counts."""
        return min(record.median_ms for record in self.records)

    @property
    def tolerance(self) -> float:
        """Relative error of `ms`: its runs' spread, or what the two lowest records are apart, if that is more.

        Predictions have no such spread; what they are wrong by, they are wrong by together (`EXACT`).
        """
        first, *others = sorted(self.records, key=lambda record: record.median_ms)
        if not first.runs:
            return EXACT
        spread = (first.upper_quartile_ms - first.lower_quartile_ms) / first.runs**0.5
        apart = others[0].median_ms - first.median_ms if others else 0.0
        return float(np.clip(max(spread, apart) / first.median_ms, SUREST, VAGUEST))


class BlockCost(Config):
    """What the blocks of one layer and kind cost."""

    site: str
    layer: int
    kind: BlockKind
    ms: float = Field(ge=0)
    """The first."""
    copy_ms: float = Field(ge=0)
    """Each one after it."""

    @property
    def place(self) -> BlockSite:
        """As its blocks have it."""
        return self.site, self.layer, self.kind


class PredictionErrors(Config):
    """Relative errors of predicted times, of nets that the prediction does not know: +0.1 is a tenth too much."""

    errors: tuple[float, ...] = Field(min_length=1)

    @property
    def median(self) -> float:
        """Of the magnitudes."""
        return float(np.median(np.abs(self.errors)))

    @property
    def largest(self) -> float:
        """Of the magnitudes."""
        return max(map(abs, self.errors))

    @property
    def bias(self) -> float:
        """The mean error, with its sign."""
        return float(np.mean(self.errors))

    @property
    def within(self) -> float:
        """The share that is off by no more than `TOLERATED`."""
        return float(np.mean(np.abs(self.errors) <= TOLERATED))


Correction = Literal["refit", "curve"]


class BlockTable(Config):
    """The costs of a net's blocks on one device, all that they were taken from, and what their sums are worth."""

    version: Literal[1] = 1
    architecture: Architecture
    latent_size: int
    context_tokens: int
    settings: BlockTableConfig
    source: Literal["measured", "predicted", "published"]
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = None
    runtime: str
    fixed_ms: float = Field(ge=0)
    """What is left without any block."""
    floor_ms: float = Field(gt=0)
    """The least that a block is said to cost: the standard error of a block's cost in the fit, the median of them all.
    A fit may give a block nothing, but cannot tell less than that from nothing."""
    costs: tuple[BlockCost, ...] = Field(min_length=1)
    """In the order of the forward pass."""
    scale: float = Field(default=1, gt=0)
    power: float = Field(default=1, gt=0)
    """A net takes ``scale · sum ** power`` milliseconds; other than 1 where the curve corrects."""
    before: PredictionErrors | None = None
    """Of sums fitted to nets with one kind of change each; None where no sub-network was taken."""
    tried: dict[Correction, PredictionErrors] = Field(default_factory=dict)
    """Of each correction by the other sub-networks, each one left out in turn; none where there was no need."""
    correction: Correction | None = None
    """The one that is made: of those tried the best, if it is better than none."""
    measured: tuple[NetTiming, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if [cost.place for cost in self.costs] != list(block_index.block_counts(self.architecture)):
            raise ValueError("its costs are not of its architecture's blocks; fill the table again")
        if any(len(net.counts) != len(self.costs) for net in self.measured):
            raise ValueError("a measured net has not a count for every place; fill the table again")
        conditions = {record.conditions for net in self.measured for record in net.records}
        if conditions != {self.conditions}:
            raise ValueError(f"records of different conditions: {condition_mismatch(conditions | {self.conditions})}")
        return self

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """From a file.

        Raises:
            InputError: if it is no such table.
        """
        return config.load_yaml(path, cls)

    def to_json(self) -> str:
        """As `load` reads it."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    @property
    def conditions(self) -> tuple[str, ...]:
        """As `LatencyRecord.conditions`."""
        return self.source, self.device, self.compute_units, self.chip, str(self.threads), self.runtime

    @property
    def whole_ms(self) -> float:
        """The time of the net itself, as measured (or predicted by the backend)."""
        return self.measured[0].ms

    @property
    def after(self) -> PredictionErrors | None:
        """Of the best correction that was tried, made or not; None where there was no need."""
        return min(self.tried.values(), key=lambda check: check.largest, default=None)

    @property
    def corrected(self) -> bool:
        """Whether there was need of a correction, and one did better than none."""
        return self.correction is not None

    @property
    def share(self) -> float:
        """What a part's milliseconds are to be taken times: 1, or what the curve makes of the whole net's."""
        whole = self._sum(block_index.block_counts(self.architecture))
        return self.scale * float(whole**self.power) / whole

    def of(self, block: BlockRef) -> float:
        """Milliseconds of a block, at least ``floor_ms``; of one after the first of its place, a copy's.

        Raises:
            InputError: if the net has no block in that place.
        """
        cost = next((cost for cost in self.costs if cost.place == block.place), None)
        if cost is None:
            raise InputError("block table", f"has no place of {block.label}", "fill one for this net")
        return max(self.share * (cost.copy_ms if block.index else cost.ms), self.floor_ms)

    def predict(self, arch: Architecture) -> float:
        """Milliseconds of a sub-network: of the sum of its blocks' parts, without a floor, and the fixed part.

        Raises:
            InputError: if the two nets differ in more than how many blocks stand where.
        """
        counts = block_index.block_counts(arch)
        if (
            not counts.keys() <= {cost.place for cost in self.costs}
            or with_block_counts(self.architecture, counts).id != arch.id
        ):
            problem = f"{arch.id} is no sub-network of the table's net {self.architecture.id}"
            raise InputError("block table", problem, "fill one for this net")
        return self.scale * float(self._sum(counts) ** self.power)

    def _sum(self, counts: Mapping[BlockSite, int]) -> float:
        costs = np.array([self.fixed_ms, *itertools.chain(*((cost.ms, cost.copy_ms) for cost in self.costs))])
        return float(features([counts.get(cost.place, 0) for cost in self.costs]) @ costs)


def with_block_counts(arch: Architecture, counts: Mapping[BlockSite, int]) -> Architecture:
    """The net with so many blocks in each of the places where it has any; none where nothing is said."""
    removed: list[str] = []
    copied: list[str] = []
    for place, group in itertools.groupby(
        sorted(block_index.blocks(arch), key=lambda block: block.place), key=lambda block: block.place
    ):
        names = [block.name for block in group]
        wanted = counts.get(place, 0)
        removed += names[wanted:]
        copied += names[:1] * max(0, wanted - len(names))
    return block_index.edit_blocks(arch, removed, copied)


def features(counts: Sequence[int]) -> Array:
    """1, and for every place whether it has a block and how many more: (1 + 2 · places,)."""
    return np.array([1.0, *itertools.chain(*((min(count, 1), max(count - 1, 0)) for count in counts))])


def condition_mismatch(conditions: set[tuple[str, ...]]) -> str:
    """In what records of several conditions differ first, for people."""
    one, other = sorted(conditions)[:2]
    return next(f"{a} and {b}" for a, b in zip(one, other, strict=True) if a != b)
