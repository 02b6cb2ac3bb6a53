"""Export to Core AI, Apple's runtime for neural nets since iOS 27 and macOS 27."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.coreai.asset import COREAI as COREAI
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
