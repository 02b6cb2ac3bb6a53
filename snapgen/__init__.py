"""Describe, train, distill and export text-to-image diffusion U-Nets that fit on a phone.

The names below are imported when they are first used: ``import snapgen`` loads neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.architecture.presets import preset
    from snapgen.architecture.schema import Architecture
    from snapgen.autoencoders.autoencoder import load_autoencoder
    from snapgen.conversion.from_diffusers import from_diffusers
    from snapgen.data.dataset import load_dataset
    from snapgen.errors import InputError
    from snapgen.models.unet import UNet
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Architecture",
    "InputError",
    "SnapGenPipeline",
    "UNet",
    "from_diffusers",
    "load_autoencoder",
    "load_dataset",
    "preset",
]
