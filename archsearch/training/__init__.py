"""Train a recipe, stage by stage."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.training.comparison import ComparisonConfig, compare, load_comparison
    from archsearch.training.log import read_evaluations
    from archsearch.training.recipe import Recipe, load_recipe
    from archsearch.training.run import train
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["ComparisonConfig", "Recipe", "compare", "load_comparison", "load_recipe", "read_evaluations", "train"]
