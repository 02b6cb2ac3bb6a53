"""The diffusers pipeline from prompts to images, its loading, and decoder distillation on its latents."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.pipeline.loading import load_pipeline as load_pipeline
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline as SnapGenPipeline
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
