"""Tables of block latencies: the milliseconds of each block of a net."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.block_latency.config import BlockTableConfig
    from archsearch.block_latency.fitting import fit_block_table
    from archsearch.block_latency.table import BlockTable
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["BlockTable", "BlockTableConfig", "fit_block_table"]
