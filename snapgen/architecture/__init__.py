"""Description of a U-Net's architecture, overrides by path, and presets; does not import torch."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.architecture.overrides import apply_overrides
    from snapgen.architecture.presets import preset
    from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Architecture", "BlocksConfig", "LevelConfig", "TimeEmbeddingConfig", "apply_overrides", "preset"]
