"""Conversion of diffusers U-Nets to ours."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.conversion.from_diffusers import Conversion as Conversion, convert as convert
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
