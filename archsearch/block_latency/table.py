"""Block latency tables: milliseconds of each block of a net on a device, and the accuracy of their sums
(arXiv 2306.00980, section 3.2).

The latency of a net is a fixed part, plus the latency of the first block at every site, plus the latency of a copy for
every further block of that site. The two differ because the first residual block of a site may change the width.
`archsearch.block_latency.fitting` measures the nets and fits the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from archsearch.block_latency.config import BlockTableConfig
from archsearch.latency.records import condition_mismatch
from archsearch.score import LatencyRecord
from archsearch.stats.regression import Array
from snapgen import config
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef, BlockSite
from snapgen.architecture.schema import Architecture, BlockKind
from snapgen.config import Config
from snapgen.errors import InputError

TOLERATED = 0.10
"""Relative error of a sub-network's predicted latency beyond which a refit is tried."""

MIN_TOLERANCE, MAX_TOLERANCE = 0.005, 0.16
"""Bounds of the relative error attributed to a net's measured latency."""

PREDICTED_TOLERANCE = 0.001
"""Relative error attributed to a predicted latency."""


class NetTiming(Config):
    """Latency records of one net.

    The lowest median counts, because disturbances can only increase a measured time.
    """

    what: str
    use: Literal["fill", "check"]
    architecture_id: str
    counts: tuple[int, ...]
    """Number of blocks at each site of the table."""
    records: tuple[LatencyRecord, ...] = Field(min_length=1)
    """All latency records of the net."""

    @property
    def ms(self) -> float:
        """Lowest median of the records."""
        return min(record.median_ms for record in self.records)

    @property
    def tolerance(self) -> float:
        """Relative error of `ms`: the standard error of its runs or the gap of the two lowest records, if larger.

        Predictions have no such spread, and their errors are common to all nets (`PREDICTED_TOLERANCE`).
        """
        first, *others = sorted(self.records, key=lambda record: record.median_ms)
        if not first.runs:
            return PREDICTED_TOLERANCE
        spread = (first.upper_quartile_ms - first.lower_quartile_ms) / first.runs**0.5
        gap = others[0].median_ms - first.median_ms if others else 0.0
        return float(np.clip(max(spread, gap) / first.median_ms, MIN_TOLERANCE, MAX_TOLERANCE))


class BlockCost(Config):
    """Latency of the blocks of one site."""

    site: str
    layer: int
    kind: BlockKind
    ms: float = Field(ge=0)
    """Latency of the first block."""
    copy_ms: float = Field(ge=0)
    """Latency of each further block."""

    @property
    def block_site(self) -> BlockSite:
        """Site of the blocks."""
        return self.site, self.layer, self.kind


class PredictionErrors(Config):
    """Relative errors of the predicted latencies of nets outside of the fit; +0.1 means 10 % too high."""

    errors: tuple[float, ...] = Field(min_length=1)

    @property
    def median(self) -> float:
        """Median magnitude of the errors."""
        return float(np.median(np.abs(self.errors)))

    @property
    def largest(self) -> float:
        """Largest magnitude of the errors."""
        return max(map(abs, self.errors))

    @property
    def bias(self) -> float:
        """Mean signed error."""
        return float(np.mean(self.errors))

    @property
    def within(self) -> float:
        """Fraction of the errors whose magnitude does not exceed `TOLERATED`."""
        return float(np.mean(np.abs(self.errors) <= TOLERATED))


class BlockTable(Config):
    """Block latencies of a net on one device, with the measurements and the accuracy of predictions."""

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
    """Latency of the net without any block."""
    floor_ms: float = Field(gt=0)
    """Smallest latency reported for a block: the median standard error of the blocks' latencies. The fit may assign
    zero to a block, but cannot distinguish smaller latencies from zero."""
    costs: tuple[BlockCost, ...] = Field(min_length=1)
    """Block latencies in the order of the forward pass."""
    before: PredictionErrors | None = None
    """Errors without correction; None without validation nets."""
    tried: dict[Literal["refit"], PredictionErrors] = Field(default_factory=dict)
    """Leave-one-out errors of a refit that includes the validation nets; empty if none was needed."""
    correction: Literal["refit"] | None = None
    """Whether the refit applies: it does if it is better."""
    measured: tuple[NetTiming, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _without_curve(cls, data: object) -> object:
        """Read an older table, whose sums a power of them could correct, as one without that correction."""
        if not isinstance(data, Mapping) or "power" not in data:
            return data
        old = {key: value for key, value in data.items() if key not in ("scale", "power")}
        tried = {name: errors for name, errors in old.get("tried", {}).items() if name != "curve"}
        return {**old, "tried": tried, "correction": "refit" if old.get("correction") == "refit" else None}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if [cost.block_site for cost in self.costs] != list(block_index.block_counts(self.architecture)):
            raise ValueError("the costs do not match the architecture's blocks; fit the table again")
        if any(len(net.counts) != len(self.costs) for net in self.measured):
            raise ValueError("a measured net does not have a count for every site; fit the table again")
        conditions = {record.conditions for net in self.measured for record in net.records}
        if conditions != {self.conditions}:
            raise ValueError(f"records of different conditions: {condition_mismatch(conditions | {self.conditions})}")
        return self

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """Load a table from a file.

        Raises:
            InputError: if it is not a block latency table.
        """
        return config.load_yaml(path, cls)

    def to_json(self) -> str:
        """The content of a table file."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of the records, like `LatencyRecord.conditions`."""
        return self.source, self.device, self.compute_units, self.chip, str(self.threads), self.runtime

    @property
    def whole_ms(self) -> float:
        """Latency of the whole net, as measured (or predicted by the backend)."""
        return self.measured[0].ms

    @property
    def after(self) -> PredictionErrors | None:
        """Errors of the refit, applied or not; None if none was needed."""
        return self.tried.get("refit")

    def block_ms(self, block: BlockRef) -> float:
        """Latency of a block in milliseconds, at least ``floor_ms``; that of a copy unless it is the first of its site.

        Raises:
            InputError: if the net has no block at that site.
        """
        cost = next((cost for cost in self.costs if cost.block_site == block.block_site), None)
        if cost is None:
            raise InputError("block table", f"has no entry for {block.label}", "fit a table for this net")
        return max(cost.copy_ms if block.index else cost.ms, self.floor_ms)

    def predict(self, arch: Architecture) -> float:
        """Predicted latency of a sub-network in milliseconds: the sum of the fixed part and its blocks.

        ``floor_ms`` does not apply to the sum.

        Raises:
            InputError: if the nets differ in more than the number of blocks at each site.
        """
        counts = block_index.block_counts(arch)
        if (
            not counts.keys() <= {cost.block_site for cost in self.costs}
            or with_block_counts(self.architecture, counts).id != arch.id
        ):
            problem = f"{arch.id} is not a sub-network of the table's net {self.architecture.id}"
            raise InputError("block table", problem, "fit a table for this net")
        costs = np.array([self.fixed_ms, *itertools.chain(*((cost.ms, cost.copy_ms) for cost in self.costs))])
        return float(features([counts.get(cost.block_site, 0) for cost in self.costs]) @ costs)


def with_block_counts(arch: Architecture, counts: Mapping[BlockSite, int]) -> Architecture:
    """The net with another number of blocks at each of its sites; sites that are not listed lose their blocks."""
    removed: list[str] = []
    copied: list[str] = []
    for site, group in itertools.groupby(
        sorted(block_index.blocks(arch), key=lambda block: block.block_site), key=lambda block: block.block_site
    ):
        names = [block.name for block in group]
        count = counts.get(site, 0)
        removed += names[count:]
        copied += names[:1] * max(0, count - len(names))
    return block_index.edit_blocks(arch, removed, copied)


def features(counts: Sequence[int]) -> Array:
    """Features of a net, (1 + 2 · sites,): a constant 1, and for every site min(count, 1) and max(count - 1, 0)."""
    return np.array([1.0, *itertools.chain(*((min(count, 1), max(count - 1, 0)) for count in counts))])
