"""Description of a U-Net's architecture, overrides by path, and presets; does not import torch."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.architecture.overrides import apply_overrides as apply_overrides
    from snapgen.architecture.presets import preset as preset
    from snapgen.architecture.schema import (
        Architecture as Architecture,
        BlocksConfig as BlocksConfig,
        LevelConfig as LevelConfig,
        TimeEmbeddingConfig as TimeEmbeddingConfig,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
