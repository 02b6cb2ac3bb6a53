"""YAML schemas, and how the shipped files are found."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.config.ablation import AblationConfig as AblationConfig
    from archsearch.studies.config.evolution import EvolutionConfig as EvolutionConfig
    from archsearch.studies.config.study import (
        LatencyConfig as LatencyConfig,
        SamplerConfig as SamplerConfig,
        StudyConfig as StudyConfig,
        load_config as load_config,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
