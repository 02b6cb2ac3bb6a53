"""Tables of block latencies: the milliseconds of each block of a net."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.block_latency.config import BlockTableConfig as BlockTableConfig
    from archsearch.block_latency.fitting import fit_block_table as fit_block_table
    from archsearch.block_latency.table import BlockTable as BlockTable
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
