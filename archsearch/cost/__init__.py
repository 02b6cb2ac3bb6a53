"""Parameters, MACs and memory on the meta device."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.cost.breakdown import Breakdown as Breakdown
    from archsearch.cost.counter import (
        CostItem as CostItem,
        cost as cost,
        count_network as count_network,
        module_cost as module_cost,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
