"""Search spaces over U-Net architectures."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.spaces.knob import Knob as Knob
    from archsearch.spaces.loading import load_space as load_space
    from archsearch.spaces.space import Space as Space
    from archsearch.spaces.summary import SpaceSummary as SpaceSummary, summarize as summarize
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
