"""Conversion of diffusers U-Nets to ours."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.conversion.from_diffusers import Conversion, convert
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Conversion", "convert"]
