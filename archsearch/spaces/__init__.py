"""Search spaces over U-Net architectures."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.spaces.knob import Knob
    from archsearch.spaces.loading import load_space
    from archsearch.spaces.space import Space
    from archsearch.spaces.summary import SpaceSummary, summarize
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Knob", "Space", "SpaceSummary", "load_space", "summarize"]
