"""Train a recipe, stage by stage."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.training.comparison import (
        ComparisonConfig as ComparisonConfig,
        compare as compare,
        load_comparison as load_comparison,
    )
    from archsearch.training.log import read_evaluations as read_evaluations
    from archsearch.training.recipe import Recipe as Recipe, load_recipe as load_recipe
    from archsearch.training.run import train as train
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
