"""Describe, train, distill and export text-to-image diffusion U-Nets that fit on a phone.

The names below are imported when they are first used: ``import snapgen`` loads neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.architecture.presets import preset as preset
    from snapgen.architecture.schema import Architecture as Architecture
    from snapgen.autoencoders.autoencoder import load_autoencoder as load_autoencoder
    from snapgen.conversion.from_diffusers import from_diffusers as from_diffusers
    from snapgen.data.dataset import load_dataset as load_dataset
    from snapgen.errors import InputError as InputError
    from snapgen.models.unet import UNet as UNet
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline as SnapGenPipeline
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
