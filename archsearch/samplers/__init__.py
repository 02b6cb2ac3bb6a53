"""Optuna samplers for studies in which some objectives are known before a trial."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.samplers.ehvi import EHVISampler as EHVISampler
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
