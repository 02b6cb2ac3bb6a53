"""Parameters, MACs and memory on the meta device."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.cost.breakdown import Breakdown
    from archsearch.cost.counter import CostItem, cost, count_network, module_cost
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Breakdown", "CostItem", "cost", "count_network", "module_cost"]
